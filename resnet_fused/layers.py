"""Fused calls of ordinary modules, and layers built on them for other people's networks.

``run_units``, ``run_stem``, ``run_bn_act`` and ``run_add_act`` take modules and look at them at every call. They run the
fused operator where it gives the stock result, and otherwise call the modules themselves, one by one: under fx, jit and ONNX
tracing, functorch and forward-mode AD; with hooks, parametrisations or subclasses; with dtypes, devices or shapes that only
stock PyTorch accepts or that it refuses (so that its own error is raised).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends, collectives, dispatch, operators, routes
from .dispatch import Activation
from .functional import check_values_per_channel
from .plans.spec import Chain, Conv, Shortcut, Tail, Unit

ConvNorm = tuple[nn.Module, nn.Module]
ConvNormAct = tuple[nn.Module, nn.Module, Activation]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _group(norms: Sequence[nn.Module]) -> str | None:
    """Over whose rows the batch statistics go: "" for this process alone; None where the norms disagree.

    A compiled graph is for any number of processes, and finds out when it runs.
    """
    names = [dispatch.group_name(bn) for bn in norms if bn.training]
    names = [name for name in names if name]
    if not names:
        return ""
    if any(name != names[0] for name in names):
        return None
    return names[0] if torch.compiler.is_compiling() or collectives.is_active(names[0]) else ""


def _unit(conv: nn.Conv2d | None, bn: nn.BatchNorm2d, act: Activation, group: str) -> Unit:
    geometry = None
    if conv is not None:
        geometry = Conv(_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation), conv.groups)
    return Unit(
        weight=None if conv is None else conv.weight,
        conv_bias=None if conv is None else conv.bias,
        bn_weight=bn.weight,
        bn_bias=bn.bias,
        running_mean=bn.running_mean,
        running_var=bn.running_var,
        conv=geometry,
        training=bn.training and not dispatch.is_frozen_norm(bn),
        relu=act is not None,
        eps=bn.eps,
        synchronised=bn.training and group != "" and dispatch.group_name(bn) == group,
    )


def _frozen_promote(norms: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether a ``FrozenBatchNorm2d`` would turn activations of ``dtype`` into a wider one, which is that of its buffers."""
    return any(dispatch.is_frozen_norm(bn) and bn.weight.dtype != dtype for bn in norms)


def _fits(x: Tensor, units: Sequence[Unit], projection: Unit | None, dtype: torch.dtype) -> bool:
    """Whether channels, dtypes and devices agree as the operators need them to."""
    channels = x.shape[1]
    paths: list[tuple[Sequence[Unit], int]] = [(units, channels), ([projection] if projection else [], channels)]
    for path, width in paths:
        for unit in path:
            if unit.weight is not None:
                if unit.weight.shape[1] * unit.conv.groups != width:  # type: ignore[union-attr]
                    return False
                if unit.weight.dtype != dtype and dispatch.autocast_dtype(x) is None:
                    return False
                if unit.conv_bias is not None and unit.conv_bias.dtype != unit.weight.dtype:
                    return False
                width = unit.weight.shape[0]
            parameters = [*unit.parameters(), unit.running_mean, unit.running_var]
            if unit.channels != width or any(p is None or p.device != x.device for p in parameters):
                return False
            norm_dtypes = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
            if unit.bn_weight.dtype not in norm_dtypes or unit.bn_bias.dtype != unit.bn_weight.dtype:
                return False
    return True


def _update_statistics(
    backend: str, bn: nn.BatchNorm2d, conv: nn.Conv2d | None, mean: Tensor, var: Tensor, count: int | Tensor
) -> None:
    """Running statistics and ``num_batches_tracked`` as ``nn.BatchNorm2d`` keeps them; ``var`` is biased.

    ``count``: rows; of all processes a tensor ``[C]``, which the host does not wait for.
    """
    correction = 1.0
    if isinstance(count, Tensor):
        var = var * (count / (count - 1))
    else:
        correction = count / (count - 1)
    batches: Tensor | None = None
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        batches = bn.num_batches_tracked if bn.momentum is None else None
    backends.for_running_statistics(backend).update_running(
        bn.running_mean,
        bn.running_var,
        mean,
        var,
        None if conv is None else conv.bias,
        bn.momentum or 0.0,
        batches,
        correction,
    )


