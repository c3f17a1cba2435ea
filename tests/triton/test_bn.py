"""Batch norm and residual additions in Triton against float64, beside stock PyTorch in the same dtype."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cpu_cases import Case
from poison import guarded, poison_allocations

from resnet_fused.backends.aten import AtenKernels, pack_mask, unpack_mask
from resnet_fused.backends.triton import bn, merging, pool, residual
from resnet_fused.backends.triton.configs import Config
from resnet_fused.testing import assert_as_accurate

pytestmark = pytest.mark.one_in(10)

stock = AtenKernels()
# M = 15, 70, 143, 63, 50: less than a tile, and tiles that end behind the last row.
SHAPES = [(1, 3, 3, 5), (2, 8, 5, 7), (1, 17, 11, 13), (1, 35, 7, 9), (2, 64, 5, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
TILE = Config(32, 32, 1, 4, 1)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_allocations(monkeypatch, 255)


def make(shape, dtype, mean=0.0):
    case = Case(shape, dtype, mean=mean)
    case.x, case.residual, case.grad = guarded(case.x), guarded(case.residual), guarded(case.grad)
    return case


def check(name, ours, plain, gold, rows=1, scale=0.0):
    ours, plain, gold = (t if isinstance(t, tuple) else (t,) for t in (ours, plain, gold))
    for i, (one, other, reference) in enumerate(zip(ours, plain, gold, strict=True)):
        # Sums of terms of either sign may come out at about 0: the size of the terms gives the scale.
        size = scale or float(one.dim() == 1)
        assert_as_accurate(one, other, reference, rows=rows, name=f"{name}[{i}]", scale=size)


# Statistics


@shapes
def test_statistics(shape, dtype, monkeypatch):
    case = make(shape, dtype)
    for programs in (512, 1):  # a tile for each program; one program for all tiles
        monkeypatch.setattr(bn, "PROGRAMS", programs)
        ours = bn.bn_stats(case.x, config=Config(16, 32, 1, 4, 1))
        check("bn_stats", ours, stock.bn_stats(case.x), stock.bn_stats(case.x.double()))


@pytest.mark.parametrize("programs", [512, 40, 1])
def test_statistics_when_the_mean_is_a_thousand_deviations(programs, monkeypatch):
    monkeypatch.setattr(bn, "PROGRAMS", programs)
    x = make((2, 8, 29, 31), torch.float32, mean=1000.0).x
    mean, var = bn.bn_stats(x, config=TILE)
    gold_var, gold_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean.double(), gold_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), gold_var, rtol=1e-6, atol=0)


def test_statistics_when_the_first_tile_is_unlike_the_others(monkeypatch):
    """Sums are taken about the first tile's mean; the bound on what that costs is a few units per tile, not the square of
    the mean over the deviation."""
    monkeypatch.setattr(bn, "PROGRAMS", 1)
    x = make((1, 8, 40, 40), torch.float32, mean=1000.0).x
    x[:, :, 0, :32] = 0
    var = bn.bn_stats(x, config=TILE)[1].double()
    gold = torch.var(x.double(), (0, 2, 3), unbiased=False)
    torch.testing.assert_close(var, gold, rtol=50 * 2.0**-23, atol=0)


def test_statistics_of_a_constant(dtype):
    x = guarded(torch.full((2, 8, 9, 7), 3.3).to(dtype))
    mean, var = bn.bn_stats(x, config=TILE)
    torch.testing.assert_close(mean, torch.full((8,), float(x[0, 0, 0, 0])), rtol=1e-6, atol=0)
    assert (var >= 0).all()
    assert (var <= 1e-12).all()


@pytest.mark.parametrize("tiles", [1, 3, 130, 600])
def test_merging(tiles):
    """Also in several passes, with fewer rows in the last tile, from float32 and float64."""
    c, rows, last = 5, 3, 2
    m = (tiles - 1) * rows + last
    x = torch.randn(m, c, dtype=torch.float64) + 100
    parts = x.split(rows)
    moments = torch.stack([torch.stack([p.mean(0), (p - p.mean(0)).square().sum(0)]) for p in parts])
    mean, var = merging.merge_moments(moments, m, rows)
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.var(0, unbiased=False), rtol=1e-7, atol=0)
    var = merging.merge_moments(moments.float(), m, rows)[1]
    torch.testing.assert_close(var.double(), x.var(0, unbiased=False), rtol=1e-4, atol=0)
    sums = merging.merge_sums(moments)
    torch.testing.assert_close(sums.double(), moments.sum(0), rtol=1e-7, atol=0)


# Forward


@pytest.mark.parametrize("save_mask", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@shapes
def test_bn_act(shape, dtype, with_residual, relu, save_mask):
    case = make(shape, dtype)

    def run(kernels, case, relu=relu, **options):
        added = case.residual if with_residual else None
        return kernels.bn_act(case.x, case.scale, case.shift, added, relu, save_mask, **options)

    out, mask = run(bn, case, config=TILE)
    gold, gold_mask = run(stock, case.double())
    check("bn_act", out, run(stock, case)[0], gold)
    assert out.stride() == case.x.stride()
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_empty(0))
    if save_mask:  # away from the kink, where no rounding decides
        clear = run(stock, case.double(), relu=False)[0].abs() > 1e-2
        assert torch.equal(unpack_mask(mask, out)[clear], unpack_mask(gold_mask, out)[clear])
    before = case.x.clone()
    bn.bn_act_(case.x, case.scale, case.shift, case.residual if with_residual else None, relu, config=TILE)
    assert torch.equal(case.x, out)
    assert not torch.equal(case.x, before)


def test_the_mask_is_that_of_the_value_as_stored():
    """What underflows to 0 in float16 stops the gradient, in the mask and where it is formed again."""
    case = make((1, 8, 4, 8), torch.float16)
    case.x.abs_().add_(1)
    scale, shift = torch.full((8,), 1e-9), torch.zeros(8)
    out, mask = bn.bn_act(case.x, scale, shift, None, True, True, config=TILE)
    assert (out == 0).all()
    assert (mask == 0).all()
    arguments = case.mean, scale, shift, True
    for given in (mask, None):
        sums = bn.bn_act_backward_reduce(case.grad, case.x, given, *arguments, False, config=TILE)
        assert not sums[0].any()


# Backward


@pytest.mark.parametrize("gate", ["mask", "recompute", "open"])
@shapes
def test_bn_act_backward(shape, dtype, gate, monkeypatch):
    case = make(shape, dtype)
    relu = gate != "open"
    out, mask = bn.bn_act(case.x, case.scale, case.shift, None, relu, True, config=TILE)
    # The reference takes the mask that the forward made in this dtype: a rounding at 0 must not count as an error.
    given, ours_given = mask if relu else None, mask if gate == "mask" else None

    def arguments(case, mask):
        return case.grad, case.x, mask, case.mean, case.scale, case.shift, relu

    plain = stock.bn_act_backward_reduce(*arguments(case, given), True)
    gold = stock.bn_act_backward_reduce(*arguments(case.double(), given), True)
    for programs in (512, 1):
        monkeypatch.setattr(bn, "PROGRAMS", programs)
        ours = bn.bn_act_backward_reduce(*arguments(case, ours_given), programs == 1, config=TILE)
        check("sums", ours[:2], plain[:2], gold[:2], rows=case.rows)
        assert torch.equal(ours[2], out) if programs == 1 else ours[2].numel() == 0

    dx = bn.bn_act_backward(*arguments(case, ours_given), case.coefficients, config=TILE)
    plain = stock.bn_act_backward(*arguments(case, given), case.coefficients)
    gold = stock.bn_act_backward(*arguments(case.double(), given), case.double().coefficients)
    check("dx", dx, plain, gold)
    written_over = bn.bn_act_backward(*arguments(case, ours_given), case.coefficients, inplace=True, config=TILE)
    assert written_over is case.grad
    assert torch.equal(written_over, dx)


# Residual additions


@shapes
def test_residual_additions(shape, dtype):
    case = make(shape, dtype)
    case.residual[0, 0] = -case.x[0, 0]  # sums of exactly 0
    out, mask = residual.add_relu(case.x, case.residual, True, config=TILE)
    plain, plain_mask = stock.add_relu(case.x, case.residual, True)
    assert torch.equal(out, plain)
    assert torch.equal(mask, plain_mask)
    without, none = residual.add_relu(case.x, case.residual, False, config=TILE)
    assert torch.equal(without, out)
    assert none.numel() == 0
    assert torch.equal(residual.pack_mask(out, config=TILE), mask)
    assert torch.equal(residual.mask_grad(case.grad, mask, config=TILE), stock.mask_grad(case.grad, mask))
    expected = case.residual.clone()
    stock.mask_grad_add_(expected, case.grad, mask)
    residual.mask_grad_add_(case.residual, case.grad, mask, config=TILE)
    assert torch.equal(case.residual, expected)


# What must hold for all


@pytest.mark.parametrize("channels", [8, 35])
def test_nan_and_inf_stay_in_their_channels(channels, dtype):
    case = make((1, channels, 9, 7), dtype)
    planted = {1: math.nan, 4: math.inf, 6: -math.inf}
    for channel, value in planted.items():
        case.x[0, channel, 4, 3] = value
    healthy = torch.tensor([c not in planted for c in range(channels)])
    for one, other in zip(bn.bn_stats(case.x, config=TILE), stock.bn_stats(case.x), strict=True):
        torch.testing.assert_close(one[healthy], other[healthy], rtol=1e-5, atol=1e-5)
    assert not one[~healthy].isfinite().any()
    out, mask = bn.bn_act(case.x, case.scale, case.shift, case.residual, True, True, config=TILE)
    expected = stock.bn_act(case.x, case.scale, case.shift, case.residual, True, False)[0]
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0.02, atol=0.02)
    assert out[0, 1, 4, 3].isnan()
    assert torch.equal(mask, pack_mask(~(out <= 0)))
    assert unpack_mask(mask, out)[0, 1, 4, 3]  # stock passes the gradient at NaN

    case.grad[0, 2, 0, 0] = math.nan
    for given, relu in ((mask, True), (None, True), (None, False)):
        arguments = case.grad, case.x, given, case.mean, case.scale, case.shift, relu
        ours = bn.bn_act_backward_reduce(*arguments, False, config=TILE)
        plain = stock.bn_act_backward_reduce(*arguments, False)
        for one, other in zip(ours[:2], plain[:2], strict=True):
            assert torch.equal(one.isnan(), other.isnan())
        # Frozen statistics: b = 0, and what x holds does not matter.
        frozen = case.a, case.b * 0, case.c * 0
        for coefficients in (case.coefficients, frozen):
            dx = bn.bn_act_backward(*arguments, coefficients, config=TILE)
            plain_dx = stock.bn_act_backward(*arguments, coefficients)
            assert torch.equal(dx.isnan(), plain_dx.isnan())
    total, added = residual.add_relu(case.x, case.residual, True, config=TILE)
    plain, plain_mask = stock.add_relu(case.x, case.residual, True)
    torch.testing.assert_close(total, plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(added, plain_mask)
    shut = torch.zeros_like(added)
    assert not residual.mask_grad(torch.full_like(case.x, math.nan), shut, config=TILE).any()


def test_no_kernel_takes_a_maximum_of_values():
    """On a GPU it turns NaN into the other operand; the interpreter's keeps NaN, so no test there would see it."""
    for module in (bn, merging, pool, residual):
        assert "tl.maximum" not in inspect.getsource(module)
        assert "tl.max(" not in inspect.getsource(module)


