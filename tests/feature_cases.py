"""Steps of networks that return several tensors, in lists or by name."""

from __future__ import annotations

from typing import Any

import torch
from stock_pairs import assert_same, images
from torch import Tensor, nn


def flattened(out: Any) -> dict[str, Tensor]:
    """The tensors in a result, by their place."""
    if isinstance(out, Tensor):
        return {"out": out}
    items = out.items() if isinstance(out, dict) else enumerate(out)
    return {f"{key}.{name}": t for key, value in items for name, t in flattened(value).items()}


def step(model: nn.Module, x: Tensor, method: str = "__call__", **kwargs: Any) -> dict[str, Tensor]:
    """Outputs, all gradients and buffers by name, after one forward and backward with the same random draws."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    outputs = flattened(getattr(model, method)(x, **kwargs))
    sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs.values()).backward()  # type: ignore[union-attr]
    found = {name: t.detach() for name, t in outputs.items()} | {"x grad": x.grad}
    found |= {f"{name} grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_steps(ours: nn.Module, stock: nn.Module, x: Tensor | None = None, **kwargs: Any) -> None:
    """Training, then evaluation with the statistics that it left."""
    x = images() if x is None else x
    assert_same(step(ours.train(), x, **kwargs), step(stock.train(), x, **kwargs))
    assert_same(step(ours.eval(), x, **kwargs), step(stock.eval(), x, **kwargs))
