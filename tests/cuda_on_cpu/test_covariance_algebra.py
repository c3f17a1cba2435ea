"""The algebra between a norm's sums and the passes over its tensors, run by emulation.

Results are compared with the formulas of ``statistics`` in float64 on the same inputs, and may be off by no more than twice
what the same formulas are off by in the dtypes that the plan gives them, and two ulps (``assert_as_accurate``). Where those
formulas give NaN or an infinity, that is what must be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulated import DTYPES, HERE, Banded, Kernels, banded, build, built_once, name_of
from torch import Tensor

from resnet_fused import statistics
from resnet_fused.backends.algebra import moments_dtype
from resnet_fused.backends.operands import acc_dtype
from resnet_fused.testing import assert_as_accurate

MAIN = HERE / "covariance_kernels.cpp"
HALF = DTYPES[2:]
SIZES = [(1, 1), (7, 5), (64, 33), (100, 64), (7, 130)]  # K, C
MORE_SIZES = [(1, 64), (64, 1), (100, 130), (64, 130), (16, 32), (17, 512), (2048, 40)]
QUICK = [(torch.bfloat16, *size) for size in SIZES] + [(torch.float32, *size) for size in SIZES[2::2]]


@pytest.fixture(scope="module")
def kernels(_folder: Path) -> Kernels:
    return Kernels(built_once(_folder / MAIN.stem, lambda folder: build(folder, main=MAIN, optimise=False)))


@dataclass(frozen=True)
class Case:
    """What is asked of a kernel; poison: there are NaN and infinities in some rows."""

    dtype: torch.dtype = torch.bfloat16
    outputs: int = 100
    channels: int = 64
    parameters: torch.dtype | None = None  # of the norm; None: dtype
    filter: torch.dtype | None = None  # of dW; None: dtype
    wide: bool = True  # moments or T in float64
    training: bool = True
    poison: bool = False
    columns: int = 0  # blocks along them; 0: as planned
    seed: int = 1

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.dtype)

    @property
    def moments(self) -> torch.dtype:
        return moments_dtype(self.dtype)

    def of(self, dtype: torch.dtype | None) -> torch.dtype:
        return self.dtype if dtype is None else dtype

    def vector(self, count: int, low: float = -1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (low + 2 * torch.rand(count, dtype=torch.float64)).to(self.acc if dtype is None else dtype)

    def weight(self) -> Tensor:
        weight = torch.randn(self.outputs, self.channels, dtype=torch.float64)
        weight[::3] = weight[::3].abs() * 0.1 + 0.5  # of one sign: Σ w² Cov far from Σ |w|² E[A²]
        if self.poison:
            weight[min(2, self.outputs - 1), 0] = float("inf")
            weight[self.outputs // 2, self.channels // 2] = float("nan")
        return weight.to(self.dtype)

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Of correlated channels with means, in float64."""
        rows = 2 * self.channels + 3
        a = torch.randn(rows, self.channels, dtype=torch.float64) + torch.randn(rows, 1, dtype=torch.float64)
        return torch.linspace(-1, 2, self.channels, dtype=torch.float64), torch.cov(a.t(), correction=0).view(
            a.shape[1], -1
        )


def flat(t: Tensor | None) -> Banded | None:
    return None if t is None else banded(t.flatten())


Results = dict[str, tuple[Banded, Tensor, Tensor]]  # found, and the formula's in the plan's dtypes and in float64


def faults_of(results: Results) -> dict[str, str]:
    """Which results are wrong, and how."""
    wrong = {}
    for name, (found, stock, gold) in results.items():
        try:
            ours = found.check().view(gold.shape)
            if not ours.is_floating_point():
                assert torch.equal(ours, gold.to(ours.dtype)), "other channels"
                continue
            stock, finite = stock.to(ours.dtype), stock.isfinite()
            same = torch.equal(ours.nan_to_num(0, 1, -1)[~finite], stock.nan_to_num(0, 1, -1)[~finite])
            assert same and torch.equal(ours.isnan(), stock.isnan()), "NaN or infinities in other places"
            # float64 is compared with itself, summed in another order.
            rows = 100 if stock.dtype == torch.float64 else 1
            assert_as_accurate(*(torch.where(finite, t, 0) for t in (ours, stock, gold)), rows=rows, name=name)
        except AssertionError as error:
            wrong[name] = str(error)
    return wrong


