"""Convolutions that a library gets as something else: 1×1 ones as products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .aten import AtenKernels, images, rows
from .operands import Conv, Gradient, Operand, filter_matrix, is_pointwise


class MatrixProducts(AtenKernels):
    """1×1 convolutions without stride or groups as products of matrices, which on a GPU are cuBLAS's, not cuDNN's.

    For activations in channels_last, whose rows are pixels and lie in memory as the product wants them.
    """

    @staticmethod
    def applies(x: Tensor, weight: Tensor, conv: Conv) -> bool:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return is_pointwise(weight, conv) and conv.stride == (1, 1) and channels_last

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        x = self.applied(x)
        if not self.applies(x, weight, conv):
            return super().fprop(x, weight, conv)
        return images(rows(x) @ filter_matrix(weight).t(), x)

    def input_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        if not self.applies(dy, weight, conv):
            return super().input_gradient(dy, x, weight, conv)
        return images(rows(dy) @ filter_matrix(weight), dy)

    def wgrad(self, dy: Gradient, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        dy, x = self.formed(dy), self.applied(x)
        if not (self.applies(x, weight, conv) and self.applies(dy, weight, conv)):
            return super().wgrad(dy, x, weight, conv)
        return (rows(dy).t() @ rows(x))[:, :, None, None]
