"""The plainest PyTorch version of what the operators compute: differentiable any number of times, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import collectives
from .plans.spec import Chain, Shortcut, Tail, Unit

Running = tuple[Tensor | None, Tensor | None]


def synchronised_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm over the rows of all processes; and their mean, biased variance ``[C]`` and number ``[1]``, in float64 where
    x is, else float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    here = torch.full((1,), float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
    axes = [0, *range(2, x.dim())]
    by_channel = [1, -1] + [1] * (x.dim() - 2)
    sums, rows = collectives.totals([wide.sum(axes, dtype=torch.float64), here], group)
    mean = (sums / rows).to(dtype)
    centred = wide - mean.view(by_channel)
    (squares,) = collectives.totals([centred.square().sum(axes, dtype=torch.float64)], group)
    var = (squares / rows).to(dtype)
    y = centred * torch.rsqrt(var + eps).view(by_channel)
    if weight is not None:
        y = y * weight.view(by_channel)
    if bias is not None:
        y = y + bias.view(by_channel)
    return y.to(x.dtype), mean, var, rows


def unit(x: Tensor, u: Unit, running: Running = (None, None), momentum: float = 0.0, group: str = "") -> Tensor:
    """Convolution and batch norm of one unit, without its ReLU; in training ``running`` is updated."""
    if u.conv is not None:
        assert u.weight is not None
        c = u.conv
        bias = None if u.conv_bias is None else u.conv_bias.to(x.dtype)
        x = F.conv2d(x, u.weight.to(x.dtype), bias, c.stride, c.padding, c.dilation, c.groups)
    if u.synchronised:
        return synchronised_norm(x, u.bn_weight, u.bn_bias, u.eps, group)[0]
    statistics = running if u.training else (u.running_mean, u.running_var)
    return F.batch_norm(x, *statistics, u.bn_weight, u.bn_bias, u.training, momentum, u.eps)


def chain(
    x: Tensor, residual: Tensor | None, c: Chain, running: Running = (None, None), momentum: float = 0.0
) -> Tensor:
    """The whole chain. ``running``: mean and variance, which a chain of one unit updates in training."""
    y = x
    for i, u in enumerate(c.path):
        y = unit(y, u, running, momentum, c.group)
        if u.relu and i < len(c.path) - 1:
            y = F.relu(y)
    if c.shortcut == Shortcut.IDENTITY:
        y = y + x
    elif c.shortcut == Shortcut.PROJECTION:
        y = y + unit(x, c.units[-1], group=c.group)
    elif residual is not None:
        y = y + residual
    if c.tail != Tail.NONE:
        y = F.relu(y)
    return F.max_pool2d(y, 3, 2, 1) if c.tail == Tail.RELU_MAXPOOL else y


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)``."""
    return F.relu(a + b)
