"""Errors planted in the algebra of the covariance plan: its tests see each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import CUDA, Kernels, build
from test_covariance_algebra import (
    MAIN,
    Case,
    Results,
    coefficients,
    coupling,
    coupling_shift,
    covariance_rows,
    faults_of,
    scale_shift,
    through_covariance,
)


@dataclass(frozen=True)
class Fault:
    source: str
    right: str
    wrong: str
    call: Callable[[Kernels, Case], Results]
    result: str
    options: tuple[tuple[str, object], ...] = ()


NORM, COVARIANCE, PRODUCT = "norm.cuh", "covariance.cuh", "small_product.cuh"
POISONED, FROZEN = (("poison", True),), (("training", False),)
# Those of a group are built at once, each into another result.
TOGETHER = [
    Fault(NORM, "var[k] + static_cast<S>(eps)", "var[k] - static_cast<S>(eps)", scale_shift, "rstd"),
    Fault(NORM, "c = step * sum_dz;", "c = step + sum_dz;", coefficients, "c"),
    Fault(
        COVARIANCE,
        "square < D(0) ? D(0) : square",
        "square > D(0) ? square : D(0)",
        through_covariance,
        "var",
        POISONED,
    ),
    Fault(COVARIANCE, "unit * size * size", "unit * size", through_covariance, "flagged"),
    Fault(
        COVARIANCE,
        "packed[row] = static_cast<D>(mean_a[row])",
        "packed[row] = static_cast<D>(mean_a[0])",
        through_covariance,
        "packed",
    ),
    Fault(COVARIANCE, "sum_dz / static_cast<A>", "sum_dz * static_cast<A>", covariance_rows, "mean_dz"),
    Fault(COVARIANCE, "c < d ? c : d, c < d ? d : c", "c < d ? c : d, c", covariance_rows, "dweight"),
    Fault(COVARIANCE, "if (row > column ||", "if (row >= column ||", coupling, "high"),
    Fault(COVARIANCE, "value - static_cast<A>(part)", "value - static_cast<A>(value)", coupling, "low"),
    Fault(COVARIANCE, "half >= kShiftColumns", "half > kShiftColumns", coupling_shift, "constant"),
]
TOGETHER_TOO = [
    Fault(NORM, "multiply_add(-scale", "multiply_add(scale", scale_shift, "shift"),
    Fault(NORM, "if (!training) return;", "if (training && count == 0) return;", coefficients, "b", FROZEN),
    Fault(NORM, "rstd * sum_dz_centred)", "sum_dz_centred / rstd)", coefficients, "dgamma"),
    Fault(
        COVARIANCE,
        "c += kLanes) {\n      const double w",
        "c += 2 * kLanes) {\n      const double w",
        through_covariance,
        "mean",
    ),
    Fault(COVARIANCE, "of_mean, of_mean, variance", "of_mean, 0.0, variance", through_covariance, "flagged"),
    Fault(
        COVARIANCE, "centred = multiply_add(-static", "centred = multiply_add(static", covariance_rows, "dgamma", FROZEN
    ),
    Fault(COVARIANCE, "of.b * static_cast<A>(at.count)", "of.b", covariance_rows, "dweight"),
    Fault(
        COVARIANCE, "at.scaled[i] = static_cast<T>(a *", "at.scaled[i] = static_cast<T>(a +", covariance_rows, "scaled"
    ),
    Fault(COVARIANCE, "high[i] = high[mirrored]", "high[i]", coupling, "high"),
    Fault(
        COVARIANCE,
        "static_cast<A>(high[i]) + static_cast<A>(low[i])",
        "static_cast<A>(high[i])",
        coupling_shift,
        "constant",
    ),
]
BARRIER = "__syncthreads();\n"
OF_PRODUCT = [
    [Fault(PRODUCT, right, right.replace("__syncthreads();", ""), call, result)]
    for right, call, result in (
        ("__syncthreads();  // what was", through_covariance, "var"),
        (BARRIER + "      if (first", coupling, "high"),
        (BARRIER + "#pragma unroll\n    for (int r = 0", coupling, "high"),
        (BARRIER + "#pragma unroll\n    for (int n = 0", covariance_rows, "dweight"),
    )
]
OF_PRODUCT += [
    [Fault(PRODUCT, "first + kTileDepth < depth", "first + 2 * kTileDepth < depth", through_covariance, "var")],
    [Fault(COVARIANCE, "first_column + kTileColumns <= first_row", "first_column <= first_row", coupling, "high")],
]
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in (TOGETHER_TOO, *OF_PRODUCT)]


@pytest.mark.parametrize("faults", [TOGETHER, *SLOW])
def test_planted_faults_are_seen(tmp_path, faults):
    sources = {}
    for fault in faults:
        text = sources.get(fault.source) or (CUDA / fault.source).read_text(encoding="utf-8")
        assert text.count(fault.right) == 1, fault
        sources[fault.source] = text.replace(fault.right, fault.wrong)
    faulty = Kernels(build(tmp_path, sources, MAIN, torch.bfloat16))
    for fault in faults:
        torch.manual_seed(0)
        case = Case(torch.bfloat16, 20, 70, **dict(fault.options))
        try:
            wrong = faults_of(fault.call(faulty, case))
        except AssertionError as error:
            wrong = {fault.result: str(error)}
        assert fault.result in wrong, fault
