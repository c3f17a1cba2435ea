"""The ``triton`` backend: 1×1 convolutions with every fusion of the plans, the batch-norm family, the stem's pooling.

float32, bfloat16 and float16 in channels_last, on NVIDIA GPUs, or on the processor in Triton's interpreter
(``TRITON_INTERPRET=1`` when this package is imported: slow, for tests). Everything else runs as on the ``aten`` backend, and
so do strided and grouped 3×3 convolutions and the 7×7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..aten import AtenKernels
from ..kernels import Conv, Feedback, Operand, Pending, Product
from . import bn, conv3x3, pool, tuning
from . import products as pointwise
from . import residual as residuals
from .operands import source

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    """Whether these kernels read ``x``: dtype, layout and device."""
    return (
        x.dtype in _DTYPES and (x.is_cuda or tuning.INTERPRETED) and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_pointwise(weight: Tensor, conv: Conv) -> bool:
    return weight.shape[2:] == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class TritonKernels(AtenKernels):
    """Kernels in Triton. Sums have the same bits on every run.

    Args:
        own_conv3x3: 3×3 convolutions without stride by ``conv3x3``, which read pending activations, in place of cuDNN's.
    """

    name = "triton"

    def __init__(self, own_conv3x3: bool) -> None:
        self.own_conv3x3 = own_conv3x3

    def operand(self, y: Tensor, scale: Tensor, shift: Tensor, relu: bool, keep_y: bool) -> Operand:
        if takes(y):
            return Pending(y, scale, shift, relu)
        return super().operand(y, scale, shift, relu, keep_y)

    def _applied(self, a: Operand) -> Tensor:
        """For kernels that cannot apply an activation while loading."""
        return self.bn_act(a.y, a.scale, a.shift, None, a.relu, False)[0] if isinstance(a, Pending) else a

    def _is_own_conv3x3(self, x: Tensor, weight: Tensor, conv: Conv) -> bool:
        return self.own_conv3x3 and takes(x) and conv3x3.supports(x, weight, conv)

    # Convolutions

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if takes(source(x)) and _is_pointwise(weight, conv):
            return pointwise.fprop(x, weight, conv, stats=False)[0]
        if self._is_own_conv3x3(source(x), weight, conv):
            return conv3x3.fprop(x, weight, stats=False)[0]
        return super().fprop(self._applied(x), weight, conv)

    def fprop_stats(self, x: Operand, weight: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Any, ...] | None = None
        if takes(source(x)) and _is_pointwise(weight, conv):
            found = pointwise.fprop(x, weight, conv, stats=True)
        elif self._is_own_conv3x3(source(x), weight, conv):
            found = conv3x3.fprop(x, weight, stats=True)
        return found or super().fprop_stats(x, weight, conv)

    def dgrad(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if takes(dy) and _is_pointwise(weight, conv) and conv.stride == (1, 1):
            return pointwise.dgrad(dy, weight, conv, x.shape, residual, mask)[0]
        if residual is None and takes(dy) and self._is_own_conv3x3(x, weight, conv):
            return conv3x3.dgrad(dy, weight)[0]
        return super().dgrad(dy, x, weight, conv, residual, mask)

    def wgrad(self, dy: Tensor, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if takes(dy) and takes(source(x)) and _is_pointwise(weight, conv):
            return pointwise.wgrad(dy, x, conv)[:, :, None, None]
        like = weight if weight.dtype == dy.dtype else torch.empty_like(weight, dtype=dy.dtype)
        if takes(dy) and self._is_own_conv3x3(source(x), like, conv):
            return conv3x3.wgrad(dy, x)
        return super().wgrad(dy, self._applied(x), weight, conv)

    # The covariance plan

    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        # float32 needs sums in float64 (gram_unit): products of matrices in float64 have units of their own on server GPUs.
        if takes(source(a)) and source(a).dtype != torch.float32:
            return pointwise.gram(a, conv)
        return super().gram(self._applied(a), conv)

    def gram_unit(self, dtype: torch.dtype) -> float:
        # Tensor cores truncate what they add, by up to two bits of float32.
        return 2.0**-22 if dtype in (torch.bfloat16, torch.float16) else 2.0**-53

    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not bool(flagged.any()):
            return mean, var
        return super().recompute_statistics(self._applied(a), weight, conv, flagged, mean, var)

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

    def wgrad_bn_act(
        self, grad: Tensor, mask: Tensor | None, operands: Sequence[tuple[Operand, Tensor | None, Conv]]
    ) -> tuple[list[Tensor], Tensor]:
        if takes(grad) and all(takes(source(a)) for a, _, _ in operands):
            return pointwise.wgrad_bn_act(grad, mask, operands)
        return super().wgrad_bn_act(grad, mask, operands)

    # Batch norm with its activation, residual additions, the stem's pooling

    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return bn.bn_stats(x) if takes(x) else super().bn_stats(x)

    def bn_act(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        return (bn if takes(x) else super()).bn_act(x, scale, shift, residual, relu, save_mask)

    def bn_act_(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> None:
        (bn if takes(x) else super()).bn_act_(x, scale, shift, residual, relu)

    def bn_act_backward_reduce(
        self,
        grad: Tensor,
        x: Tensor,
        mask: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        relu: bool,
        want_activation: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        family = bn if takes(x) else super()
        return family.bn_act_backward_reduce(grad, x, mask, mean, scale, shift, relu, want_activation)

    def bn_act_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mask: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        relu: bool,
        coefficients: tuple[Tensor, Tensor, Tensor],
        inplace: bool = False,
    ) -> Tensor:
        family = bn if takes(x) else super()
        return family.bn_act_backward(grad, x, mask, mean, scale, shift, relu, coefficients, inplace)

    def add_relu(self, a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
        return (residuals if takes(a) else super()).add_relu(a, b, save_mask)

    def mask_grad(self, grad: Tensor, mask: Tensor) -> Tensor:
        return (residuals if takes(grad) else super()).mask_grad(grad, mask)

    def mask_grad_add_(self, acc: Tensor, grad: Tensor, mask: Tensor) -> None:
        (residuals if takes(acc) else super()).mask_grad_add_(acc, grad, mask)

    def bn_relu_maxpool(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return (pool if takes(x) else super()).bn_relu_maxpool(x, scale, shift)

    def bn_relu_maxpool_backward_reduce(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (pool if takes(x) else super()).bn_relu_maxpool_backward_reduce(grad, index, x, mean)

    def bn_relu_maxpool_backward(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        return (pool if takes(x) else super()).bn_relu_maxpool_backward(grad, index, x, mean, coefficients)
