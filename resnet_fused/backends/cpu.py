"""The ``cpu`` backend: compiled kernels (csrc/cpu), each one pass over memory; convolutions by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .aten import AtenKernels
from .kernels import Conv

# Below this many rows oneDNN's bfloat16 weight gradient of a 1×1 convolution takes up to 1.4 times a matrix product's time
# (measured on two AVX-512 cores for every 1×1 convolution of ResNet-50 at batch 16); above it is as fast or faster.
_MATMUL_WGRAD_ROWS = 12544


def _rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` in channels_last as the matrix ``[N·H·W, C]``; a copy only of strided rows."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class CpuKernels(AtenKernels):
    """Kernels of the compiled library, ``torch.ops.resnet_fused``; available when ``native.is_loaded()``.

    float64, float32, bfloat16 and float16, channels_last and contiguous, any shape. Sums have the same bits for any
    number of threads. float16 and bfloat16 are computed in float32 and rounded once.
    """

    name = "cpu"

    def wgrad(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        rows = dy.shape[0] * dy.shape[2] * dy.shape[3]
        pointwise = weight.shape[2:] == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        if pointwise and dy.dtype == torch.bfloat16 and rows <= _MATMUL_WGRAD_ROWS:
            if conv.stride != (1, 1):
                x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
            return (_rows(dy).t() @ _rows(x))[:, :, None, None]
        return super().wgrad(dy, x, weight, conv)

    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.bn_stats(x)

    def bn_act(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.bn_act(x, scale, shift, residual, relu, save_mask)

    def bn_act_(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> None:
        torch.ops.resnet_fused.bn_act_(x, scale, shift, residual, relu)

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
        return torch.ops.resnet_fused.bn_act_backward_reduce(grad, x, mask, mean, scale, shift, relu, want_activation)

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
            torch.ops.resnet_fused.bn_act_backward_(grad, x, mask, mean, scale, shift, relu, *coefficients)
            return grad
        return torch.ops.resnet_fused.bn_act_backward(grad, x, mask, mean, scale, shift, relu, *coefficients)

    def add_relu(self, a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.add_relu(a, b, save_mask)

    def mask_grad(self, grad: Tensor, mask: Tensor) -> Tensor:
        return torch.ops.resnet_fused.mask_grad(grad, mask)

    def mask_grad_add_(self, acc: Tensor, grad: Tensor, mask: Tensor) -> None:
        torch.ops.resnet_fused.mask_grad_add_(acc, grad, mask)

    def bn_relu_maxpool(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.bn_relu_maxpool(x, scale, shift)

    def bn_relu_maxpool_backward_reduce(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.bn_relu_maxpool_backward_reduce(grad, index, x, mean)

    def bn_relu_maxpool_backward(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        return torch.ops.resnet_fused.bn_relu_maxpool_backward(grad, index, x, mean, *coefficients)
