"""A Sequential that fuses neighbours among its children as it finds them at each call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, layers


def is_plain_conv(module: Any) -> bool:
    """Exactly nn.Conv2d with zero padding given as numbers."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_plain_norm(module: Any) -> bool:
    """Exactly nn.BatchNorm2d, a synchronised or a frozen one, with affine parameters and running statistics."""
    return dispatch.is_batch_norm(module) and dispatch.has_values(module)


def is_stem_pool(module: Any) -> bool:
    """Exactly nn.MaxPool2d(3, stride=2, padding=1)."""
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(size in (want, (want, want)) for size, want in zip(sizes, (3, 2, 1, 1)))


def neighbours(children: list[nn.Module]) -> Iterator[tuple[str, int, int]]:
    """Cuts a Sequential into runs (kind, start, end); kind is "units" (conv→bn(→ReLU) repeated), "stem", "bn-relu" or ""."""
    i, count = 0, len(children)
    while i < count:
        start, last_unit, last_act = i, i, False
        while i + 1 < count and is_plain_conv(children[i]) and is_plain_norm(children[i + 1]):
            last_unit, last_act = i, i + 2 < count and type(children[i + 2]) is nn.ReLU
            i += 3 if last_act else 2
        if i > start and last_act and i < count and is_stem_pool(children[i]):
            if last_unit > start:
                yield "units", start, last_unit
            yield "stem", last_unit, i + 1
            i += 1
        elif i > start:
            yield "units", start, i
        elif is_plain_norm(children[i]) and i + 1 < count and type(children[i + 1]) is nn.ReLU:
            yield "bn-relu", i, i + 2
            i += 2
        else:
            yield "", i, i + 1
            i += 1


def _triples(children: list[nn.Module]) -> tuple[layers.ConvNormAct, ...]:
    triples, i = [], 0
    while i < len(children):
        act = children[i + 2] if i + 2 < len(children) and type(children[i + 2]) is nn.ReLU else None
        triples.append((children[i], children[i + 1], act))
        i += 2 if act is None else 3
    return tuple(triples)


class FusedSequential(nn.Sequential):
    """nn.Sequential in which conv→bn(→ReLU)(→MaxPool2d(3, 2, 1)) and bn→ReLU run as one operation each.

    ``fuse`` turns a Sequential into this class in place. The children are looked at on every call, so append, slicing,
    replacing and hooks behave as in nn.Sequential.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or torch.jit.is_tracing():
            return super().forward(input)
        children, x = list(self._modules.values()), input
        for kind, start, end in neighbours(children):  # type: ignore[arg-type]
            run = children[start:end]
            if kind == "units":
                x = layers.run_units(x, _triples(run))  # type: ignore[arg-type]
            elif kind == "stem":
                x = layers.run_stem(x, *run)  # type: ignore[arg-type]
            elif kind == "bn-relu":
                x = layers.run_bn_act(x, *run)  # type: ignore[arg-type]
            else:
                x = run[0](x)  # type: ignore[misc]
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
