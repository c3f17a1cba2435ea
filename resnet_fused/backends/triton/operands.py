"""What the kernels read: activations as matrices of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dense(x: Tensor) -> Tensor:
    """``x``, dense in channels_last: its memory is the matrix ``[N·H·W, C]``.

    Raises:
        ValueError: it is not.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected a tensor dense in channels_last, got shape {tuple(x.shape)}, strides {x.stride()}")
    return x
