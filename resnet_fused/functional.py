"""Stateless fused functions: arguments are checked, a backend is chosen, one operator runs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, operators, reference, routes
from .plans.spec import Chain, Conv, Shortcut, Tail, Unit
from .statistics import update_running

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_values_per_channel(shape) -> None:
    """PyTorch's own error for batch statistics of a single value."""
    if shape[2] * shape[3] == 1 and shape[0] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def _check_activation(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected a 4-D tensor [N, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype float64, float32, bfloat16 or float16, got {x.dtype}")


def _check_like(name: str, t: Tensor, shape: tuple, x: Tensor) -> None:
    """``t`` has ``shape`` and the dtype and device of ``x``."""
    _check_activation(name, t)
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype} like x, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {t.device}")


def _check_norm(channels: int, x: Tensor, vectors: dict[str, Tensor | None], training: bool, eps: float) -> None:
    for name, vector in vectors.items():
        is_statistic = name.startswith("running")
        if vector is None:
            if is_statistic and training:
                continue
            raise ValueError(f"{name}: expected a tensor of {channels} values, got None")
        if tuple(vector.shape) != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), got {tuple(vector.shape)}")
        if vector.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: expected dtype {x.dtype} or torch.float32, got {vector.dtype}")
        if vector.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {vector.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: expected an int or a pair of ints >= {least}, got {value!r}")
    return pair  # type: ignore[return-value]


def _bn_chain(
    x: Tensor,
    unit: Unit,
    residual: Tensor | None,
    out_shape: tuple,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    relu: bool,
) -> Tensor:
    """One unit with its shortcut and ReLU; updates the running statistics in training."""
    identity = residual is not None and residual is x
    shortcut = Shortcut.NONE if residual is None else Shortcut.IDENTITY if identity else Shortcut.TENSOR
    if unit.training:
        check_values_per_channel(out_shape)
    chain = Chain((unit,), shortcut, Tail.RELU if relu else Tail.NONE)
    residual = None if identity else residual
    updates = unit.training and running[0] is not None
    if dispatch.transforms_active(x) or x.numel() == 0:
        if updates:
            raise NotImplementedError(
                "training=True with running statistics is not available under torch.func, forward-mode AD or tracing, "
                "or for an empty batch: pass running_mean=None, running_var=None, or use the modules"
            )
        return reference.chain(x, residual, chain)
    route = routes.of_chain(chain, x, x.dtype, operators.saves(x, residual, chain))
    if route.backend == routes.STOCK and (running[0] is None) == (running[1] is None):
        return reference.chain(x, residual, chain, running, momentum)
    out, statistics = operators.chain(x, residual, chain, route)
    if updates:
        mean, var = statistics[0]
        count = out_shape[0] * out_shape[2] * out_shape[3]
        update_running(running[0], mean.detach(), momentum)
        if running[1] is not None:
            update_running(running[1], var.detach(), momentum, count / (count - 1))
    return out


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """``relu(scale·conv(x, weight) + shift [+ residual])``, ``scale = bn_weight / √(var + eps)``.

    Args:
        x (Tensor[N, C, H, W]): fp64, fp32, bf16 or fp16, any layout; under autocast it is cast as stock PyTorch casts it.
        weight (Tensor[K, C / groups, R, S]): dtype of ``x``, or any under autocast.
        bn_weight, bn_bias (Tensor[K]): dtype of ``x`` or fp32.
        running_mean, running_var (Tensor[K]): updated in place when ``training`` (or None then); used when not.
        residual (Tensor[N, K, P, Q], optional): added before the ReLU; ``x`` itself makes an identity shortcut.
        stride, padding, dilation: an int or a pair.
        momentum: weight of the batch in the running statistics; the running variance takes the unbiased one.
        relu: without it the sum is the result.
    Returns:
        Tensor[N, K, P, Q] in channels_last; where stock functions run (``routes``), in their layout.
    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    Numerics: statistics in fp32 (fp64 for fp64) from the raw output as stored, merged in fp64; one rounding at the end.
    Traffic: the convolution's own; reads its output twice in training and once in eval, writes the result once.
    """
    _check_activation("x", x)
    _check_activation("weight", weight)
    cast = dispatch.autocast_dtype(x)
    if cast is not None and x.dtype != torch.float64:
        x = x.to(cast)
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight: expected dtype {x.dtype} like x, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device} like x, got {weight.device}")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a positive divisor of the {weight.shape[0]} output channels, got {groups!r}"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x: expected {weight.shape[1] * groups} channels for weight {tuple(weight.shape)} and groups={groups}, "
            f"got {x.shape[1]} (shape {tuple(x.shape)})"
        )
    conv = Conv(_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1), groups)
    out_shape = conv.output_shape(x.shape, weight.shape)
    if out_shape[2] < 1 or out_shape[3] < 1:
        raise ValueError(
            f"x: height and width {tuple(x.shape[2:])} are smaller than the filter {tuple(weight.shape[2:])}"
        )
    channels = weight.shape[0]
    vectors = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    _check_norm(channels, x, vectors, training, eps)
    if residual is not None:
        if cast is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        _check_like("residual", residual, out_shape, x)
    unit = Unit(weight, None, bn_weight, bn_bias, running_mean, running_var, conv, training, relu, eps)
    return _bn_chain(x, unit, residual, out_shape, (running_mean, running_var), momentum, relu)


def _bn(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    _check_activation("x", x)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check_norm(x.shape[1], x, vectors, training, eps)
    if residual is not None:
        _check_like("residual", residual, tuple(x.shape), x)
    unit = Unit(None, None, weight, bias, running_mean, running_var, None, training, True, eps)
    return _bn_chain(x, unit, residual, tuple(x.shape), (running_mean, running_var), momentum, True)


def bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(scale·x + shift)``, ``scale = weight / √(var + eps)``, ``shift = bias − scale·mean``.

    Arguments, errors and numerics as in ``conv_bn_relu``; the result has the layout of ``x``.
    Traffic: reads x twice in training and once in eval, writes 1 times x.
    """
    return _bn(x, None, weight, bias, running_mean, running_var, training, momentum, eps)


def bn_add_relu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``relu(scale·x + shift + residual)``; ``residual`` has the shape and dtype of ``x``.

    Arguments, errors and numerics as in ``bn_relu``. For the backward it saves x and one bit per element.
    Traffic: reads x twice in training and once in eval, residual once, writes 1 times x.
    """
    _check_activation("residual", residual)
    return _bn(x, residual, weight, bias, running_mean, running_var, training, momentum, eps)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)``, in the layout of ``a``.

    Args:
        a, b (Tensor[N, C, H, W]): one shape, dtype and device.
    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    Numerics: one rounding. Traffic: reads 2, writes 1 times a; saves one bit per element for the backward.
    """
    _check_activation("a", a)
    _check_like("b", b, tuple(a.shape), a)
    route = routes.of_add_relu(a)
    if dispatch.transforms_active(a) or a.numel() == 0 or route.backend == routes.STOCK:
        return reference.add_relu(a, b)
    return operators.add_relu(a, b, route)
