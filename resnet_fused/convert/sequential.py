"""A Sequential that fuses neighbours among its children as it finds them at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import layers


def is_plain_conv(module: Any) -> bool:
    """Exactly nn.Conv2d with zero padding given as numbers."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_plain_norm(module: Any) -> bool:
    """Exactly nn.BatchNorm2d with parameters and running statistics."""
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats


def is_stem_pool(module: Any) -> bool:
    """Exactly nn.MaxPool2d(3, stride=2, padding=1)."""
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(size in (want, (want, want)) for size, want in zip(sizes, (3, 2, 1, 1)))


def starts_pattern(children: list[nn.Module], i: int) -> bool:
    """Whether conv→bn or bn→ReLU begins at child ``i``."""
    first, second = children[i], children[i + 1] if i + 1 < len(children) else None
    return is_plain_conv(first) and is_plain_norm(second) or is_plain_norm(first) and type(second) is nn.ReLU


class FusedSequential(nn.Sequential):
    """nn.Sequential in which conv→bn(→ReLU)(→MaxPool2d(3, 2, 1)) and bn→ReLU run as one operation each.

    ``fuse`` turns a Sequential into this class in place. The children are looked at on every call, so append, slicing,
    replacing and hooks behave as in nn.Sequential.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or torch.jit.is_tracing():
            return super().forward(input)
        children = list(self._modules.values())
        x, i = input, 0
        while i < len(children):
            units: list[tuple[nn.Module, nn.Module, nn.Module | None]] = []
            pool = None
            while i + 1 < len(children) and is_plain_conv(children[i]) and is_plain_norm(children[i + 1]):
                act = children[i + 2] if i + 2 < len(children) and type(children[i + 2]) is nn.ReLU else None
                units.append((children[i], children[i + 1], act))
                i += 2 if act is None else 3
            if units and units[-1][2] is not None and i < len(children) and is_stem_pool(children[i]):
                pool = (*units.pop(), children[i])
                i += 1
            if units:
                x = layers.run_units(x, tuple(units))
            if pool is not None:
                x = layers.run_stem(x, *pool)
            if units or pool is not None:
                continue
            if starts_pattern(children, i):
                x = layers.run_bn_act(x, children[i], children[i + 1])
                i += 2
            else:
                x = children[i](x)
                i += 1
        return x

    def _get_name(self) -> str:
        return "Sequential"

    def __prepare_scriptable__(self) -> nn.Sequential:
        return stock_tree(self)  # type: ignore[return-value]


def stock_tree(module: nn.Module) -> nn.Module:
    """New module objects of the stock classes, with the same parameters, buffers and attributes; for torch.jit.script."""
    memo: dict[int, nn.Module] = {}

    def build(old: nn.Module) -> nn.Module:
        if id(old) not in memo:
            stock = nn.Sequential if isinstance(old, FusedSequential) else getattr(type(old), "_stock_class", type(old))
            new = memo[id(old)] = object.__new__(stock)
            new.__dict__.update(old.__dict__)
            new.__dict__["_modules"] = {k: v if v is None else build(v) for k, v in old._modules.items()}
        return memo[id(old)]

    return build(module)
