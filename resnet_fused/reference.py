"""The plainest PyTorch version of what the operators compute: differentiable any number of times, on any device."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .plans.spec import Chain, Shortcut, Tail, Unit

Running = tuple[Tensor | None, Tensor | None]


def unit(x: Tensor, u: Unit, running: Running = (None, None), momentum: float = 0.0) -> Tensor:
    """Convolution and batch norm of one unit, without its ReLU; in training ``running`` is updated."""
    if u.conv is not None:
        assert u.weight is not None
        c = u.conv
        bias = None if u.conv_bias is None else u.conv_bias.to(x.dtype)
        x = F.conv2d(x, u.weight.to(x.dtype), bias, c.stride, c.padding, c.dilation, c.groups)
    statistics = running if u.training else (u.running_mean, u.running_var)
    return F.batch_norm(x, *statistics, u.bn_weight, u.bn_bias, u.training, momentum, u.eps)


def chain(
    x: Tensor, residual: Tensor | None, c: Chain, running: Running = (None, None), momentum: float = 0.0
) -> Tensor:
    """The whole chain. ``running``: mean and variance, which a chain of one unit updates in training."""
    y = x
    for i, u in enumerate(c.path):
        y = unit(y, u, running, momentum)
        if u.relu and i < len(c.path) - 1:
            y = F.relu(y)
    if c.shortcut == Shortcut.IDENTITY:
        y = y + x
    elif c.shortcut == Shortcut.PROJECTION:
        y = y + unit(x, c.units[-1])
    elif residual is not None:
        y = y + residual
    if c.tail != Tail.NONE:
        y = F.relu(y)
    return F.max_pool2d(y, 3, 2, 1) if c.tail == Tail.RELU_MAXPOOL else y


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)``."""
    return F.relu(a + b)
