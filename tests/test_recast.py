"""Convolutions as other convolutions: in float64 the numbers of the convolution that they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.operands import Conv
from resnet_fused.backends.recast import MatrixProducts, SpaceToDepth, deep_filter, deep_image

STOCK = AtenKernels()


def values(*shape: int) -> Tensor:
    made = torch.randn(shape, dtype=torch.float64)
    return made.contiguous(memory_format=torch.channels_last)


def compare(kernels: AtenKernels, x: Tensor, weight: Tensor, conv: Conv) -> None:
    exact = STOCK.fprop(x, weight, conv)
    grad, residual = values(*exact.shape), values(*x.shape)
    pairs = [
        (kernels.fprop(x, weight, conv), exact),
        (kernels.dgrad(grad, x, weight, conv), STOCK.dgrad(grad, x, weight, conv)),
        (kernels.dgrad(grad, x, weight, conv, residual), STOCK.dgrad(grad, x, weight, conv, residual)),
        (kernels.wgrad(grad, x, weight, conv), STOCK.wgrad(grad, x, weight, conv)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert pairs[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("height, width", [(8, 6), (14, 10), (32, 2)])
def test_space_to_depth(size: int, channels: int, height: int, width: int) -> None:
    conv = Conv((2, 2), (size // 2, size // 2))
    x, weight = values(2, channels, height, width), values(8, channels, size, size)
    assert SpaceToDepth.applies(x, weight, conv)
    compare(SpaceToDepth(), x, weight, conv)
    assert deep_image(x, weight).shape[1] % 8 == 0 == deep_filter(weight).shape[1] % 8


OTHERS = {
    "stride 1": (values(2, 3, 8, 8), values(8, 3, 7, 7), Conv((1, 1), (3, 3))),
    "odd height": (values(2, 3, 9, 8), values(8, 3, 7, 7), Conv((2, 2), (3, 3))),
    "no padding": (values(2, 3, 8, 8), values(8, 3, 7, 7), Conv((2, 2), (0, 0))),
    "many channels": (values(2, 8, 8, 8), values(8, 8, 3, 3), Conv((2, 2), (1, 1))),
    "not square": (values(2, 3, 8, 8), values(8, 3, 3, 1), Conv((2, 2), (1, 0))),
    "dilation": (values(2, 3, 8, 8), values(8, 3, 3, 3), Conv((2, 2), (1, 1), (2, 2))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_such_form_is_convolved(name: str) -> None:
    assert not SpaceToDepth.applies(*OTHERS[name]) and not MatrixProducts.applies(*OTHERS[name])
    for kernels in (SpaceToDepth(), MatrixProducts()):
        compare(kernels, *OTHERS[name])


def test_products_of_matrices() -> None:
    x, weight = values(2, 6, 5, 4), values(8, 6, 1, 1)
    assert MatrixProducts.applies(x, weight, Conv())
    compare(MatrixProducts(), x, weight, Conv())
    assert not MatrixProducts.applies(x.contiguous(), weight, Conv())
    assert not MatrixProducts.applies(x, weight, Conv((2, 2)))
    assert not MatrixProducts.applies(x, weight[:, :3], Conv(groups=2))
