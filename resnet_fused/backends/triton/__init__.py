"""The ``triton`` backend: 1×1 and 3×3 convolutions with the fusions of the plans, batch norm, residual additions, pooling.

Nothing is imported here, so that the cost model can be read without Triton.
"""