def _run_chain(
    x: Tensor,
    units: Sequence[tuple[nn.Module | None, nn.Module, Activation]],
    residual: Tensor | None,
    projection: ConvNorm | None,
    tail: Tail,
) -> Tensor | None:
    """The chain as one operator, running statistics updated; None where only the plain path gives the stock result."""
    norms = [bn for _, bn, _ in units] + ([projection[1]] if projection else [])
    group = _group(norms)
    if group is None or (x.shape[0] == 0 and not group):
        return None
    specs = tuple(_unit(*unit, group) for unit in units)
    projected = _unit(*projection, None, group) if projection is not None else None
    has_convolution = specs[0].conv is not None
    cast = dispatch.autocast_dtype(x) if has_convolution else None
    dtype = x.dtype
    if cast is not None and cast != dtype:
        if dtype == torch.float64 or residual is not None:
            return None
        dtype = cast
    if _frozen_promote(norms, dtype) or not _fits(x, specs, projected, dtype):
        return None
    identity = residual is x
    if residual is None:
        shortcut = Shortcut.NONE if projected is None else Shortcut.PROJECTION
    else:
        shortcut = Shortcut.IDENTITY if identity else Shortcut.TENSOR
        if residual.dtype != dtype or residual.device != x.device or not dispatch.is_activation(residual, bool(group)):
            return None

    shapes = []
    shape: Any = x.shape
    for spec in specs:
        shape = shape if spec.conv is None else spec.conv.output_shape(shape, spec.weight.shape)
        if shape[2] < 1 or shape[3] < 1:
            return None
        shapes.append(shape)
    out_shape = shape
    if projected is not None:
        projected_shape = projected.conv.output_shape(x.shape, projected.weight.shape)
        if tuple(projected_shape[1:]) != tuple(out_shape[1:]):
            return None
        shapes.append(projected_shape)
    if residual is not None and tuple(residual.shape) != tuple(out_shape):
        return None
    chain = Chain(specs if projected is None else (*specs, projected), shortcut, tail, group)
    for spec, shape in zip(chain.units, shapes, strict=True):
        if spec.training and not spec.synchronised:
            check_values_per_channel(shape)

    route = routes.of_chain(chain, x, dtype, operators.saves(x, residual, chain))
    if route.backend == routes.STOCK:
        return None
    x = x.to(dtype)
    out, statistics = operators.chain(x, None if identity else residual, chain, route)
    modules = [*units] if projection is None else [*units, (*projection, None)]
    if not any(spec.training for spec in chain.units):
        return out  # an empty region without gradients would be a node that torch.export refuses
    with torch.no_grad():
        for (conv, bn, _), spec, shape, stats in zip(modules, chain.units, shapes, statistics, strict=False):
            if spec.training:
                mean, var, *rows = stats
                count = rows[0] if spec.synchronised else shape[0] * shape[2] * shape[3]
                _update_statistics(route.backend, bn, conv, mean, var, count)  # type: ignore[arg-type]
    return out


def _is_fusable(x: Any, convs: Sequence[nn.Module], norms: Sequence[nn.Module], acts: Sequence[Activation]) -> bool:
    return (
        not dispatch.transforms_active(x)
        and dispatch.is_activation(x, any(bn.training and dispatch.group_name(bn) for bn in norms))
        and not dispatch.any_global_hooks()
        and all(dispatch.conv_is_plain(conv) for conv in convs)
        and all(dispatch.norm_is_plain(bn) for bn in norms)
        and all(dispatch.act_is_plain(act) for act in acts)
    )


def run_units(
    x: Tensor,
    units: Sequence[ConvNormAct],
    *,
    residual: Tensor | None = None,
    projection: ConvNorm | None = None,
    act: Activation = None,
) -> Tensor:
    """``y = act(bn(conv(y)))`` for each unit, starting at x; then ``act(y + shortcut)`` where there is a shortcut.

    Args:
        x (Tensor[N, C, H, W]): any layout; the output of the fused path is channels_last.
        units: triples (conv, bn, act); ``act`` an ``nn.ReLU``, ``F.relu`` or the like, or None. With a shortcut the last
            unit's own ``act`` is None and the keyword ``act`` comes after the addition.
        residual (Tensor[N, K, P, Q], optional): the shortcut; ``x`` itself is the identity shortcut.
        projection: pair (conv, bn) which makes the shortcut from x.
    """
    *inner, (last_conv, last_bn, last_act) = units
    has_shortcut = residual is not None or projection is not None
    final_act = act if has_shortcut else last_act
    convs = [conv for conv, _, _ in units] + ([projection[0]] if projection else [])
    norms = [bn for _, bn, _ in units] + ([projection[1]] if projection else [])
    if not (has_shortcut and last_act is not None) and _is_fusable(
        x, convs, norms, [*(unit_act for _, _, unit_act in units), final_act]
    ):
        tail = Tail.NONE if final_act is None else Tail.RELU
        out = _run_chain(x, [*inner, (last_conv, last_bn, None)], residual, projection, tail)
        if out is not None:
            return out

    y = x
    for conv, bn, unit_act in units:
        y = bn(conv(y))
        y = y if unit_act is None else unit_act(y)
    if not has_shortcut:
        return y
    y = y + (residual if projection is None else projection[1](projection[0](x)))
    return y if act is None else act(y)