def scale_shift(kernels: Kernels, case: Case) -> Results:
    k = case.outputs
    of = torch.float64 if case.wide else case.acc
    given = [case.vector(k, dtype=of), case.vector(k, 0.0, of)]
    given += [case.vector(k, dtype=case.of(case.parameters)) for _ in range(2)]
    given[1][::5] = 0
    if case.poison:
        given[0][0], given[1][-1], given[1][k // 2] = float("inf"), float("nan"), float("inf")
    names = "mean", "var", "rstd", "scale", "shift"
    found = [Banded(k, case.acc) for _ in names]
    dtypes = DTYPES.index(case.of(case.parameters)), int(case.wide)
    kernels("scale_shift", case.dtype, *dtypes, *map(flat, given), 1e-5, k, *found, case.seed)
    stock, gold = ([t[0], t[1], *statistics.scale_shift(*t, 1e-5)] for t in (given, [each.double() for each in given]))
    return {name: each for name, *each in zip(names, found, stock, gold)}


def coefficients(kernels: Kernels, case: Case) -> Results:
    k = case.outputs
    given = [case.vector(k) for _ in range(4)]
    if case.poison:
        given[0][0], given[1][-1], given[3][k // 2] = float("inf"), float("nan"), float("inf")
    names = "b", "c", "dgamma", "dbeta"
    of = case.of(case.parameters)
    found = [Banded(k, case.acc if name in "bc" else of) for name in names]
    kernels(
        "coefficients", case.dtype, DTYPES.index(of), *map(flat, given), 37, int(case.training), k, *found, case.seed
    )
    stock, gold = (
        [*statistics.backward_coefficients(*t, 37, case.training)[1:], t[0]]
        for t in (given, [each.double() for each in given])
    )
    return {name: each for name, *each in zip(names, found, stock, gold)}


def through_covariance(kernels: Kernels, case: Case) -> Results:
    weight, (mean_a, cov) = case.weight(), case.covariance()
    if not case.wide:
        mean_a, cov = mean_a.to(case.moments), cov.to(case.moments)
    k, c, of = *weight.shape, case.moments
    rounded = mean_a.to(of), cov.to(of)
    stock, gold = ([*statistics.through_covariance(*t)] for t in both(of, weight, *rounded))
    # The limit parts the channels in two.
    unit, wide = 2.0**-24, [t.double() for t in (weight, *rounded)]
    size = wide[0].abs() @ (wide[2].diagonal() + wide[1] ** 2).sqrt()
    kappa = unit * size**2 / gold[1]
    limit = kappa[kappa.isfinite()].median().item() * 1.0001
    flagged = statistics.ill_conditioned(*wide, gold[1], unit, limit)
    names = "mean", "var", "flagged", "packed"
    found = [Banded(k, of), Banded(k, of), Banded(k, torch.uint8), Banded(c * (c + 3) // 2, of)]
    given = [flat(t) for t in (weight, mean_a, cov)]
    kernels("through_covariance", case.dtype, int(case.wide), *given, k, c, unit, limit, *found, case.seed)
    packed = statistics.pack_moments(*rounded)
    stock, gold = [*stock, flagged, packed], [*gold, flagged, packed.double()]
    return {name: each for name, *each in zip(names, found, stock, gold)}


def both(dtype: torch.dtype, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [t.to(dtype) for t in tensors], [t.double() for t in tensors]


def covariance_rows(kernels: Kernels, case: Case) -> Results:
    count, weight, moments = 37, case.weight(), [t.to(case.moments) for t in case.covariance()]
    k, c = weight.shape
    t = torch.randn(k, c, dtype=torch.float64).to(torch.float64 if case.wide else case.moments)
    vectors = [case.vector(k) for _ in range(4)]  # sum_dz, mean, rstd, scale
    if case.poison:
        t[-1, -1], vectors[3][0] = float("nan"), float("-inf")
        moments[1][0, -1] = moments[1][-1, 0] = float("inf")

    def expected(acc: torch.dtype, of: torch.dtype) -> list[Tensor]:
        w, wide_t, cov = weight.to(of), t.to(of), moments[1].to(of)
        sum_dz, mean, rstd, scale = (v.to(acc) for v in vectors)
        centred = (w * wide_t).sum(1)
        if not case.training:
            centred = centred - mean * sum_dz
        a, b, c_, dgamma = statistics.backward_coefficients(sum_dz, centred.to(acc), rstd, scale, count, case.training)
        dw = statistics.weight_gradient(wide_t, a, b, count, w, cov) if case.training else a[:, None] * wide_t
        return [b, c_, dgamma, sum_dz, sum_dz / count, dw, scale[:, None] * weight.to(acc)]

    names = "b", "c", "dgamma", "dbeta", "mean_dz", "dweight", "scaled"
    parameters, of_filter = case.of(case.parameters), case.of(case.filter)
    dtypes = case.acc, case.acc, parameters, parameters, case.acc, of_filter, case.dtype
    found = [Banded(k if i < 5 else k * c, dtype) for i, dtype in enumerate(dtypes)]
    packed = statistics.pack_moments(*moments) if case.training else None
    given = [flat(each) for each in (t, weight, packed, *vectors)]
    of = DTYPES.index(parameters), DTYPES.index(of_filter), int(case.wide), case.columns
    kernels("covariance_rows", case.dtype, *of, *given, count, k, c, *found, case.seed)
    stock, gold = expected(case.acc, case.moments), expected(torch.float64, torch.float64)
    return {name: each for name, *each in zip(names, found, stock, gold)}


def coupling(kernels: Kernels, case: Case) -> Results:
    weight, b, (mean_a, _) = case.weight(), case.vector(case.outputs), case.covariance()
    k, c = weight.shape
    packed = torch.cat([mean_a, mean_a.new_full((c,), float("nan"))]).to(case.moments)
    if case.poison:
        b[k // 3] = float("inf")
    high, mean_to = Banded(c * c, case.dtype), Banded(c, case.acc)
    low = Banded(c * c, case.dtype) if case.dtype in HALF else None
    given = [flat(t) for t in (weight, b, packed)]
    kernels("coupling", case.dtype, *given, k, c, high, low, mean_to, case.seed)
    stock, gold = (statistics.coupling(*t) for t in both(case.moments, weight, b))
    parts = statistics.two_parts(stock.to(case.acc), case.dtype)
    results = {"high": (high, parts[0], gold), "mean_to": (mean_to, packed[:c], packed[:c].double())}
    if low is not None:
        total = Banded(c * c, case.acc).holding(high.check().to(case.acc) + low.check())
        results["low"] = total, parts[0].to(case.acc) + parts[1], gold
    for part in (high, low):
        square = None if part is None else part.check().view(c, c).nan_to_num(7.0)
        assert square is None or torch.equal(square, square.t()), "not symmetric"
    return results


def coupling_shift(kernels: Kernels, case: Case) -> Results:
    scaled, mean_dz, mean_a = case.weight(), case.vector(case.outputs), case.vector(case.channels)
    k, c = scaled.shape
    if case.poison:
        mean_a[c // 2] = float("nan")
    high, low = statistics.two_parts(torch.randn(c, c, dtype=case.acc), case.dtype)
    constant = Banded(c, case.acc)
    given = [flat(t) for t in (scaled, mean_dz, high, low, mean_a)]
    kernels("coupling_shift", case.dtype, *given, k, c, constant, case.seed)
    summed = high if low is None else high.to(case.acc) + low
    stock, gold = (statistics.coupling_shift(*t) for t in both(case.acc, scaled, mean_dz, summed, mean_a))
    return {"constant": (constant, stock, gold)}


CALLS: list[Callable[[Kernels, Case], Results]] = [
    scale_shift,
    coefficients,
    through_covariance,
    covariance_rows,
    coupling,
    coupling_shift,
]
every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float64, torch.float16))],
    ids=name_of,
)
every_kernel = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


def check(kernels: Kernels, call: Callable[[Kernels, Case], Results], case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    results = call(kernels, case)
    wrong = faults_of(results)
    assert not wrong, wrong
    return [found.check() for found, _, _ in results.values()]


@pytest.mark.parametrize(
    "dtype, outputs, channels",
    [
        case if (case := (dtype, *size)) in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for dtype in DTYPES
        for size in SIZES + MORE_SIZES
    ],
    ids=name_of,
)
@every_kernel
def test_sizes(kernels, call, dtype, outputs, channels):
    check(kernels, call, Case(dtype, outputs, channels))


WIDE_PARAMETERS = {"parameters": torch.float32, "filter": torch.float32}
OPTIONS = [
    (scale_shift, {"wide": False}),
    (scale_shift, {"parameters": torch.float32}),
    (coefficients, {"training": False}),
    (coefficients, {"parameters": torch.float32}),
    (through_covariance, {"wide": False}),
    (covariance_rows, {"training": False}),
    (covariance_rows, {"columns": 1}),
    (covariance_rows, WIDE_PARAMETERS),
    (covariance_rows, {**WIDE_PARAMETERS, "wide": False, "columns": 5}),
    (covariance_rows, {"parameters": torch.float32, "wide": False, "training": False}),
]


@pytest.mark.parametrize("call, options", OPTIONS, ids=lambda of: of.__name__ if callable(of) else " ".join(of))
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=name_of,
)
def test_options(kernels, call, dtype, options):
    check(kernels, call, replace(Case(dtype, 20, 70), **options))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_dtype
@every_kernel
def test_nan_and_inf_go_where_the_formulas_send_them(kernels, call, dtype, training):
    check(kernels, call, Case(dtype, 37, 40, poison=True, training=training))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=name_of)
@every_kernel
def test_the_order_does_not_count(kernels, call, dtype):
    case = Case(dtype, 20, 70)
    found = [check(kernels, call, replace(case, seed=seed, columns=seed)) for seed in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@every_dtype
def test_the_constant_cancels_what_is_summed(kernels, dtype):
    """Of the parts as coupling wrote them and the filter as covariance_rows scaled it, with means far above the rest."""
    k, c, case = 40, 33, Case(dtype)
    torch.manual_seed(0)
    scaled, high, low = (torch.randn(n, c).to(dtype) for n in (k, c, c))
    low = low * 1e-3 if dtype in HALF else None
    mean_dz, mean_a, constant = 100 + case.vector(k), 1000 + case.vector(c), Banded(c, case.acc)
    given = [flat(t) for t in (scaled, mean_dz, high, low, mean_a)]
    kernels("coupling_shift", dtype, *given, k, c, constant, 0)
    summed = high.double() if low is None else (high.to(case.acc) + low).double()
    left = mean_dz.double() @ scaled.double() + mean_a.double() @ summed + constant.check().double()
    assert left.abs().max() <= 4 * torch.finfo(case.acc).eps * constant.check().abs().max()
