"""The units of a stock ResNet, read off one forward without data: convolutions, each with its batch norm, ReLU and addition."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused.backends.operands import Conv
from resnet_fused.networks import stock_model
from resnet_fused.plans import choice, spec

SIZE = 2  # bytes of an element


@dataclass(frozen=True)
class Unit:
    """A convolution ``[K, C / groups, R, R]`` of ``[N, C, H, W]`` to ``[N, K, P, Q]``; tensors in bytes."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    p: int
    q: int
    r: int = 1
    stride: int = 1
    groups: int = 1
    covariance: bool = False

    @property
    def stage(self) -> str:
        return self.name.split(".")[0] if "." in self.name else {"conv1": "stem"}.get(self.name, "head")

    @property
    def role(self) -> str:
        return "downsample" if "downsample" in self.name else self.name.split(".")[-1]

    @property
    def rows(self) -> int:
        return self.n * self.p * self.q

    @property
    def x(self) -> int:
        return self.n * self.c * self.h * self.w * SIZE

    @property
    def read(self) -> int:
        """Of x, what the convolution reads."""
        return self.rows * self.c * SIZE if self.r == 1 else self.x

    @property
    def y(self) -> int:
        return self.rows * self.k * SIZE

    @property
    def weight(self) -> int:
        return self.k * self.c // self.groups * self.r**2 * SIZE

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.k * self.c // self.groups * self.r**2

    @property
    def is_pointwise(self) -> bool:
        return self.r == 1 and self.groups == 1


@dataclass(frozen=True)
class Block:
    """Units one behind the other, with the projection of their shortcut if there is one. ``pooled``: the stem, which ends in max
    pooling and has no shortcut; ``last``: one gradient reaches its output, elsewhere two."""

    path: tuple[Unit, ...]
    projection: Unit | None = None
    pooled: bool = False
    last: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.path if self.projection is None else (*self.path, self.projection)


@dataclass(frozen=True)
class Network:
    blocks: tuple[Block, ...]
    head: Unit

    @property
    def units(self) -> list[Unit]:
        return [unit for block in self.blocks for unit in block.units]


Shapes = dict[str, tuple[torch.Size, torch.Size]]


def _walk(name: str, batch: int, size: int) -> tuple[nn.Module, Shapes]:
    """The stock network, and input and output shape of each convolution and of the average pool; no data exists."""
    shapes: Shapes = {}

    def note(label: str, module: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
        shapes[label] = x[0].shape, y.shape

    with torch.device("meta"):
        model = stock_model(name)
        for label, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.AdaptiveAvgPool2d):
                module.register_forward_hook(functools.partial(note, label))
        model(torch.empty(batch, 3, size, size))
    return model, shapes


def _covariance(convolutions: Sequence[nn.Conv2d], shortcut: spec.Shortcut, tail: spec.Tail) -> list[bool]:
    """Which of a chain's convolutions follow the covariance plan, as the library chooses."""
    units = []
    for conv in convolutions:
        vector = conv.weight[:, 0, 0, 0]
        geometry = Conv(conv.stride, conv.padding, conv.dilation, conv.groups)
        units.append(spec.Unit(conv.weight, None, vector, vector, None, None, geometry, True, True, 1e-5))
    return [unit.covariance for unit in choice.choose_plans(spec.Chain(tuple(units), shortcut, tail)).units]


def _units(
    labels: Sequence[str], model: nn.Module, shapes: Shapes, shortcut: spec.Shortcut, tail: spec.Tail
) -> list[Unit]:
    convolutions = [model.get_submodule(label) for label in labels]
    units = []
    for label, conv, covariance in zip(labels, convolutions, _covariance(convolutions, shortcut, tail), strict=True):
        (n, c, h, w), (_, k, p, q) = shapes[label]
        units.append(Unit(label, n, c, h, w, k, p, q, conv.kernel_size[0], conv.stride[0], conv.groups, covariance))
    return units


def read_network(name: str, batch: int, size: int) -> Network:
    """The units of ``stock_model(name)`` on images ``[batch, 3, size, size]``."""
    model, shapes = _walk(name, batch, size)
    stem = _units(["conv1"], model, shapes, spec.Shortcut.NONE, spec.Tail.RELU_MAXPOOL)
    blocks = [Block(tuple(stem), pooled=True)]
    names = [label for label, module in model.named_modules() if label and hasattr(module, "conv2")]
    for label in names:
        path = [conv for conv in (f"{label}.conv{i}" for i in (1, 2, 3)) if conv in shapes]
        projection = [conv for conv in (f"{label}.downsample.0",) if conv in shapes]
        shortcut = spec.Shortcut.PROJECTION if projection else spec.Shortcut.IDENTITY
        units = _units(path + projection, model, shapes, shortcut, spec.Tail.RELU)
        found = units.pop() if projection else None
        blocks.append(Block(tuple(units), found, last=label == names[-1]))
    n, c, h, w = shapes["avgpool"][0]
    return Network(tuple(blocks), Unit("fc", n, c, h, w, model.fc.out_features, 1, 1))
