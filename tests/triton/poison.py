"""Memory in which a kernel's mistakes show: inputs between NaN, outputs that hold NaN before they are written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def guarded(t: Tensor, guard: float = math.nan, edge: int = 128) -> Tensor:
    """A copy of ``t`` (images in channels_last) between ``edge`` elements of ``guard``; 16 bytes aligned."""
    memory = torch.full((t.numel() + 2 * edge,), guard, dtype=t.dtype)
    inner = memory[edge : edge + t.numel()]
    if t.dim() != 4:
        return inner.view(t.shape).copy_(t)
    n, c, h, w = t.shape
    return inner.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


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