def _pool_is_plain(pool: nn.Module) -> bool:
    return (
        dispatch.is_plain(pool, nn.MaxPool2d)
        and (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)) == ((3, 3), (2, 2), (1, 1))
        and _pair(pool.dilation) == (1, 1)
        and not pool.ceil_mode
        and not pool.return_indices
    )


def run_stem(x: Tensor, conv: nn.Module, bn: nn.Module, act: Activation, pool: nn.Module) -> Tensor:
    """``pool(act(bn(conv(x))))``; fused for a 3×3 max pooling of stride 2 and padding 1: the activation is never written."""
    if act is not None and _pool_is_plain(pool) and _is_fusable(x, [conv], [bn], [act]):
        out = _run_chain(x, [(conv, bn, None)], None, None, Tail.RELU_MAXPOOL)
        if out is not None:
            return out
    return pool(run_units(x, [(conv, bn, act)]))


def run_bn_act(x: Tensor, bn: nn.Module, act: Activation, residual: Tensor | None = None) -> Tensor:
    """``act(bn(x) [+ residual])``, in the layout of x."""
    if _is_fusable(x, [], [bn], [act]):
        out = _run_chain(x, [(None, bn, None)], residual, None, Tail.NONE if act is None else Tail.RELU)
        if out is not None:
            return out
    y = bn(x)
    y = y if residual is None else y + residual
    return y if act is None else act(y)


def run_norm(x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None, relu: bool) -> Tensor | None:
    """``[relu](bn(x) [+ residual])`` for a ``bn`` that calls this as its forward; None where only the plain path gives that."""
    eligible = not dispatch.transforms_active(x) and dispatch.is_activation(x, bool(dispatch.group_name(bn)))
    if not (eligible and bn.affine and bn.running_mean is not None):
        return None
    return _run_chain(x, [(None, bn, None)], residual, None, Tail.RELU if relu else Tail.NONE)


def run_norm_act(x: Tensor, conv: nn.Module | None, bn: nn.Module) -> Tensor:
    """``bn(conv(x))`` for timm's BatchNormAct2d, a batch norm that applies its activation itself."""
    if dispatch.is_norm_act(bn) and all(dispatch.is_plain(m, type(m)) for m in (bn, bn.drop, bn.act)):
        relu = isinstance(bn.act, nn.ReLU)
        if _is_fusable(x, [] if conv is None else [conv], [], []):
            out = _run_chain(x, [(conv, bn, None)], None, None, Tail.RELU if relu else Tail.NONE)
            if out is not None:
                return out
    return bn(x if conv is None else conv(x))


def run_add_act(a: Tensor, b: Tensor, act: Activation) -> Tensor:
    """``act(a + b)``, in the layout of a."""
    fusable = (
        _is_fusable(a, [], [], [act])
        and act is not None
        and dispatch.is_activation(b)
        and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    )
    if fusable:
        route = routes.of_add_relu(a)
        if route.backend != routes.STOCK:
            return operators.add_relu(a, b, route)
    y = a + b
    return y if act is None else act(y)


class ConvBNReLU(nn.Module):
    """``[relu](bn(conv(x)) [+ residual])`` with children ``conv`` (no bias) and ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in ``nn.Conv2d``.
        relu: whether the ReLU comes last.
        eps, momentum: as in ``nn.BatchNorm2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        relu: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        act = F.relu if self.relu else None
        if residual is None:
            return run_units(x, [(self.conv, self.bn, act)])
        return run_units(x, [(self.conv, self.bn, None)], residual=residual, act=act)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class AddReLU(nn.Module):
    """``relu(a + b)``."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return run_add_act(a, b, F.relu)
