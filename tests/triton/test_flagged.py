"""Recomputed statistics against float64, the covariance plan on hard data, and that nobody waits for the flags."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from covariance_cases import Case, check_constant, check_input_gradient, sweep, three
from gemm_cases import STRIDE, filters, flags, formed, operand
from poison import poison_allocations
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl

import resnet_fused
from resnet_fused import backends
from resnet_fused.backends.aten import rows
from resnet_fused.backends.operands import Conv, filter_matrix
from resnet_fused.backends.triton import dispatch, flagged, launching
from resnet_fused.testing import assert_as_accurate

pytestmark = pytest.mark.one_in(10)

SWEEP = sweep()


def check_recomputed(dtype, widths, kind, conv, every, mean=0.0):
    c, k = widths
    a = operand(kind, dtype, c, size=(7, 11), mean=mean)
    w = filters(dtype, c, k)
    chosen = torch.arange(k) % every == every - 1
    rough = torch.randn(k, dtype=torch.float64), torch.rand(k, dtype=torch.float64)
    found_mean, found_var = flagged.recompute_statistics(a, w, conv, chosen, *rough)
    y = rows(formed(a), conv.stride).double() @ filter_matrix(w).double().t()
    var, exact = torch.var_mean(y, 0, unbiased=False)
    size = y.square().mean(0).sqrt()
    assert ((found_mean - exact).abs() <= 4e-7 * size)[chosen].all()
    assert ((found_var - var).abs() <= 1e-6 * var + 2.0**-23 * size * var.sqrt())[chosen].all()
    assert torch.equal(found_mean[~chosen], rough[0][~chosen]) and torch.equal(found_var[~chosen], rough[1][~chosen])


@pytest.fixture
def poisoned(monkeypatch):
    poison_allocations(monkeypatch, 255)


@flags("kind, conv, every", ["plain", "relu", "affine"], [Conv(), STRIDE], [1, 3, 40])
def test_flagged_channels_are_recomputed(dtype, widths, kind, conv, every, poisoned):
    check_recomputed(dtype, widths, kind, conv, every)


@pytest.mark.parametrize("every", [1, 5])
def test_in_many_splits(dtype, every, poisoned, monkeypatch):
    monkeypatch.setattr(launching, "multiprocessors", lambda device: 32)
    check_recomputed(dtype, (17, 40), "relu", Conv(), every)


def test_far_from_zero(poisoned):
    check_recomputed(torch.float32, (17, 40), "plain", Conv(), 2, mean=1000.0)


def test_no_rows():
    x = torch.empty(0, 8, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    mean, var = torch.rand(2, 16)
    found = flagged.recompute_statistics(x, filters(torch.bfloat16, 8, 16), Conv(), mean > 0, mean, var)
    assert found[0] is mean and found[1] is var


@pytest.mark.parametrize("fault", ["a dropped last tile", "moments of rows that do not exist", "a forgotten distance"])
def test_planted_errors_are_found(fault, poisoned, monkeypatch):
    real_rows, real_moments = flagged.rows_of, flagged.wide_moments

    def without_distance(x, valid, count):
        mean, square = real_moments(x, valid, count)
        return tl.sum(mean, 0) / mean.shape[0] + 0.0 * mean, square

    name, wrong = {
        "a dropped last tile": ("rows_of", lambda shape: real_rows(shape) - 13),
        "moments of rows that do not exist": (
            "wide_moments",
            lambda x, valid, count: real_moments(x, valid | True, count),
        ),
        "a forgotten distance": ("wide_moments", without_distance),
    }[fault]
    monkeypatch.setattr(flagged, name, wrong)
    with pytest.raises(AssertionError):
        check_recomputed(torch.float32, (17, 40), "affine", Conv(), 2)


def small(case):
    return dataclasses.replace(case, rows=(1, 9, 16), channels=(32, 96))


# Dtypes take turns, but for the correlated channels: these are what rounding tells apart.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HARD = [
    (point, dtype) for i, point in enumerate(SWEEP) for dtype in (DTYPES if "corr" in point[0] else DTYPES[i % 3 :][:1])
]


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("point", "dtype"), HARD, ids=[f"{'-'.join(point)}-{str(dtype)[6:]}" for point, dtype in HARD])
def test_the_plan_is_as_accurate_as_stock(point, dtype):
    with resnet_fused.backend("triton"):
        ours, stock, exact = three(small(SWEEP[point]), dtype)
    for name, gold in exact.items():
        assert_as_accurate(ours[name], stock[name], gold, slack=2, ulps=4, name=name)


@pytest.mark.parametrize(("delta", "expected"), [(1.0, 0), (1e-4, 96)])
def test_which_channels_are_flagged(delta, expected, monkeypatch):
    found, plain = [], dispatch.recompute_flagged
    monkeypatch.setattr(dispatch, "recompute_flagged", lambda *args: found.append(args[3]) or plain(*args))
    with resnet_fused.backend("triton"):
        three(small(Case(delta=delta)), torch.bfloat16)
    assert [int(flags.sum()) for flags in found] == [expected]


def test_the_input_gradient_of_correlated_channels(dtype):
    with resnet_fused.backend("triton"):
        check_input_gradient(dtype, 1e-3, draws=3)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_constant_takes_away_both_parts_of_the_coupling(half, strided):
    check_constant(backends.get("triton"), half, strided)


class NobodyWaits(TorchDispatchMode):
    """Fails where the host needs a value that a kernel computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        }
        assert func not in waits, f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))


def test_nobody_waits(dtype):
    block = resnet_fused.Bottleneck(32, 8).to(dtype)
    x = torch.randn(2, 32, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with resnet_fused.backend("triton"), NobodyWaits():
        block(x).sum().backward()
