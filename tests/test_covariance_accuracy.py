"""The covariance plan is as accurate as stock PyTorch in the same dtype, against float64, on data made to be hard."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from covariance_cases import Case, check_constant, check_input_gradient, relative_error, sweep, three
from torch import Tensor

import resnet_fused
from resnet_fused import backends, statistics
from resnet_fused.testing import assert_as_accurate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SWEEP = sweep()


def check(case: Case, dtype: torch.dtype, label: str = "") -> None:
    ours, stock, exact = three(case, dtype)
    print(
        label,
        dtype,
        *(f"{k} {relative_error(ours[k], v):.0e}/{relative_error(stock[k], v):.0e}" for k, v in exact.items()),
    )
    for name, gold in exact.items():
        # Where γ is zero, dx and dW of a channel are: the floor is that of the whole tensor.
        assert_as_accurate(ours[name], stock[name], gold, slack=2, ulps=4, name=name)


@every_dtype
@pytest.mark.parametrize("point", SWEEP, ids=["-".join(point) for point in SWEEP])
def test_as_accurate_as_stock(backend: str, point: tuple[str, str], dtype: torch.dtype) -> None:
    check(SWEEP[point], dtype, f"{backend} {point}")


@pytest.mark.parametrize("rows", [(1, 3, 5), (2, 7, 9), (3, 40, 41)])
@every_dtype
def test_odd_sizes(backend: str, rows: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(Case(mean=10, rows=rows, channels=(17, 35)), dtype)


@pytest.mark.parametrize("delta", [1e-2, 1e-3])
@every_dtype
def test_the_input_gradient_of_correlated_channels(backend: str, dtype: torch.dtype, delta: float) -> None:
    check_input_gradient(dtype, delta, draws=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("strided", [False, True])
def test_the_constant_takes_away_both_parts_of_the_coupling(backend: str, dtype: torch.dtype, strided: bool) -> None:
    check_constant(backends.get(backend), dtype, strided)


# Flagged channels


def flagged_by(call: Callable[[], object], kernels: type) -> list[int]:
    """How many channels each call of ``recompute_statistics`` is asked to recompute."""
    counts: list[int] = []
    original = kernels.recompute_statistics

    def counted(self, a, weight, conv, flagged: Tensor, mean, var):
        counts.append(int(flagged.sum()))
        return original(self, a, weight, conv, flagged, mean, var)

    with mock.patch.object(kernels, "recompute_statistics", counted):
        call()
    return counts


@pytest.mark.parametrize(("case", "expected"), [(Case(), 0), (Case(mean=1), 0), (Case(delta=1e-4), 128)])
def test_which_channels_are_flagged(backend: str, case: Case, expected: int) -> None:
    kernels = type(backends.get(backend))
    with mock.patch.object(kernels, "gram_unit", lambda self, x: 2.0**-24):
        assert flagged_by(lambda: three(case, torch.bfloat16)[0], kernels) == [expected]


def test_only_the_bad_channels_are_recomputed(backend: str) -> None:
    """Half of the rows of W sum to zero over a shared signal."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 20, 20) + 1e-4 * torch.randn(4, 16, 20, 20)
    weight = torch.rand(64, 16) + 0.5
    weight[::2] -= weight[::2].mean(1, keepdim=True)
    kernels = backends.get(backend)
    conv = resnet_fused.backends.Conv()
    x = x.contiguous(memory_format=torch.channels_last)
    mean, cov = kernels.gram(x, conv)
    w = weight.double()
    out_mean, out_var = statistics.through_covariance(w, mean, cov)
    flagged = statistics.ill_conditioned(w, mean, cov, out_var, 2.0**-24, 1e-3)
    assert torch.equal(flagged, torch.arange(64) % 2 == 0)
    rough_var = out_var * 1.5
    _, new_var = kernels.recompute_statistics(x, weight[:, :, None, None], conv, flagged, out_mean, rough_var)
    exact = x.double().permute(0, 2, 3, 1).reshape(-1, 16) @ w.t()
    torch.testing.assert_close(new_var[::2], exact.var(0, unbiased=False)[::2], rtol=1e-9, atol=0)
    assert torch.equal(new_var[1::2], rough_var[1::2])
    nothing = torch.zeros(64, dtype=torch.bool)
    same = kernels.recompute_statistics(x, weight[:, :, None, None], conv, nothing, out_mean, out_var)
    assert same[0] is out_mean and same[1] is out_var


# Planted errors: each must be seen


def uncentred_float32_gram(self, a: Tensor, conv) -> tuple[Tensor, Tensor]:
    matrix = a[:, :, :: conv.stride[0], :: conv.stride[1]].permute(0, 2, 3, 1).flatten(0, 2).float()
    mean = matrix.mean(0)
    return mean.double(), (matrix.t() @ matrix / len(matrix) - torch.outer(mean, mean)).double()


def assert_red(point: Case, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(AssertionError, match="error .* allowed"):
        check(point, dtype)


@pytest.mark.parametrize("case", [Case(delta=1e-2), Case(mean=1000)], ids=["correlated", "mean"])
def test_a_float32_gram_is_found_out(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends.get(backend)), "gram", uncentred_float32_gram)
    assert_red(case)


@every_dtype
def test_a_rounded_coupling_is_found_out(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    original = statistics.coupling
    monkeypatch.setattr(statistics, "coupling", lambda weight, b: original(weight.float(), b.float()).to(dtype))
    with pytest.raises(AssertionError):
        check_input_gradient(dtype, 1e-3, draws=5)


def test_the_recomputation_mends_a_float32_gram(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums, but the backend says how they are rounded: the bad channels are flagged, and the output is right."""
    kernels = type(backends.get(backend))
    monkeypatch.setattr(kernels, "gram", uncentred_float32_gram)
    monkeypatch.setattr(kernels, "gram_unit", lambda self, x: 2.0**-24)
    ours, stock, exact = three(Case(delta=1e-3), torch.float32)
    for name in ("out", "mean", "var"):
        assert_as_accurate(ours[name], stock[name], exact[name], ulps=4, name=name)


def test_a_missing_centre_of_the_weight_gradient_is_found_out(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = type(backends.get(backend))
    original = kernels.wgrad_bn_act
    monkeypatch.setattr(
        kernels,
        "wgrad_bn_act",
        lambda self, grad, mask, operands: original(self, grad, mask, [(a, None, conv) for a, _, conv in operands]),
    )
    assert_red(Case(mean=1))


@pytest.mark.parametrize("which", ["mean_dz", "mean_a"])
def test_a_missing_centre_of_the_data_gradient_is_found_out(
    backend: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = type(backends.get(backend))
    original = kernels.dgrad_bn_act

    def without(self, grad, mask, weight, conv, feedback, acc=None):
        wrong = {which: torch.zeros_like(getattr(feedback, which))}
        feedback = type(feedback)(**{**vars(feedback), **wrong})
        return original(self, grad, mask, weight, conv, feedback, acc)

    monkeypatch.setattr(kernels, "dgrad_bn_act", without)
    assert_red(Case(mean=10, gradient_mean=10))


def test_the_constant_of_unrounded_operands_is_found_out(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision: the constant must cancel the mean of the product that is really formed."""
    right = statistics.coupling_shift

    def off_by_a_rounding(weight, mean_dz, coupling, mean_a):
        return right(weight.float() * (1 + 2.0**-9), mean_dz, coupling, mean_a)

    monkeypatch.setattr(statistics, "coupling_shift", off_by_a_rounding)
    assert_red(Case(gradient_mean=100), torch.bfloat16)
