"""Convolutions that a library gets as something else: 1×1 ones as products of matrices, the stem's as one of a deeper image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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


class SpaceToDepth(AtenKernels):
    """Convolutions with stride 2 of images as convolutions of a quarter of the pixels with four times the channels.

    A filter of 7×7 becomes one of 4×4: taps ``2u + v`` of the image are taps ``u`` of channel ``v``. The products are the same,
    and some with zero. Three channels, of which tensor cores can use little, become twelve.
    Traffic: reads x once and writes it once more, before the convolution.
    Source: MLPerf's ResNet-50 submissions, "space-to-depth" of conv0.
    """

    @staticmethod
    def applies(x: Tensor, weight: Tensor, conv: Conv) -> bool:
        """Whether a convolution has this form: square, odd, "same" padding, stride 2, few channels, even height and width."""
        _, c, r, s = weight.shape
        return (
            r == s
            and r % 2 == 1
            and c <= 4
            and conv == Conv((2, 2), (r // 2, r // 2))
            and x.shape[2] % 2 == 0
            and x.shape[3] % 2 == 0
        )

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        x = self.applied(x)
        if not self.applies(x, weight, conv):
            return super().fprop(x, weight, conv)
        return super().fprop(deep_image(x, weight), deep_filter(weight), Conv())

    def input_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        if not self.applies(x, weight, conv):
            return super().input_gradient(dy, x, weight, conv)
        height, width, before = x.shape[2] // 2, x.shape[3] // 2, _before(weight)
        deep = super().input_gradient(dy, deep_image(x, weight), deep_filter(weight), Conv())
        inner = deep[:, : 4 * x.shape[1], before : before + height, before : before + width]
        return F.pixel_shuffle(inner, 2)

    def wgrad(self, dy: Gradient, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        x = self.applied(x)
        if not self.applies(x, weight, conv):
            return super().wgrad(dy, x, weight, conv)
        deep = super().wgrad(dy, deep_image(x, weight), deep_filter(weight), Conv())
        return _shallow_filter(deep, weight)


def _before(weight: Tensor) -> int:
    """Rows of the deep image's padding above it; below it there are as many taps less."""
    return (weight.shape[2] // 2 + 1) // 2


def deep_image(x: Tensor, weight: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, 4 C, H/2, W/2]``, padded with zeros: outside as the filter needs it, and to eight channels."""
    n, c, h, w = x.shape
    taps, before = (weight.shape[2] + 1) // 2, _before(weight)
    shape = n, _deep_channels(c), h // 2 + taps - 1, w // 2 + taps - 1
    deep = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).zero_()
    inner = deep[:, : 4 * c, before : before + h // 2, before : before + w // 2]
    inner.copy_(F.pixel_unshuffle(x, 2))
    return deep


def _deep_channels(c: int) -> int:
    return -(-4 * c // 8) * 8


def deep_filter(weight: Tensor) -> Tensor:
    """The filter ``[K, C, R, R]`` as ``[K, 4 C, (R+1)/2, (R+1)/2]`` on the deep image, with zeros where a tap is none."""
    k, c, r, _ = weight.shape
    taps, first = (r + 1) // 2, _first(weight)
    wide = weight.new_zeros(k, c, 2 * taps, 2 * taps)
    wide[:, :, first : first + r, first : first + r] = weight
    deep = wide.view(k, c, taps, 2, taps, 2).permute(0, 1, 3, 5, 2, 4).reshape(k, 4 * c, taps, taps)
    padded = F.pad(deep, (0, 0, 0, 0, 0, _deep_channels(c) - 4 * c))
    return padded.contiguous(memory_format=torch.channels_last)


def _first(weight: Tensor) -> int:
    """Where the filter begins in its even extent: at an even tap relative to the output's pixel there is a zero before it."""
    return 2 * _before(weight) - weight.shape[2] // 2


def _shallow_filter(deep: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``deep_filter``, for a gradient."""
    k, c, r, _ = like.shape
    taps, first = (r + 1) // 2, _first(like)
    wide = deep[:, : 4 * c].reshape(k, c, 2, 2, taps, taps).permute(0, 1, 4, 2, 5, 3).reshape(k, c, 2 * taps, 2 * taps)
    return wide[:, :, first : first + r, first : first + r].contiguous(memory_format=torch.channels_last)
