"""The per-channel algebra between the passes over rows: what ``statistics`` has as formulas, in as few launches as a backend can.

Here the formulas themselves, a PyTorch call for each step. Shapes: K output channels, C input channels, M rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import statistics
from .operands import Feedback, Operand, acc_dtype


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ā and Cov: one in which W·Cov may cancel down to the precision of the activations."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


class NormGradients(NamedTuple):
    """Of batch norm's backward: ``dx = a·dz + b·(x − mean) + c``, and the gradients of its parameters, each ``[K]``."""

    a: Tensor
    b: Tensor
    c: Tensor
    weight: Tensor
    bias: Tensor


class RowGradients(NamedTuple):
    """What belongs to the rows of a filter under the covariance plan.

    Attributes:
        norm: of the batch norm.
        weight (Tensor[K, C]): of the filter; None where nobody asked.
        scaled (Tensor[K, C]): ``diag(a) W`` in the dtype of the filter, which the gradient is multiplied with.
        mean_dz (Tensor[K]): ``Σ dz / M``.
    """

    norm: NormGradients
    weight: Tensor | None
    scaled: Tensor
    mean_dz: Tensor


class FrozenNorm(NamedTuple):
    """A convolution's filter ``[K, C / groups, R, S]`` and bias, and the batch norm with running statistics behind it."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


class Algebra:
    """The part of the kernel interface that touches no activation."""

    def norm_vectors(
        self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """mean, var, rstd, scale and shift of a batch norm in ``dtype``: ``statistics.scale_shift``."""
        vectors = (mean, var, *statistics.scale_shift(mean, var, weight, bias, eps))
        return tuple(v.to(dtype) for v in vectors)  # type: ignore[return-value]

    def norm_gradients(
        self,
        sum_dz: Tensor,
        sum_dz_centred: Tensor,
        rstd: Tensor,
        scale: Tensor,
        count: int,
        training: bool,
        dtype: torch.dtype,
    ) -> NormGradients:
        """``statistics.backward_coefficients``; the gradients of the parameters are in their ``dtype``."""
        a, b, c, weight = statistics.backward_coefficients(sum_dz, sum_dz_centred, rstd, scale, count, training)
        return NormGradients(a, b, c, weight.to(dtype), sum_dz.to(dtype, copy=True))

    def norm_gradients_over(
        self,
        sum_dz: Tensor,
        sum_dz_centred: Tensor,
        total_dz: Tensor,
        total_dz_centred: Tensor,
        rstd: Tensor,
        scale: Tensor,
        count: Tensor,
        dtype: torch.dtype,
    ) -> NormGradients:
        """``norm_gradients`` where batch statistics are those of several processes.

        Args:
            sum_dz, sum_dz_centred (Tensor[K]): of this process's rows; they make the gradients of the parameters.
            total_dz, total_dz_centred, count (Tensor[K]): of all rows; they make a, b and c.
        """
        a, b, c, _ = statistics.backward_coefficients(total_dz, total_dz_centred, rstd, scale, count, True)
        return NormGradients(a, b, c, (rstd * sum_dz_centred).to(dtype), sum_dz.to(dtype, copy=True))

    def update_running(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        var: Tensor,
        bias: Tensor | None,
        momentum: float,
        batches: Tensor | None,
        correction: float,
    ) -> None:
        """``statistics.update_running`` of the mean, which ``bias`` is added to, and of ``correction·var``, in place.

        Args:
            batches (int64): how many were seen, this one too: the average is cumulative, and ``momentum`` does not count.
        """
        share = momentum if batches is None else batches.double().reciprocal()
        statistics.update_running(running_mean, mean if bias is None else mean + bias, share)
        statistics.update_running(running_var, var, share, correction)

    def fold(self, layers: Sequence[FrozenNorm], dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
        """``weight·s`` in channels_last and ``(bias − mean)·s + beta``, ``s = gamma / √(var + eps)``, of each layer, in float64,
        rounded once to ``dtype``; None for a layer that this backend has no launch for (here: all).

        Args:
            layers: on one device, filters of one dtype.
        """
        return [None] * len(layers)

    def through_covariance(
        self, weight: Tensor, mean: Tensor, cov: Tensor, unit: float, limit: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and variance of ``A Wᵀ``, which of them cannot be trusted (``statistics.ill_conditioned``), and the moments
        of A as they are kept (``statistics.pack_moments``), all in ``moments_dtype``.

        Args:
            weight (Tensor[K, C]): in the dtype of the activations.
            mean (Tensor[C]), cov (Tensor[C, C]): of ``Kernels.gram``.
        """
        dtype = moments_dtype(weight.dtype)
        w, mean, cov = weight.to(dtype), mean.to(dtype), cov.to(dtype)
        out_mean, out_var = statistics.through_covariance(w, mean, cov)
        flagged = statistics.ill_conditioned(w, mean, cov, out_var, unit, limit)
        return out_mean, out_var, flagged, statistics.pack_moments(mean, cov)

    def row_gradients(
        self,
        t: Tensor,
        weight: Tensor,
        moments: Tensor | None,
        sum_dz: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        count: int,
        norm_dtype: torch.dtype,
        weight_dtype: torch.dtype | None,
    ) -> RowGradients:
        """The backward of a 1×1 convolution and its batch norm from ``T = dzᵀ(A − ā)`` and ``Σ dz``.

        Args:
            t (Tensor[K, C]): of ``Kernels.wgrad_bn_act``.
            weight (Tensor[K, C]): in the dtype of the activations.
            moments: packed; None: frozen statistics, and T is ``dzᵀA``.
            sum_dz, mean, rstd, scale (Tensor[K]): in the accumulation dtype.
            norm_dtype, weight_dtype: of the gradients; None: that of the filter is not needed.
        """
        w = weight.to(t.dtype)
        sum_dz_centred = (w * t).sum(1)
        if moments is None:
            sum_dz_centred = sum_dz_centred - mean * sum_dz
        norm = self.norm_gradients(
            sum_dz, sum_dz_centred.to(mean.dtype), rstd, scale, count, moments is not None, norm_dtype
        )
        dweight: Tensor | None = None
        if weight_dtype is not None and moments is None:
            dweight = (norm.a[:, None] * t).to(weight_dtype)
        elif weight_dtype is not None and moments is not None:
            cov = statistics.unpack_moments(moments, weight.shape[1])[1].to(t.dtype)
            dweight = statistics.weight_gradient(t, norm.a, norm.b, count, w, cov).to(weight_dtype)
        return RowGradients(norm, dweight, self.scaled_filter(weight, scale), sum_dz / count)

    def row_gradients_over(
        self,
        t: Tensor,
        weight: Tensor,
        moments: Tensor,
        sum_dz: Tensor,
        norm: NormGradients,
        mean_dz: Tensor,
        scale: Tensor,
        count: int,
        weight_dtype: torch.dtype | None,
    ) -> RowGradients:
        """``row_gradients`` behind a norm whose batch statistics are those of several processes.

        Args:
            t (Tensor[K, C]): of this process's ``count`` rows, about the mean of all rows.
            moments: of ``statistics.recentre_moments``.
            sum_dz (Tensor[K]): of these rows. norm, mean_dz: of all rows.
        """
        dweight: Tensor | None = None
        if weight_dtype is not None:
            channels = weight.shape[1]
            packed, delta = moments[:-channels].to(t.dtype), moments[-channels:].to(t.dtype)
            mean, cov = statistics.unpack_moments(packed, channels)
            w, a, b, c = (v.to(t.dtype) for v in (weight, *norm[:3]))
            dweight = statistics.weight_gradient(t, a, b, count, w, cov)
            dweight += statistics.off_centre_gradient(a, b, c, sum_dz.to(t.dtype), count, w, mean, delta)
            dweight = dweight.to(weight_dtype)
        return RowGradients(norm, dweight, self.scaled_filter(weight, scale), mean_dz)

    def scaled_filter(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``diag(scale) W`` in the dtype of ``weight`` ``[K, C]``."""
        return (scale[:, None] * weight.to(scale.dtype)).to(weight.dtype)

    def feedback(self, a: Operand, weight: Tensor, moments: Tensor, rows: RowGradients) -> Feedback:
        """``G = Wᵀ diag(b) W`` as ``dgrad_bn_act`` multiplies it, and what takes the means away.

        Numerics: G is formed in ``moments_dtype``: where channels are correlated it cancels, and float32 would show in every
            pixel.
        """
        mean_a = moments[: weight.shape[1]]
        coupling = statistics.coupling(weight.to(moments.dtype), rows.norm.b.to(moments.dtype))
        return self.feedback_of(a, mean_a, coupling.to(acc_dtype(weight.dtype)), rows.scaled, rows.mean_dz)

    def feedback_of(self, a: Operand, mean_a: Tensor, coupling: Tensor, scaled: Tensor, mean_dz: Tensor) -> Feedback:
        """The feedback of a G in the accumulation dtype: half precision's in two parts, with their constant."""
        mean_a = mean_a.to(coupling.dtype)
        high, low = statistics.two_parts(coupling, scaled.dtype)
        if low is None:
            return Feedback(a, high, mean_a, mean_dz)
        summed = high.to(coupling.dtype) + low
        shift = statistics.coupling_shift(scaled, mean_dz, summed, mean_a)
        return Feedback(a, high, mean_a, mean_dz, low, shift)
