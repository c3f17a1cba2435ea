"""Passes over activations by the compiled libraries: batch norm, residual additions and the stem's pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .aten import AtenKernels


class LibraryKernels(AtenKernels):
    """Operators of ``torch.ops.resnet_fused`` (csrc/ops.cpp), each one pass over memory; convolutions are PyTorch's.

    float64, float32, bfloat16 and float16, channels_last and contiguous, any shape. Sums have the same bits on every run.
    float16 and bfloat16 are computed in float32 and rounded once.
    """

    ops: Any = torch.ops.resnet_fused

    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.bn_stats(x)

    def bn_act(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        return self.ops.bn_act(x, scale, shift, residual, relu, save_mask)

    def bn_act_(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> None:
        self.ops.bn_act_(x, scale, shift, residual, relu)

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
        return self.ops.bn_act_backward_reduce(grad, x, mask, mean, scale, shift, relu, want_activation)

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
        if inplace:
            self.ops.bn_act_backward_(grad, x, mask, mean, scale, shift, relu, *coefficients)
            return grad
        return self.ops.bn_act_backward(grad, x, mask, mean, scale, shift, relu, *coefficients)

    def add_relu(self, a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
        return self.ops.add_relu(a, b, save_mask)

    def mask_grad(self, grad: Tensor, mask: Tensor) -> Tensor:
        return self.ops.mask_grad(grad, mask)

    def mask_grad_add_(self, acc: Tensor, grad: Tensor, mask: Tensor) -> None:
        self.ops.mask_grad_add_(acc, grad, mask)

    def bn_relu_maxpool(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.bn_relu_maxpool(x, scale, shift)

    def bn_relu_maxpool_backward_reduce(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.ops.bn_relu_maxpool_backward_reduce(grad, index, x, mean)

    def bn_relu_maxpool_backward(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        return self.ops.bn_relu_maxpool_backward(grad, index, x, mean, *coefficients)
