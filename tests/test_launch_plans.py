"""The CUDA launchers' grids as ``_C`` tells them."""

from __future__ import annotations

import math

import pytest

_C = pytest.importorskip("resnet_fused._C", reason="the host functions were not compiled")

RESIDENT = 4 * 132  # blocks of an H200


@pytest.mark.parametrize("shape", [(256, 64, 112, 112), (256, 2048, 7, 7), (3, 17, 5, 9), (1, 1, 1, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_pass(shape, channels_last):
    _, c, h, w = shape
    count = math.prod(shape)
    plan = _C.plan_pass(count, 1 if channels_last else h * w, c, 2, 3, 1, RESIDENT)
    assert plan["bytes"] == 3 * 2 * count + -(-count // 8)
    assert plan["block"] == 256 and 1 <= plan["grid"][0] <= RESIDENT and plan["grid"][1] == 1
    assert plan["vector"] == (8 if channels_last and c % 8 == 0 else 1)


@pytest.mark.parametrize("channels, splits", [(64, 1024), (256, 1024), (2048, 128)])
def test_sums(channels, splits):
    plan = _C.plan_sums(256, 56 * 56, channels, True, 2, 2, 2)
    tiles, found = plan["grid"]
    assert tiles * 256 >= channels and found == splits
    elements, partials = 256 * 56 * 56 * channels, found * channels * 2 * 4
    assert plan["bytes"] == 2 * 2 * elements + 2 * partials
    assert plan["vector"] == 8 and 0 < plan["shared_bytes"] <= 48 << 10


@pytest.mark.parametrize(
    "shape, tile",
    [
        ((256, 56, 56, 64, 256, 1, 1), (128, 128)),
        ((256, 56, 56, 64, 64, 3, 1), (128, 64)),
        ((256, 7, 7, 512, 512, 3, 1), (128, 128)),
        ((8, 14, 14, 256, 256, 3, 2), (64, 64)),
    ],
)
def test_a_convolution(shape, tile):
    n, h, w, c, k, size, stride = shape
    plan = _C.plan_convolution(*shape)
    assert plan["tile"] == tile
    rows = n * -(-h // stride) * -(-w // stride)
    assert plan["grid"] == (-(-rows // tile[0]) * -(-k // tile[1]), 1)
    assert plan["bytes"] == 2 * (n * h * w * c + k * size**2 * c + rows * k)
    assert plan["shared_bytes"] == 3 * sum(tile) * 64
    assert plan["block"] == (256 if tile == (128, 128) else 128)
