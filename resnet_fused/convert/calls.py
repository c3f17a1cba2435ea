"""What rewritten graphs call beside ``resnet_fused.layers.run_*``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .. import dispatch, layers

_STEM_POOL = nn.MaxPool2d(3, 2, 1)


def functional_relu() -> Callable[[Tensor], Tensor]:
    """The activation where the forward called a ReLU function."""
    return F.relu


def stem_pool() -> nn.MaxPool2d:
    """The pool where the forward called ``F.max_pool2d(x, 3, 2, 1)``."""
    return _STEM_POOL


# ``y += residual`` keeps the dtype of y, where ``y + residual`` promotes: under autocast, or with mixed inputs.


def run_units_in_place(
    x: Tensor, units: Sequence[layers.ConvNormAct], *, residual: Tensor, act: layers.Activation
) -> Tensor:
    """``layers.run_units`` for a forward that wrote ``y += residual``."""
    if residual.dtype != (dispatch.autocast_dtype(x) or x.dtype):
        y = layers.run_units(x, units)
        y += residual
        return y if act is None else act(y)
    return layers.run_units(x, units, residual=residual, act=act)


def run_bn_act_in_place(x: Tensor, bn: nn.Module, act: layers.Activation, residual: Tensor) -> Tensor:
    """``layers.run_bn_act`` for a forward that wrote ``y += residual``."""
    if residual.dtype != x.dtype:
        y = bn(x)
        y += residual
        return y if act is None else act(y)
    return layers.run_bn_act(x, bn, act, residual)


def run_add_act_in_place(a: Tensor, b: Tensor, act: layers.Activation) -> Tensor:
    """``layers.run_add_act`` for a forward that wrote ``a += b``, where no one else sees a."""
    if a.dtype != b.dtype:
        a += b
        return a if act is None else act(a)
    return layers.run_add_act(a, b, act)
