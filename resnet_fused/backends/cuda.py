"""The ``cuda`` backend: passes over memory by the CUDA extension, products by Triton, 3×3 and 7×7 convolutions by cuDNN."""

from __future__ import annotations

from .library import LibraryKernels


class CudaKernels(LibraryKernels):
    """Kernels of csrc/cuda; products as the ``aten`` backend has them: cuDNN's and cuBLAS's."""

    name = "cuda"


def cuda_kernels() -> LibraryKernels:
    """The backend on this machine: with Triton's products where Triton is."""
    try:
        from .triton.dispatch import TritonKernels
    except ImportError:
        return CudaKernels()

    class CudaAndTritonKernels(CudaKernels, TritonKernels):
        pass

    # cuDNN's 3×3 until a GPU has measured ours.
    return CudaAndTritonKernels(own_conv3x3=False)
