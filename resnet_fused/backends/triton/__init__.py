"""The ``triton`` backend: 1×1 and 3×3 convolutions with the fusions of the plans, batch norm, residual additions, pooling."""

from .dispatch import TritonKernels

__all__ = ["TritonKernels"]
