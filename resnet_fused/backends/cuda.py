"""The ``cuda`` backend: passes over memory by the CUDA extension, products by Triton, 3×3 and 7×7 convolutions by cuDNN.

Where Triton is missing, half precision's 1×1 and 3×3 convolutions are the extension's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import LibraryKernels
from .operands import Conv, Operand, Pending, Product, source

_HALF = (torch.bfloat16, torch.float16)
_OCTET = 8  # channels that a thread copies at once: 16 bytes
_MOST_PIXELS = 2**31 - 2**8  # of an output: rows are counted in 32 bits, up to a tile beyond the last


def _is_aligned(t: Tensor | None) -> bool:
    return t is None or t.data_ptr() % 16 == 0


def convolves(x: Operand, weight: Tensor, conv: Conv) -> bool:
    """Whether the extension's convolution does this one: half precision, 1×1 or 3×3 with its usual padding, one stride, no
    groups, multiples of 8 channels, dense in channels_last and at multiples of 16 bytes."""
    y, size = source(x), weight.shape[2]
    n, _, p, q = conv.output_shape(y.shape, weight.shape)
    return (
        y.dtype in _HALF
        and weight.dtype == y.dtype
        and tuple(weight.shape[2:]) in ((1, 1), (3, 3))
        and conv.padding == (size // 2, size // 2)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1]
        and weight.shape[0] % _OCTET == 0
        and weight.shape[1] % _OCTET == 0
        and 0 < n * p * q <= _MOST_PIXELS
        and all(t.is_contiguous(memory_format=torch.channels_last) and _is_aligned(t) for t in (y, weight))
    )


class CudaKernels(LibraryKernels):
    """Passes by csrc/cuda; convolutions and products as the ``aten`` backend has them: cuDNN's and cuBLAS's."""

    name = "cuda"


class CudaConvolutionKernels(CudaKernels):
    """``CudaKernels`` with csrc/cuda/conv for every convolution that it does, whose operands may then be pending."""

    def operand(self, y: Tensor, scale: Tensor, shift: Tensor, relu: bool, keep_y: bool) -> Operand:
        if y.dtype in _HALF:
            return Pending(y, scale, shift, relu)
        return super().operand(y, scale, shift, relu, keep_y)

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if not convolves(x, weight, conv):
            return super().fprop(x, weight, conv)
        return self._convolved(x, weight, conv)[0]

    def fprop_stats(self, x: Operand, weight: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
        if not convolves(x, weight, conv):
            return super().fprop_stats(x, weight, conv)
        return self.ops.conv_stats(*_operand(x), weight, conv.stride[0])

    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        if not (_is_aligned(residual) and all(convolves(p.a, p.weight, p.conv) for p in products)):
            return super().fprop_bn_act(products, shift, residual, relu, save_mask)
        first, *others = products
        for p in others:
            # Rounded between the products, as stock PyTorch rounds the shortcut.
            residual = self._convolved(p.a, p.weight, p.conv, p.scale, None, residual, False, False)[0]
        return self._convolved(first.a, first.weight, first.conv, first.scale, shift, residual, relu, save_mask)

    def _convolved(
        self,
        x: Operand,
        weight: Tensor,
        conv: Conv,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        save_mask: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return self.ops.conv_bn_act(*_operand(x), weight, conv.stride[0], scale, shift, residual, relu, save_mask)


def _operand(x: Operand) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    return (x.y, x.scale, x.shift, x.relu) if isinstance(x, Pending) else (x, None, None, False)


def cuda_kernels() -> CudaKernels:
    """The backend on this machine: with Triton's products where Triton is."""
    try:
        from .triton.dispatch import TritonKernels
    except ImportError:
        return CudaConvolutionKernels()

    class CudaAndTritonKernels(CudaKernels, TritonKernels):
        pass

    # cuDNN's 3×3 until a GPU has measured ours.
    return CudaAndTritonKernels(own_conv3x3=False)
