"""The per-channel algebra of batch norm: small pure functions.

Vectors are in the accumulation dtype, or in float64 where sums over many rows meet (``through_covariance`` and the merges).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_shift(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``rstd = 1/√(var + eps)``, ``scale = weight·rstd``, ``shift = bias − scale·mean``, in the dtype of ``mean``.

    Args:
        mean, var, weight, bias (Tensor[C]): ``var`` is biased.
    Returns:
        rstd, scale, shift (Tensor[C]).
    """
    rstd = torch.rsqrt(var + eps)
    scale = weight.to(mean.dtype) * rstd
    return rstd, scale, torch.addcmul(bias.to(mean.dtype), scale, mean, value=-1)


def backward_coefficients(
    sum_dz: Tensor, sum_dz_centred: Tensor, rstd: Tensor, scale: Tensor, count: int | Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of batch norm is affine in what it needs: ``dx = a·dz + b·(x − mean) + c``.

    ``dweight = rstd·Σ dz·(x − mean)`` and ``dbias = Σ dz`` (which is ``sum_dz`` itself); ``a = scale``,
    ``b = −a·rstd·dweight/count``, ``c = −a·dbias/count``; with frozen statistics ``b = c = 0``.
    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3, with the sums factored out.

    Args:
        sum_dz, sum_dz_centred, rstd, scale (Tensor[C]): ``Σ dz`` and ``Σ dz·(x − mean)`` over the ``count`` rows.
    Returns:
        a, b, c, dweight (Tensor[C]).
    """
    dweight = rstd * sum_dz_centred
    if not training:
        zero = torch.zeros_like(scale)
        return scale, zero, zero, dweight
    step = scale / -count
    return scale, step * rstd * dweight, step * sum_dz, dweight


# Batch norm of y = A Wᵀ told from A alone. A [M, C] has mean ā and covariance Cov; see docs/covariance.md.


def through_covariance(weight: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``y = A Wᵀ``: ``µ_k = w_k·ā``, ``σ²_k = w_kᵀ Cov w_k`` (at least 0).

    Args:
        weight (Tensor[K, C]), mean (Tensor[C]), cov (Tensor[C, C]): of one dtype.
    Returns:
        mean, var (Tensor[K]).
    """
    return weight @ mean, (weight @ cov).mul_(weight).sum(1).clamp_min_(0)


def ill_conditioned(weight: Tensor, mean: Tensor, cov: Tensor, var: Tensor, unit: float, limit: float) -> Tensor:
    """Where rounding in ``cov`` may spoil ``var``: ``unit·κ_k > limit``, ``κ_k = (Σ_c |w_kc| √E[A_c²])² / σ²_k``.

    An entry of ``AᵀA/M`` is off by about ``unit·√(E[A_c²] E[A_d²])``, hence ``σ²_k`` by at most ``unit·κ_k`` of itself.

    Args:
        weight (Tensor[K, C]), mean (Tensor[C]), cov (Tensor[C, C]), var (Tensor[K]): as in ``through_covariance``.
        unit: the rounding unit of the sums in ``cov``.
        limit: the relative error of the variance that is accepted.
    Returns:
        Tensor[K] of booleans; False for a channel whose statistics are not finite.
    """
    size = weight.abs() @ (cov.diagonal() + mean * mean).sqrt()
    return unit * size * size > limit * var


def weight_gradient(t: Tensor, a: Tensor, b: Tensor, count: int, weight: Tensor, cov: Tensor) -> Tensor:
    """``dW = diag(a)·T + M·diag(b)·(W Cov)`` in training.

    It is ``dYᵀA`` with ``dY = a·dz + b·(Y − µ) + c``, where the mean's share ``a·Σdz·āᵀ`` of the first term and the third,
    ``c·(M ā)ᵀ``, cancel exactly; so ``T`` is centred and the third term is absent.

    Args:
        t (Tensor[K, C]): ``dzᵀ(A − ā)``.
        a, b (Tensor[K]): of ``backward_coefficients``. count: M.
        weight (Tensor[K, C]), cov (Tensor[C, C]).
    """
    return (weight @ cov).mul_((b * count)[:, None]).addcmul_(a[:, None], t)


def off_centre_gradient(
    a: Tensor, b: Tensor, c: Tensor, sum_dz: Tensor, count: int, weight: Tensor, mean: Tensor, delta: Tensor
) -> Tensor:
    """What ``weight_gradient`` lacks where T and Cov are of a part of the rows, about the mean of all of them.

    With M rows here, ``δ = ā − mean``: ``M·c·δᵀ + (a·Σdz + M·(b∘Wδ + c))·meanᵀ``; over all parts both sum to zero.

    Args:
        a, b, c (Tensor[K]): of all rows. sum_dz (Tensor[K]), count: of these.
        weight (Tensor[K, C]), mean, delta (Tensor[C]).
    """
    uncancelled = a * sum_dz + count * (b * (weight @ delta) + c)
    return torch.outer(count * c, delta).addcmul_(uncancelled[:, None], mean)


def coupling(weight: Tensor, b: Tensor) -> Tensor:
    """``G = Wᵀ diag(b) W`` ``[C, C]``: carries ``b·(Y − µ)`` of batch norm's gradient to ``dA`` as ``(A − ā)·G``."""
    return (weight * b[:, None]).t() @ weight


def two_parts(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``t`` in ``dtype``, and for half precision what that was rounded by, in ``dtype`` too: together twice the digits."""
    high = t.to(dtype)
    return high, (t - high.to(t.dtype)).to(dtype) if dtype.itemsize == 2 else None


def coupling_shift(weight: Tensor, mean_dz: Tensor, coupling: Tensor, mean_a: Tensor) -> Tensor:
    """The constant of ``dA = dz·(aW) + A·G + const``: ``−mean_dzᵀ(aW) − āᵀG``, so that the rows of ``dA`` sum to zero.

    Args:
        weight (Tensor[K, C]), coupling (Tensor[C, C]): ``aW`` and ``G`` *as rounded* for the products: the constant must
            cancel the mean of what is really summed.
        mean_dz (Tensor[K]), mean_a (Tensor[C]): over the M rows.
    """
    return -mean_dz @ weight.to(mean_dz.dtype) - mean_a @ coupling.to(mean_a.dtype)


def pack_moments(mean: Tensor, cov: Tensor) -> Tensor:
    """The mean ``[C]`` and the upper triangle of the symmetric ``cov`` ``[C, C]``, as one vector ``[C (C + 3) / 2]``."""
    channels = len(mean)
    rows, columns = torch.triu_indices(channels, channels, device=cov.device)
    return torch.cat([mean, cov[rows, columns]])


def unpack_moments(packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``pack_moments``."""
    rows, columns = torch.triu_indices(channels, channels, device=packed.device)
    cov = packed.new_empty(channels, channels)
    cov[rows, columns] = cov[columns, rows] = packed[channels:]
    return packed[:channels], cov


def recentre_moments(packed: Tensor, mean: Tensor) -> Tensor:
    """Moments about another centre: ``mean``, ``Cov + δδᵀ``, and ``δ`` behind them, δ = ā − mean; as one vector.

    For rows that are a part of those that ``mean`` is of: ``E[A − mean] = δ``, ``E[(A − mean)(A − mean)ᵀ] = Cov + δδᵀ``.

    Args:
        packed: ``pack_moments(ā, Cov)``. mean (Tensor[C]).
    """
    delta = packed[: len(mean)] - mean
    rows, columns = torch.triu_indices(len(mean), len(mean), device=packed.device)
    return torch.cat([mean, packed[len(mean) :] + delta[rows] * delta[columns], delta])


# Chan's merge. Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
# 1979, section 2, and its matrix form.


def merge_moments(count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, mean and biased variance of several sets together.

    ``M = Σ n_s``, ``mean = Σ n_s·mean_s / M``, ``var = Σ n_s·(var_s + (mean_s − mean)²) / M``.

    Args:
        count (Tensor[S, 1]): rows n_s of each set; what a set of none has for a mean does not count, if it is finite.
        mean, var (Tensor[S, C]).
    Returns:
        M (Tensor[1]), mean, var (Tensor[C]).
    """
    rows = count.sum(0)
    share = count / rows
    merged = (share * mean).sum(0)
    return rows, merged, (share * (var + (mean - merged).square())).sum(0)


def merge_covariances(
    count_a: int, mean_a: Tensor, cov_a: Tensor, count_b: int, mean_b: Tensor, cov_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean ``[C]`` and covariance ``[C, C]`` of two sets together; counts >= 0, not both 0.

    With ``δ = mean_b − mean_a``, ``n = n_a + n_b``: ``mean = mean_a + δ·n_b/n``,
    ``cov = (n_a·cov_a + n_b·cov_b)/n + δδᵀ·n_a·n_b/n²``.
    """
    share_a, share_b = count_a / (count_a + count_b), count_b / (count_a + count_b)
    delta = mean_b - mean_a
    between = torch.outer(delta, delta) * (share_a * share_b)
    return mean_a + delta * share_b, share_a * cov_a + share_b * cov_b + between


@torch.no_grad()
def merge_products(count: Tensor, centre: Tensor | None, sums: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_covariances`` of many sets at once, each with its sums about a centre of its own.

    With ``n_s`` rows, centre ``k_s``, ``u_s`` the mean of ``A − k_s``, ``µ_s = k_s + u_s`` and ``M = Σ n_s``::

        mean = Σ n_s·µ_s / M        M·cov = Σ S_s − Σ n_s·u_s u_sᵀ + Σ n_s·(µ_s − mean)(µ_s − mean)ᵀ

    Args:
        count (Tensor[S, 1]): rows of each set, at least 1. centre (Tensor[S, C]): None for 0.
        sums (Tensor[S, C]): ``Σ (A − k_s)`` of each set.
        products (Tensor[C, C]): ``Σ_s S_s``, ``S_s = Σ (A − k_s)(A − k_s)ᵀ``.
    Returns:
        mean (Tensor[C]), biased cov (Tensor[C, C]).
    """
    rows, offset = count.sum(), sums / count
    means = offset if centre is None else centre + offset
    mean = (means * count).sum(0) / rows
    delta = means - mean
    return mean, (products + (delta * count).t() @ delta - sums.t() @ offset) / rows


def update_running(running: Tensor, batch: Tensor, momentum: float | Tensor, correction: float = 1.0) -> None:
    """``running ← (1 − momentum)·running + momentum·correction·batch``, in place and in ``running``'s dtype.

    ``correction`` is Bessel's ``M / (M − 1)`` for a biased variance.
    """
    batch = batch.to(running.dtype)
    if isinstance(momentum, Tensor):
        running.mul_(1 - momentum).add_(batch * (momentum * correction))
    else:
        running.mul_(1 - momentum).add_(batch, alpha=momentum * correction)