def everything(case):
    x, grad, scale, shift, mean = case.x, case.grad, case.scale, case.shift, case.mean
    results = [*bn.bn_stats(x, config=TILE)]
    out, mask = bn.bn_act(x, scale, shift, case.residual, True, True, config=TILE)
    results += [out, mask, *residual.add_relu(x, case.residual, True), residual.mask_grad(grad, mask)]
    for given in (mask, None):
        results += bn.bn_act_backward_reduce(grad, x, given, mean, scale, shift, True, True, config=TILE)
        results.append(bn.bn_act_backward(grad, x, given, mean, scale, shift, True, case.coefficients, config=TILE))
    return results


@pytest.mark.parametrize("channels", [8, 17])
def test_the_same_bits_twice_and_through_the_default_configuration(channels, dtype):
    case = make((1, channels, 9, 5), dtype)
    for one, other in zip(everything(case), everything(case), strict=True):
        assert torch.equal(one, other)
    by_default = bn.bn_act(case.x, case.scale, case.shift, case.residual, True, True)
    for one, other in zip(by_default, everything(case)[2:4], strict=True):
        assert torch.equal(one, other)


def test_other_layouts_are_refused():
    case = Case((2, 8, 5, 7), torch.float32, torch.contiguous_format)
    good = case.x.contiguous(memory_format=torch.channels_last)
    vectors = case.mean, case.scale, case.shift
    mask = torch.zeros(70, dtype=torch.uint8)
    for call in (
        lambda: bn.bn_stats(case.x),
        lambda: bn.bn_act(case.x, *vectors[1:], None, True, False),
        lambda: bn.bn_act(good, *vectors[1:], case.x, True, False),
        lambda: bn.bn_act_(case.x, *vectors[1:], None, True),
        lambda: bn.bn_act_backward_reduce(case.grad, good, None, *vectors, True, False),
        lambda: bn.bn_act_backward(good, case.x, None, *vectors, True, case.coefficients),
        lambda: residual.add_relu(good, case.x, True),
        lambda: residual.mask_grad(case.grad, mask),
        lambda: residual.mask_grad_add_(good, case.grad, mask),
        lambda: residual.pack_mask(case.x),
    ):
        with pytest.raises(ValueError, match="channels_last"):
            call()


