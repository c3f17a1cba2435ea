"""What the kernels read: activations as matrices of rows, some of them formed while they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Operand, Pending


@dataclass(frozen=True)
class PendingGrad:
    """The gradient at a raw output, formed when it is loaded: ``dy = a·dz + b·(y − mean) + c``.

    Attributes:
        dz, y: activations ``[N, K, P, Q]`` of one dtype.
        mean, a, b, c (Tensor[K]): in float32.
    """

    dz: Tensor
    y: Tensor
    mean: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Below:
    """The batch norm and ReLU in front of a convolution, whose backward joins the epilogue of the input gradient.

    With ``da`` the gradient of the activation: ``dz = da where !(scale·y + shift <= 0)`` (everywhere without ``relu``), and
    ``Σ dz`` and ``Σ dz·(y − mean)`` per channel, of dz as it was rounded.

    Attributes:
        y: the raw output ``[N, C, H, W]``.
        mean, scale, shift (Tensor[C]): in float32.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    relu: bool


def source(a: Operand) -> Tensor:
    """The tensor behind an operand."""
    return a.y if isinstance(a, Pending) else a


def check_dense(x: Tensor) -> Tensor:
    """``x``, dense in channels_last: its memory is the matrix ``[N·H·W, C]``.

    Raises:
        ValueError: it is not.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected a tensor dense in channels_last, got shape {tuple(x.shape)}, strides {x.stride()}")
    return x
