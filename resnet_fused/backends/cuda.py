"""The ``cuda`` backend: passes over memory by the CUDA extension, products by Triton, 3×3 and 7×7 convolutions by cuDNN.

Where Triton is missing, half precision's 1×1 and 3×3 convolutions are the extension's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import FrozenNorm, NormGradients, RowGradients
from .library import LibraryKernels
from .operands import Conv, Feedback, Operand, Pending, Product, acc_dtype, source

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
    """Passes and algebra by csrc/cuda; convolutions and products as the ``aten`` backend has them: cuDNN's and cuBLAS's."""

    name = "cuda"

    def norm_vectors(
        self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if weight.dtype != bias.dtype or not _are_of_one_kind(dtype, weight.dtype):
            return super().norm_vectors(mean, var, weight, bias, eps, dtype)
        rounded_mean, rounded_var, *vectors = self.ops.norm_vectors(
            *map(_contiguous, (mean, var, weight, bias)), eps, dtype
        )
        return (mean, var, *vectors) if mean.dtype == dtype else (rounded_mean, rounded_var, *vectors)

    def norm_gradients(
        self,
        sum_dz: Tensor,
        sum_dz_centred: Tensor,
        rstd: Tensor,
        scale: Tensor,
        count: int,
        training: bool,
        dtype: torch.dtype,
    ) -> NormGradients:
        if not _are_of_one_kind(sum_dz.dtype, dtype):
            return super().norm_gradients(sum_dz, sum_dz_centred, rstd, scale, count, training, dtype)
        found = self.ops.norm_gradients(sum_dz, sum_dz_centred, rstd, scale, count, training, dtype)
        return NormGradients(scale, *found)

    def update_running(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        var: Tensor,
        bias: Tensor | None,
        momentum: float,
        batches: Tensor | None,
        correction: float,
    ) -> None:
        vectors = [running_mean, running_var, *([] if bias is None else [bias])]
        fits = all(v.dtype == running_mean.dtype and v.is_contiguous() for v in vectors)
        if not (fits and _are_of_one_kind(mean.dtype, running_mean.dtype)):
            super().update_running(running_mean, running_var, mean, var, bias, momentum, batches, correction)
            return
        self.ops.update_running_(
            running_mean, running_var, *map(_contiguous, (mean, var)), bias, batches, momentum, correction
        )

    def through_covariance(
        self, weight: Tensor, mean: Tensor, cov: Tensor, unit: float, limit: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ops.through_covariance(*map(_contiguous, (weight, mean, cov)), unit, limit)

    def row_gradients(
        self,
        t: Tensor,
        weight: Tensor,
        moments: Tensor | None,
        sum_dz: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        count: int,
        norm_dtype: torch.dtype,
        weight_dtype: torch.dtype | None,
    ) -> RowGradients:
        given = _contiguous(t), _contiguous(weight), moments, sum_dz, mean, rstd, scale, count
        dtypes = {weight.dtype, acc_dtype(weight.dtype)}
        wanted = weight_dtype or weight.dtype
        if norm_dtype not in dtypes or wanted not in (weight.dtype, norm_dtype):
            return super().row_gradients(*given, norm_dtype, weight_dtype)
        *norm, mean_dz, scaled, dweight = self.ops.row_gradients(*given, norm_dtype, weight_dtype)
        return RowGradients(NormGradients(scale, *norm), None if weight_dtype is None else dweight, scaled, mean_dz)

    def fold(self, layers: Sequence[FrozenNorm], dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
        found: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        members = [i for i, layer in enumerate(layers) if _folds(layer, dtype)]
        if members:
            none = layers[0].weight.new_empty(0)
            *tensors, eps = zip(*(layers[i] for i in members))
            lists = [[none if t is None else t for t in each] for each in tensors]
            folded = self.ops.fold_batch_norms(*lists, list(eps), dtype)
            for i, *one in zip(members, *folded, strict=True):
                found[i] = tuple(one)
        return found

    def feedback(self, a: Operand, weight: Tensor, moments: Tensor, rows: RowGradients) -> Feedback:
        high, low, shift, mean_a = self.ops.coupling(
            _contiguous(weight), rows.norm.b, moments, _contiguous(rows.scaled), rows.mean_dz
        )
        parts = (low, shift) if weight.dtype in _HALF else (None, None)
        return Feedback(a, high, mean_a, rows.mean_dz, *parts)


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _folds(layer: FrozenNorm, dtype: torch.dtype) -> bool:
    """Whether the folding kernel takes these parameters: dense, of the dtype of the result or, for half precision, float32."""
    weight, *vectors, _ = layer
    given = weight.dtype
    narrows = given == torch.float32 and dtype in _HALF
    return (
        given in (torch.float64, torch.float32, *_HALF)
        and (given == dtype or narrows)
        and any(weight.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
        and all(v is None or (v.dtype == given and v.device == weight.device and v.is_contiguous()) for v in vectors)
    )


def _are_of_one_kind(acc: torch.dtype, parameters: torch.dtype) -> bool:
    """Whether norms with such parameters have kernels: float64 throughout, or none of it."""
    return (acc == torch.float64) == (parameters == torch.float64)


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


def cuda_kernels(own_conv3x3: bool = False) -> CudaKernels:
    """The backend on this machine: with Triton's products where Triton is, and Triton's 3×3 in place of cuDNN's if asked."""
    try:
        from .triton.dispatch import TritonKernels
    except Exception:  # whatever a broken Triton raises: `load_triton` tells
        return CudaConvolutionKernels()

    class CudaAndTritonKernels(CudaKernels, TritonKernels):
        pass

    return CudaAndTritonKernels(own_conv3x3)
