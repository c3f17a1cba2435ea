"""The ``cpu`` backend: compiled kernels (csrc/cpu), each one pass over memory; 3×3 and 7×7 convolutions by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import LibraryKernels
from .operands import Conv, Feedback, Operand, Product, acc_dtype, filter_matrix, is_pointwise


class CpuKernels(LibraryKernels):
    """Kernels of the compiled library for processors; available when ``native.is_loaded()``.

    Sums have the same bits for any number of threads.

    1×1 convolutions are this library's own products, not oneDNN's: oneDNN's ReLU turns NaN into 0, its weight gradient is
    rounded to bfloat16 before anything can be subtracted from it, and it cannot mask or centre a gradient while loading it.
    """

    name = "cpu"

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        if not is_pointwise(weight, conv):
            return super().fprop(x, weight, conv)
        return _pointwise(x, None, None, filter_matrix(weight), conv)[0]

    def dgrad(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if not is_pointwise(weight, conv) or conv.stride != (1, 1):
            return super().dgrad(dy, x, weight, conv, residual, mask)
        matrix = filter_matrix(weight).t()
        return _pointwise(dy, None, None, matrix, conv, residual=residual, residual_mask=mask)[0]

    def wgrad(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        if not is_pointwise(weight, conv):
            return super().wgrad(dy, x, weight, conv)
        return torch.ops.resnet_fused.pointwise_wgrad(dy, None, x, None, conv.stride)[0][:, :, None, None]

    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        return torch.ops.resnet_fused.gram(a, conv.stride)

    def gram_unit(self, x: Tensor) -> float:
        return 2.0**-24 if x.dtype in (torch.bfloat16, torch.float16) else 2.0**-53

    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        first, second = (*products, None)[:2]
        return _pointwise(
            first.a,
            None,
            None,
            filter_matrix(first.weight),
            first.conv,
            scale=first.scale,
            second=second and (second.a, None, filter_matrix(second.weight), second.conv, second.scale),
            shift=shift,
            residual=residual,
            relu=relu,
            save_mask=save_mask,
        )

    def dgrad_bn_act(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        acc: Tensor | None = None,
    ) -> Tensor:
        a: Operand | None = None
        coupling = low = mean_dz = mean_a = shift = None
        if feedback is not None:
            a, coupling, shift = feedback.a, feedback.coupling.t(), feedback.shift
            if feedback.low is None:
                mean_dz, mean_a = feedback.mean_dz, feedback.mean_a
            else:
                low = feedback.low.t()
        if acc is None:
            second = None if a is None or coupling is None else (a, mean_a, coupling, conv, None)
            return _pointwise(grad, mask, mean_dz, weight.t(), Conv(), second=second, low=low, shift=shift)[0]
        torch.ops.resnet_fused.pointwise_add_(
            acc, grad, mask, weight.t(), a, coupling, conv.stride, shift, mean_dz, mean_a, low
        )
        return acc

    def wgrad_bn_act(
        self, grad: Tensor, mask: Tensor | None, operands: Sequence[tuple[Operand, Tensor | None, Conv]]
    ) -> tuple[list[Tensor], Tensor]:
        found = [
            torch.ops.resnet_fused.pointwise_wgrad(
                grad, mask, a, None if centre is None else centre.to(acc_dtype(grad.dtype)), conv.stride
            )
            for a, centre, conv in operands
        ]
        return [t for t, _ in found], found[0][1]


def _pointwise(
    x: Operand,
    mask: Tensor | None,
    centre: Tensor | None,
    weight: Tensor,
    conv: Conv,
    *,
    scale: Tensor | None = None,
    second: tuple[Operand, Tensor | None, Tensor, Conv, Tensor | None] | None = None,
    low: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    relu: bool = False,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    x2, centre2, weight2, conv2, scale2 = second or (None, None, None, conv, None)
    return torch.ops.resnet_fused.pointwise(
        x,
        mask,
        weight,
        conv.stride,
        scale,
        x2,
        weight2,
        conv2.stride,
        scale2,
        shift,
        residual,
        residual_mask,
        relu,
        save_mask,
        centre,
        centre2,
        low,
    )
