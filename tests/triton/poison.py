"""Memory in which a kernel's mistakes show: inputs between NaN, outputs that hold NaN before they are written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_EDGE = 128


def guarded(t: Tensor, guard: float = math.nan) -> Tensor:
    """``t`` in channels_last, in the middle of memory full of ``guard``; 16 bytes aligned."""
    memory = torch.full((t.numel() + 2 * _EDGE,), guard, dtype=t.dtype)
    n, c, h, w = t.shape
    return memory[_EDGE:-_EDGE].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def poison_allocations(monkeypatch: pytest.MonkeyPatch, integer: int) -> None:
    """Memory that nobody wrote holds NaN, and ``integer`` where it has no NaN."""

    def fill(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args, **kwargs) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(math.nan if out.is_floating_point() else integer)

        return poisoned

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))
