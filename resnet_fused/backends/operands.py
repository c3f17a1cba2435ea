"""What the kernel interface hands over: activations, some of them not yet formed, convolutions and terms of products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of ``dtype`` are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Conv:
    """Geometry of a 2-D convolution with zero padding."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_shape(self, x_shape: torch.Size | tuple, weight_shape: torch.Size | tuple) -> tuple:
        """``[N, K, P, Q]`` of the convolution of ``[N, C, H, W]`` with ``[K, C / groups, R, S]``."""
        spatial = (
            (x_shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (weight_shape[2 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        return (x_shape[0], weight_shape[0], *spatial)


@dataclass(frozen=True)
class Pending:
    """An activation not yet applied: ``act(scale·y + shift)``, formed in the prologue of the kernel that loads it."""

    y: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool


@dataclass(frozen=True)
class PendingGrad:
    """A gradient at a raw output not yet formed: ``dy = a·dz + b·(y − mean) + c``, dz counting where ``mask``.

    Attributes:
        dz, y: activations ``[N, K, P, Q]`` of one dtype.
        mean, a, b, c (Tensor[K]): in the accumulation dtype.
        mask: one bit for each element of dz; None: everywhere.
    """

    dz: Tensor
    y: Tensor
    mean: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    mask: Tensor | None = None


# What a product reads: only a backend whose kernels have such a prologue makes what is pending.
Operand = Tensor | Pending
Gradient = Tensor | PendingGrad


def source(a: Operand | Gradient) -> Tensor:
    """The tensor behind what is read."""
    return a.y if isinstance(a, (Pending, PendingGrad)) else a


@dataclass(frozen=True)
class Product:
    """One term of an output: ``scale ∘ conv(a, weight)``, a 1×1 convolution without groups or padding.

    Attributes:
        a: activations ``[N, C, H, W]``.
        weight (Tensor[K, C, 1, 1]): in the dtype of the activations.
        conv: its stride.
        scale (Tensor[K], optional): in the accumulation dtype.
    """

    a: Operand
    weight: Tensor
    conv: Conv
    scale: Tensor | None = None


@dataclass(frozen=True)
class Feedback:
    """What the gradient of batch statistics sends back to a convolution's input: ``(A − mean_a)·G − mean_dz·weight``.

    Attributes:
        a: the input A, activations ``[N, C, H, W]``.
        coupling (Tensor[C, C]): ``G = Wᵀ diag(b) W``, symmetric, in the dtype of A.
        mean_a (Tensor[C]): mean of A's rows. mean_dz (Tensor[K]): mean of the rows of dz; in the accumulation dtype.
        low (Tensor[C, C]), shift (Tensor[C]): in half precision, else None. What G was rounded by (``statistics.two_parts``):
            where channels are correlated A·G cancels, and one rounding would show. And what takes the means away, as operands
            cannot be centred (``statistics.coupling_shift``): it is added in their place.
    """

    a: Operand
    coupling: Tensor
    mean_a: Tensor
    mean_dz: Tensor
    low: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Below:
    """The batch norm and ReLU in front of a convolution, as the backward meets them.

    Attributes:
        y: the raw output ``[N, C, H, W]``.
        mean, scale, shift (Tensor[C]): in the accumulation dtype.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool


@dataclass(frozen=True)
class NormGrad:
    """A gradient that reached a batch norm and its ReLU from behind, with the sums that its backward needs.

    Attributes:
        grad: dz where ``mask`` (everywhere without one), and with ``relu`` where the activation, formed again, lets it pass.
        sum_dz, sum_dz_centred (Tensor[C]): ``Σ dz`` and ``Σ dz·(y − mean)``.
        activation: what the ReLU made, for the next wgrad; None where nobody asked.
    """

    grad: Tensor
    mask: Tensor | None
    relu: bool
    sum_dz: Tensor
    sum_dz_centred: Tensor
    activation: Operand | None = None


def is_pointwise(weight: Tensor, conv: Conv) -> bool:
    """A 1×1 convolution without groups or padding: a product of matrices."""
    return tuple(weight.shape[2:]) == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def filter_matrix(weight: Tensor) -> Tensor:
    """A 1×1 filter ``[K, C, 1, 1]`` as the matrix ``[K, C]``."""
    return weight.reshape(weight.shape[:2])
