"""What a chain is made of, and its flat form for PyTorch's dispatcher, which knows only tensors, integers and floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from ..backends.operands import Conv


class Shortcut(IntEnum):
    """What is added to the last unit's output."""

    NONE = 0
    IDENTITY = 1  # the chain's own input
    TENSOR = 2  # another tensor
    PROJECTION = 3  # a convolution and batch norm of the chain's input


class Tail(IntEnum):
    """What follows the last unit and the shortcut."""

    NONE = 0
    RELU = 1
    RELU_MAXPOOL = 2  # 3×3, stride 2, padding 1


@dataclass(frozen=True)
class Unit:
    """``[conv →] batch norm [→ ReLU]``.

    Attributes:
        weight (Tensor[K, C / groups, R, S], optional): without it the unit is a batch norm alone.
        conv_bias (Tensor[K], optional): the convolution's own bias.
        bn_weight, bn_bias (Tensor[K]).
        running_mean, running_var (Tensor[K], optional): needed unless ``training``.
        conv: geometry of the convolution; None exactly when ``weight`` is.
        training: batch statistics; else ``running_mean`` and ``running_var``.
        relu: the ReLU between this unit and the next (the last unit's is the chain's tail).
        covariance: batch statistics from the covariance of the input, and no raw output; ``plans.choice`` decides.
        synchronised: batch statistics over the rows of all processes of ``Chain.group``.
    """

    weight: Tensor | None
    conv_bias: Tensor | None
    bn_weight: Tensor
    bn_bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    conv: Conv | None
    training: bool
    relu: bool
    eps: float
    covariance: bool = False
    synchronised: bool = False

    @property
    def channels(self) -> int:
        return self.bn_weight.shape[0]

    def parameters(self) -> list[Tensor]:
        """The differentiable tensors, in the order of the gradients."""
        return [p for p in (self.weight, self.conv_bias, self.bn_weight, self.bn_bias) if p is not None]


@dataclass(frozen=True)
class Chain:
    """Units one behind the other, a shortcut around them, and a tail. A projection is the last of ``units``.

    ``group`` names the processes of the synchronised units (``collectives.group_of``).
    """

    units: tuple[Unit, ...]
    shortcut: Shortcut
    tail: Tail
    group: str = ""

    @property
    def path(self) -> tuple[Unit, ...]:
        """The units without the projection."""
        return self.units[:-1] if self.shortcut == Shortcut.PROJECTION else self.units

    @property
    def saves_mask(self) -> bool:
        """Whether the backward needs the output's ReLU mask: without a shortcut a raw output is enough to form it again."""
        return self.tail == Tail.RELU and (self.shortcut != Shortcut.NONE or self.path[-1].covariance)

    @property
    def synchronised(self) -> bool:
        return any(unit.synchronised for unit in self.units)

    def parameters(self) -> list[Tensor]:
        return [p for unit in self.units for p in unit.parameters()]

    def flatten(self) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
        """``(parameters, running statistics of the frozen units, integers, eps)``; ``unflatten`` is the inverse.

        The name of the group is a string of its own.
        """
        running = [t for unit in self.units if not unit.training for t in (unit.running_mean, unit.running_var)]
        integers = [int(self.shortcut), int(self.tail)]
        for unit in self.units:
            conv = unit.conv or Conv()
            integers += [unit.weight is not None, unit.conv_bias is not None, unit.training, unit.relu]
            integers += [unit.covariance, unit.synchronised]
            integers += [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
        return (
            self.parameters(),
            [t for t in running if t is not None],
            [int(i) for i in integers],
            [unit.eps for unit in self.units],
        )


_INTEGERS_PER_UNIT = 13


def unflatten(
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    integers: Sequence[int],
    eps: Sequence[float],
    group: str = "",
) -> Chain:
    """The chain that ``Chain.flatten`` took apart; the backward knows no running statistics and passes none."""
    tensors, statistics = iter(parameters), iter(running)
    units = []
    for i, unit_eps in enumerate(eps):
        start = 2 + i * _INTEGERS_PER_UNIT
        flags, geometry = integers[start : start + 6], integers[start + 6 : start + _INTEGERS_PER_UNIT]
        has_weight, has_bias, training, relu, covariance, synchronised = flags
        conv = Conv((geometry[0], geometry[1]), (geometry[2], geometry[3]), (geometry[4], geometry[5]), geometry[6])
        units.append(
            Unit(
                weight=next(tensors) if has_weight else None,
                conv_bias=next(tensors) if has_bias else None,
                bn_weight=next(tensors),
                bn_bias=next(tensors),
                running_mean=None if training else next(statistics, None),
                running_var=None if training else next(statistics, None),
                conv=conv if has_weight else None,
                training=bool(training),
                relu=bool(relu),
                eps=unit_eps,
                covariance=bool(covariance),
                synchronised=bool(synchronised),
            )
        )
    return Chain(tuple(units), Shortcut(integers[0]), Tail(integers[1]), group)
