"""Operands of the 1×1 convolutions, as a kernel reads them and as if they had been stored, and how close a result must be."""

from __future__ import annotations

import itertools

import pytest
import torch
from poison import guarded

from resnet_fused.backends.aten import AtenKernels, pack_mask
from resnet_fused.backends.operands import Conv, Pending, PendingGrad

ATEN = AtenKernels()
NAN = float("nan")
ODD, ALIGNED, NARROW = (35, 40), (16, 32), (3, 17)  # input and output channels; 17 and 35: rows that end inside bytes
STRIDE = Conv((2, 2))


def name_of(value):
    return str(getattr(value, "stride", value)).removeprefix("torch.")


def flags(names, *axes):
    """Every combination of flags in float32 and in one of the half-precision dtypes, each with one of the three shapes.

    The kernels tell float32 from half precision, not bfloat16 from float16. These two and the shapes take turns, so that no
    value of a flag meets only one of them.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        combination, turn = [axis[i] for axis, i in zip(axes, places)], sum(places)
        half, widths = (torch.bfloat16, torch.float16)[turn % 2], (ODD, ALIGNED, NARROW)[turn % 3]
        cases += [(*combination, widths, dtype) for dtype in (torch.float32, half)]
    return pytest.mark.parametrize(f"{names}, widths, dtype", cases, ids=name_of)


# Every shape in float32 and in half precision.
every_shape = pytest.mark.parametrize(
    "widths, dtype",
    [
        (ODD, torch.float32),
        (ODD, torch.bfloat16),
        (ALIGNED, torch.float32),
        (ALIGNED, torch.float16),
        (NARROW, torch.float32),
        (NARROW, torch.bfloat16),
    ],
    ids=name_of,
)


def images(dtype, channels, size=(5, 9), n=1, mean=0.0):
    return guarded((torch.randn(n, channels, *size) + mean).to(dtype))


def vector(channels, low=0.5, high=1.5):
    return low + (high - low) * torch.rand(channels)


def filters(dtype, c, k):
    return (torch.randn(k, c, 1, 1) / c**0.5).to(dtype)


def pending(dtype, channels, relu=True, **kwargs):
    return Pending(images(dtype, channels, **kwargs), vector(channels), torch.randn(channels) * 0.3, relu)


def formed(a):
    """An operand as if it had been stored."""
    return ATEN.bn_act(a.y, a.scale, a.shift, None, a.relu, False)[0] if isinstance(a, Pending) else a


def formed_grad(dy):
    if not isinstance(dy, PendingGrad):
        return dy
    mean, a, b, c = (v.view(1, -1, 1, 1) for v in (dy.mean, dy.a, dy.b, dy.c))
    centred = torch.where(b == 0, 0.0, dy.y.float() - mean)
    dz = dy.dz if dy.mask is None else ATEN.mask_grad(dy.dz, dy.mask)
    return ((a * dz.float() + c) + centred * b).to(dz.dtype)  # in the kernels' order: it is rounded as theirs is


def operand(kind, dtype, channels, **kwargs):
    if kind == "plain":
        return images(dtype, channels, **kwargs)
    return pending(dtype, channels, kind == "relu", **kwargs)


def assert_as_accurate(ours, stock, gold, slack=2.0, ulps=4.0):
    """``error(ours) <= slack·error(stock) + ulps`` of the largest value, everywhere finite."""
    assert ours.shape == gold.shape
    assert ours.isfinite().all()

    def error(t):
        return (t.double() - gold).abs().max().item()

    unit = torch.finfo(stock.dtype).eps
    assert error(ours) <= slack * error(stock) + ulps * unit * gold.abs().max().item()


def assert_moments(mean, var, y):
    """Statistics of y as it is stored; half precision may round the means of tiles to float32."""
    rounding = 0.0 if y.dtype == torch.float32 else 2.0**-23
    y = y.double()
    deviation = y.var((0, 2, 3), unbiased=False).sqrt()
    exact = y.mean((0, 2, 3))
    assert ((mean - exact).abs() <= 4e-7 * (exact.abs() + deviation)).all()
    assert ((var - deviation**2).abs() <= 2e-6 * deviation**2 + rounding * exact.abs() * deviation).all()


def assert_sums(ours, gold_terms):
    """Sums over rows: the floor grows with the root of their number."""
    gold = gold_terms.double().sum((0, 2, 3))
    size = gold_terms.double().square().sum((0, 2, 3)).sqrt()
    assert ours.isfinite().all()
    assert ((ours - gold).abs() <= 1e-6 * size + 4e-7 * gold.abs()).all()


def pending_grad(dtype, channels, masked):
    """The first channels are frozen: nothing of their y may enter."""
    b = torch.randn(channels) * 0.2
    b[:2] = 0
    y = images(dtype, channels)
    y[:, :2] = NAN
    vectors = [torch.randn(channels) * 0.3 for _ in range(3)]
    dz = images(dtype, channels)
    mask = pack_mask(torch.randn_like(dz) > 0) if masked else None
    return PendingGrad(dz, y, vectors[0], vector(channels), b, vectors[2], mask)


def gradient(pending_kind, dtype, channels):
    return pending_grad(dtype, channels, pending_kind == "masked") if pending_kind else images(dtype, channels)
