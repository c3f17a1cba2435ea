"""What each kernel of the interface is in Triton, and what runs as on the ``aten`` backend instead.

Triton: float32, bfloat16 and float16 in channels_last, on NVIDIA GPUs, or on the processor in Triton's interpreter
(``TRITON_INTERPRET=1`` when this package is imported: slow, for tests). Strided and grouped 3×3 convolutions and the 7×7 are
PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..aten import AtenKernels
from ..operands import (
    Below,
    Conv,
    Feedback,
    Gradient,
    NormGrad,
    Operand,
    Pending,
    PendingGrad,
    Product,
    is_pointwise,
    source,
)
from . import bn, conv3x3, pool, tuning
from . import products as pointwise
from . import residual as residuals
from .flagged import recompute_statistics as recompute_flagged
from .launching import TF32_EPS, product_precision

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = 2**31 - 2**16  # rows are counted in 32 bits, up to a tile beyond the last; elements in 64


def takes(x: Tensor) -> bool:
    """Whether these kernels read ``x``: dtype, device (meta: see ``recorder``), layout, no more pixels than they can count."""
    return (
        x.dtype in _DTYPES
        and (x.is_cuda or x.is_meta or tuning.INTERPRETED)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() <= _MOST_PIXELS * x.shape[1]
    )


def _rounds_products(x: Tensor) -> bool:
    """Whether convolutions of ``x``, stock's too, multiply what has less than float32's precision."""
    return x.dtype in (torch.bfloat16, torch.float16) or product_precision(x, exact=False) == "tf32"


def _launched(module: ModuleType, name: str) -> Any:
    """The method that calls the launcher of that name; for an activation, its first argument, that the kernels do not read,
    the one of the ``aten`` backend."""
    stand_in = getattr(AtenKernels, name)

    @functools.wraps(stand_in)
    def method(self: TritonKernels, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(x, *args, **kwargs) if takes(x) else stand_in(self, x, *args, **kwargs)

    return method


class TritonPasses(AtenKernels):
    """Batch norm with its activation, residual additions and the stem's pooling in Triton; convolutions are cuDNN's."""

    name = "triton"

    bn_stats = _launched(bn, "bn_stats")
    bn_act = _launched(bn, "bn_act")
    bn_act_ = _launched(bn, "bn_act_")
    bn_act_backward_reduce = _launched(bn, "bn_act_backward_reduce")
    bn_act_backward = _launched(bn, "bn_act_backward")
    add_relu = _launched(residuals, "add_relu")
    mask_grad = _launched(residuals, "mask_grad")
    mask_grad_add_ = _launched(residuals, "mask_grad_add_")
    bn_relu_maxpool = _launched(pool, "bn_relu_maxpool")
    bn_relu_maxpool_backward_reduce = _launched(pool, "bn_relu_maxpool_backward_reduce")
    bn_relu_maxpool_backward = _launched(pool, "bn_relu_maxpool_backward")


class TritonKernels(TritonPasses):
    """Kernels in Triton. Sums have the same bits on every run.

    Args:
        own_conv3x3: 3×3 convolutions without stride by ``conv3x3``, which read pending activations, in place of cuDNN's.
    """

    def __init__(self, own_conv3x3: bool) -> None:
        self.own_conv3x3 = own_conv3x3

    def operand(self, y: Tensor, scale: Tensor, shift: Tensor, relu: bool, keep_y: bool) -> Operand:
        if takes(y):
            return Pending(y, scale, shift, relu)
        return super().operand(y, scale, shift, relu, keep_y)

    def _is_own_conv3x3(self, x: Tensor, weight: Tensor, conv: Conv) -> bool:
        return self.own_conv3x3 and takes(x) and conv3x3.supports(x, weight, conv)

    # Convolutions

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if takes(source(x)) and is_pointwise(weight, conv):
            return pointwise.fprop(x, weight, conv, stats=False)[0]
        if self._is_own_conv3x3(source(x), weight, conv):
            return conv3x3.fprop(x, weight, stats=False)[0]
        return super().fprop(x, weight, conv)

    def fprop_stats(self, x: Operand, weight: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Any, ...] | None = None
        if takes(source(x)) and is_pointwise(weight, conv):
            found = pointwise.fprop(x, weight, conv, stats=True)
        elif self._is_own_conv3x3(source(x), weight, conv):
            found = conv3x3.fprop(x, weight, stats=True)
        return found or super().fprop_stats(x, weight, conv)

    def _dgrad(
        self,
        dy: Gradient,
        like: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        below: Below | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """dx or dz, and with ``below`` its sums; None where these kernels do not do it."""
        if takes(source(dy)) and takes(like) and is_pointwise(weight, conv) and conv.stride == (1, 1):
            return pointwise.dgrad(dy, weight, conv, like.shape, residual, mask, below)
        if takes(source(dy)) and self._is_own_conv3x3(like, weight, conv) and residual is None:
            return conv3x3.dgrad(dy, weight, below)
        return None

    def dgrad(
        self,
        dy: Gradient,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        found = self._dgrad(dy, x, weight, conv, residual, mask)
        return found[0] if found is not None else super().dgrad(dy, x, weight, conv, residual, mask)

    def dgrad_below(self, dy: Gradient, weight: Tensor, conv: Conv, below: Below, want_activation: bool) -> NormGrad:
        found = self._dgrad(dy, below.y, weight, conv, below=below)
        if found is None:
            return super().dgrad_below(dy, weight, conv, below, want_activation)
        activation = Pending(below.y, below.scale, below.shift, below.relu) if want_activation else None
        return NormGrad(found[0], None, False, *found[1:], activation)

    def wgrad(self, dy: Gradient, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if takes(source(dy)) and takes(source(x)) and is_pointwise(weight, conv):
            return pointwise.wgrad(dy, x, conv)[:, :, None, None]
        like = weight if weight.dtype == source(dy).dtype else torch.empty_like(weight, dtype=source(dy).dtype)
        if takes(source(dy)) and self._is_own_conv3x3(source(x), like, conv):
            return conv3x3.wgrad(dy, x)
        return super().wgrad(dy, x, weight, conv)

    def gradient(
        self,
        found: NormGrad,
        below: Below,
        coefficients: tuple[Tensor, Tensor, Tensor],
        weight: Tensor | None,
        conv: Conv | None,
        inplace: bool,
    ) -> Gradient:
        if self._read_pending(found, below, weight, conv):
            return PendingGrad(found.grad, below.y, below.mean, *coefficients, found.mask)
        return super().gradient(found, below, coefficients, weight, conv, inplace)

    def _read_pending(self, found: NormGrad, below: Below, weight: Tensor | None, conv: Conv | None) -> bool:
        """Whether both backward products of the convolution form what reaches its raw output: it passes no ReLU but by mask."""
        if weight is None or conv is None or not (takes(found.grad) and takes(below.y)):
            return False
        if found.mask is None and found.relu:
            return False
        if is_pointwise(weight, conv):
            return conv.stride == (1, 1)
        backwards = weight.transpose(0, 1)  # from the output's channels to the input's
        return self.own_conv3x3 and found.mask is None and conv3x3.supports(below.y, backwards, conv)

    # The covariance plan

    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        # Products that are not rounded need sums in float64; those of matrices have units of their own on server GPUs.
        if takes(source(a)) and _rounds_products(source(a)):
            return pointwise.gram(a, conv)
        return super().gram(a, conv)

    def gram_unit(self, x: Tensor) -> float:
        # Tensor cores truncate what they add, by up to two bits of float32; three products of TF32 for one lose as much.
        return 2.0**-22 if _rounds_products(x) else 2.0**-53

    def operand_eps(self, x: Tensor) -> float:
        return TF32_EPS if product_precision(x, exact=False) == "tf32" else super().operand_eps(x)

    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        recompute = recompute_flagged if takes(source(a)) else super().recompute_statistics
        return recompute(a, weight, conv, flagged, mean, var)

    def reads_back(self, dtype: torch.dtype) -> bool:
        return dtype not in _DTYPES

    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        if all(takes(source(product.a)) for product in products):
            return pointwise.fprop_bn_act(products, shift, residual, relu, save_mask)
        return super().fprop_bn_act(products, shift, residual, relu, save_mask)

    def dgrad_bn_act(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        acc: Tensor | None = None,
    ) -> Tensor:
        if takes(grad):
            return pointwise.dgrad_bn_act(grad, mask, weight, conv, feedback, acc)[0]
        return super().dgrad_bn_act(grad, mask, weight, conv, feedback, acc)

    def dgrad_bn_act_below(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        below: Below,
        acc: Tensor | None = None,
    ) -> NormGrad:
        if acc is not None or not (takes(grad) and takes(below.y)):
            return super().dgrad_bn_act_below(grad, mask, weight, conv, feedback, below, acc)
        found = pointwise.dgrad_bn_act(grad, mask, weight, conv, feedback, below=below)
        return NormGrad(found[0], None, False, *found[1:])

    def wgrad_bn_act(
        self, grad: Tensor, mask: Tensor | None, operands: Sequence[tuple[Operand, Tensor | None, Conv]]
    ) -> tuple[list[Tensor], Tensor]:
        if takes(grad) and all(takes(source(a)) for a, _, _ in operands):
            return pointwise.wgrad_bn_act(grad, mask, operands)
        return super().wgrad_bn_act(grad, mask, operands)