# The tests must see mistakes.


def _wrap(change):
    """A function whose results ``change`` alters."""

    def wrapping(function):
        return lambda *args, **kwargs: change(function(*args, **kwargs))

    return wrapping


def _four_ulps_more(results):
    out = results[0]
    return (out * (1 + 4 * torch.finfo(out.dtype).eps), *results[1:])


def _one_bit(results):
    results[1][0] ^= 4
    return results


PLANTED = {
    "last place of the output": (
        bn,
        "bn_act",
        _four_ulps_more,
        test_bn_act,
        ((2, 64, 5, 5), torch.float32, True, True, True),
    ),
    "one bit of the mask": (bn, "bn_act", _one_bit, test_bn_act, ((1, 17, 11, 13), torch.bfloat16, False, True, True)),
    "one bit of the sum's mask": (
        residual,
        "add_relu",
        _one_bit,
        test_residual_additions,
        ((1, 3, 3, 5), torch.float32),
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_errors_are_seen(planted, monkeypatch):
    module, name, change, test, arguments = PLANTED[planted]
    monkeypatch.setattr(module, name, _wrap(change)(getattr(module, name)))
    with pytest.raises(AssertionError):
        test(*arguments)


def test_a_row_too_few_is_seen(monkeypatch):
    """A kernel that stops one row early, as an error in the bounds of a tile would make it."""
    original = bn.rows_of
    monkeypatch.setattr(bn, "rows_of", lambda x: original(x) - 1)
    for test, arguments in (
        (test_statistics, ((2, 8, 5, 7), torch.float32, monkeypatch)),
        (test_bn_act, ((2, 8, 5, 7), torch.float32, True, True, False)),
        (test_bn_act_backward, ((2, 8, 5, 7), torch.float32, "open", monkeypatch)),
    ):
        with pytest.raises(AssertionError):
            test(*arguments)


def test_relu_by_maximum_is_seen(monkeypatch):
    """``max(z, 0)`` turns NaN into 0."""
    monkeypatch.setattr(bn, "bn_act", _wrap(lambda r: (torch.nan_to_num(r[0], nan=0.0), r[1]))(bn.bn_act))
    with pytest.raises(AssertionError):
        test_nan_and_inf_stay_in_their_channels(8, torch.float32)
