"""The algebra of batch norm and of the covariance plan, function by function, in float64 against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from resnet_fused import statistics

M, C, K, EPS = 60, 5, 9, 1e-5


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moments(a: Tensor) -> tuple[Tensor, Tensor]:
    centred = a - a.mean(0)
    return a.mean(0), centred.t() @ centred / len(a)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_mean_and_variance_through_the_weight() -> None:
    a, w = noise(M, C) + 3, noise(K, C)
    mean, var = statistics.through_covariance(w, *moments(a))
    y = a @ w.t()
    close(mean, y.mean(0))
    close(var, y.var(0, unbiased=False))


def test_the_variance_is_never_negative_and_keeps_nan() -> None:
    cov = torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]], dtype=torch.float64)
    _, var = statistics.through_covariance(
        torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.zeros(2).double(), cov
    )
    assert var.item() == 0
    _, var = statistics.through_covariance(noise(K, C), noise(C), torch.full((C, C), math.nan, dtype=torch.float64))
    assert var.isnan().all()


def test_gradients_of_the_statistics() -> None:
    a, w = noise(12, 3).requires_grad_(), noise(4, 3).requires_grad_()
    assert gradcheck(lambda a, w: statistics.through_covariance(w, *moments(a)), (a, w))
    vectors = [noise(4).abs().add(0.5).requires_grad_() for _ in range(4)]
    assert gradcheck(lambda *v: statistics.scale_shift(*v, EPS), vectors)


@pytest.mark.parametrize("training", [True, False])
def test_every_gradient_of_the_covariance_plan(training: bool) -> None:
    """From T, Σ dz, ā and Cov alone: dγ, dβ, dW and dA of a batch norm whose input is never looked at."""
    a, w, gamma, beta = (t.requires_grad_() for t in (noise(M, C) + 2, noise(K, C), noise(K), noise(K)))
    running_mean, running_var = noise(K), noise(K).abs() + 0.5
    dz = noise(M, K) + noise(K)
    y = a @ w.t()
    mu, var = (y.mean(0), y.var(0, unbiased=False)) if training else (running_mean, running_var)
    ((y - mu) * (var + EPS).rsqrt() * gamma + beta).backward(dz)

    x, weight = a.detach(), w.detach()
    mean, cov = moments(x)
    out_mean, out_var = statistics.through_covariance(weight, mean, cov) if training else (running_mean, running_var)
    rstd, scale, _ = statistics.scale_shift(out_mean, out_var, gamma.detach(), beta.detach(), EPS)
    t = dz.t() @ (x - mean) if training else dz.t() @ x
    sum_dz = dz.sum(0)
    centred = (weight * t).sum(1) - (0 if training else out_mean * sum_dz)
    ca, cb, _, dgamma = statistics.backward_coefficients(sum_dz, centred, rstd, scale, M, training)
    close(dgamma, gamma.grad)
    close(sum_dz, beta.grad)
    if not training:
        close(ca[:, None] * t, w.grad)
        close(dz @ (ca[:, None] * weight), a.grad)
        return
    close(statistics.weight_gradient(t, ca, cb, M, weight, cov), w.grad)
    coupling, scaled = statistics.coupling(weight, cb), ca[:, None] * weight
    close((dz - sum_dz / M) @ scaled + (x - mean) @ coupling, a.grad)
    shift = statistics.coupling_shift(scaled, sum_dz / M, coupling, mean)
    close(dz @ scaled + x @ coupling + shift, a.grad)


def test_the_constant_cancels_rounded_operands() -> None:
    """The rows of dA sum to zero whatever the weights were rounded to."""
    x, dz = noise(M, C) + 50, noise(M, K) + 100
    scaled, coupling = noise(K, C).bfloat16(), noise(C, C).bfloat16()
    shift = statistics.coupling_shift(scaled, dz.mean(0), coupling, x.mean(0))
    da = dz @ scaled.double() + x @ coupling.double() + shift
    assert da.sum(0).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_parts(dtype: torch.dtype) -> None:
    t = torch.randn(100, 7)
    high, low = statistics.two_parts(t, dtype)
    assert torch.equal(high, t.to(dtype)) and low.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert (
        (high.float() + low.float() - t).abs() <= unit**2 * t.abs() + torch.finfo(dtype).smallest_normal * unit
    ).all()
    assert statistics.two_parts(t, torch.float32)[1] is None


def test_ill_conditioned_channels() -> None:
    a = noise(400, 1) + 1e-5 * noise(400, C)
    w = torch.rand(K, C, dtype=torch.float64) + 0.5
    w[::3] -= w[::3].mean(1, keepdim=True)
    mean, cov = moments(a)
    _, var = statistics.through_covariance(w, mean, cov)
    flagged = statistics.ill_conditioned(w, mean, cov, var, 2.0**-24, 1e-3)
    assert torch.equal(flagged, torch.arange(K) % 3 == 0)
    # A large mean alone spoils sums of squares, but not the mean: every channel is flagged, and none in float64.
    mean, cov = moments(noise(400, C) + 1e4)
    _, var = statistics.through_covariance(w, mean, cov)
    assert statistics.ill_conditioned(w, mean, cov, var, 2.0**-24, 1e-3).all()
    assert not statistics.ill_conditioned(w[1::3], mean, cov, var[1::3], 2.0**-53, 1e-3).any()
    nan = torch.full_like(var, math.nan)
    assert not statistics.ill_conditioned(w, mean, cov, nan, 1.0, 1e-3).any()
    zero = torch.zeros(1, C, dtype=torch.float64)
    assert not statistics.ill_conditioned(zero, mean, cov, torch.zeros(1).double(), 1.0, 1e-3).any()


@pytest.mark.parametrize("cuts", [[1, 59], [30, 30], [0, 60], [60, 0], [7, 13, 1, 39]])
def test_merges(cuts: list[int]) -> None:
    a = noise(M, C) * 3 + 100
    parts = a.split(cuts)
    found = [moments(part) if len(part) else (torch.zeros(C).double(), torch.zeros(C, C).double()) for part in parts]
    count, mean, cov = 0, *found[0]
    for part, (part_mean, part_cov) in zip(parts, found, strict=True):
        if count + len(part):
            mean, cov = statistics.merge_covariances(count, mean, cov, len(part), part_mean, part_cov)
        count += len(part)
    counts = torch.tensor([[len(part)] for part in parts]).double()
    means, variances = (torch.stack(t) for t in zip(*((m, c.diagonal()) for m, c in found), strict=True))
    rows, mean_at_once, var = statistics.merge_moments(counts, means, variances)
    assert rows == M
    exact_mean, exact_cov = moments(a)
    close(mean, exact_mean)
    close(mean_at_once, exact_mean)
    close(cov, exact_cov)
    close(var, exact_cov.diagonal())


@pytest.mark.parametrize("centred", [True, False])
def test_merge_of_products(centred: bool) -> None:
    """Sets of different sizes and means, each with its sums about a centre that is not its mean."""
    parts = (noise(M, C) * 3 + torch.arange(M).view(-1, 1) / 10).split([7, 13, 1, M - 21])
    count = torch.tensor([[float(len(part))] for part in parts]).double()
    centre = torch.stack([part[0] + 0.5 for part in parts]) if centred else torch.zeros(len(parts), C).double()
    shifted = [part - k for part, k in zip(parts, centre)]
    sums, products = torch.stack([t.sum(0) for t in shifted]), sum(t.t() @ t for t in shifted)
    mean, cov = statistics.merge_products(count, centre if centred else None, sums, products)
    exact_mean, exact_cov = moments(torch.cat(parts))
    close(mean, exact_mean)
    close(cov, exact_cov)


def test_packed_moments() -> None:
    mean, cov = moments(noise(M, C))
    packed = statistics.pack_moments(mean, cov)
    assert packed.shape == (C * (C + 3) // 2,)
    unpacked = statistics.unpack_moments(packed, C)
    assert torch.equal(unpacked[0], mean)
    close(unpacked[1], cov)
    assert torch.equal(unpacked[1], unpacked[1].t())


@pytest.mark.parametrize("momentum", [0.1, torch.tensor(0.25, dtype=torch.float64)], ids=["float", "tensor"])
def test_running_statistics(momentum: float | Tensor) -> None:
    running, batch = noise(C), noise(C)
    expected = (1 - momentum) * running + momentum * 1.5 * batch
    statistics.update_running(running, batch, momentum, 1.5)
    close(running, expected)
