"""The per-channel algebra of batch norm: small pure functions of ``[C]`` vectors in the accumulation dtype."""

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
    sum_dz: Tensor, sum_dz_centred: Tensor, rstd: Tensor, scale: Tensor, count: int, training: bool
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


@torch.no_grad()
def update_running(running: Tensor, batch: Tensor, momentum: float | Tensor, correction: float = 1.0) -> None:
    """``running ← (1 − momentum)·running + momentum·correction·batch``, in place and in ``running``'s dtype.

    ``correction`` is Bessel's ``M / (M − 1)`` for a biased variance.
    """
    batch = batch.to(running.dtype)
    if isinstance(momentum, Tensor):
        running.mul_(1 - momentum).add_(batch * (momentum * correction))
    else:
        running.mul_(1 - momentum).add_(batch, alpha=momentum * correction)
