"""The operators with an autograd formula: ``resnet_fused::chain`` and ``resnet_fused::residual_add_relu``.

Each is functional, opaque to torch.compile and one node for autograd. Saved intermediates are outputs of the operator,
marked as not differentiable, so that autograd and torch.export see everything that is kept. The double backward runs
through ``reference``: where a backward is itself recorded, the gradients are those of the plain formula.

The callers (``functional`` and ``layers``) decide when the operators may run; here arguments are taken as valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, routes
from .backends.algebra import moments_dtype
from .backends.aten import unpack_mask
from .backends.operands import acc_dtype
from .compiling import constant
from .dispatch import autocast_dtype
from .plans import chain as plan
from .plans import chain_backward
from .plans.choice import choose_plans
from .plans.spec import Chain, Shortcut, Tail, unflatten

_library = torch.library.Library("resnet_fused", "FRAGMENT")
_library.define(
    "chain(Tensor x, Tensor? residual, Tensor[] parameters, Tensor[] running, int[] spec, float[] eps, str group, "
    "bool save, str backend) -> Tensor[]"
)
_library.define(
    "chain_backward(Tensor grad, Tensor x, Tensor[] parameters, Tensor[] saved, int[] spec, float[] eps, str group, "
    "bool[] needs, str backend) -> Tensor[]"
)
_library.define("residual_add_relu(Tensor a, Tensor b, bool save, str backend) -> (Tensor, Tensor)")
_library.define("residual_add_relu_backward(Tensor grad, Tensor mask, str backend) -> Tensor")


def saves(x: Tensor, residual: Tensor | None, c: Chain) -> bool:
    """Whether a backward may follow."""
    tensors = [x, *c.parameters()] + ([residual] if residual is not None else [])
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def chain(
    x: Tensor, residual: Tensor | None, c: Chain, route: routes.Route | None = None
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Run a chain as one operator.

    Args:
        x, residual (Tensor[N, C, H, W]): of one floating dtype; any layout.
        c: what to compute. Filters may be in another dtype than ``x`` and are rounded to it.
        route: what runs it, ``routes.of_chain`` by default; a backend of formulas stands in for stock modules.
    Returns:
        The output, in channels_last where the chain has a convolution and in the layout of ``x`` elsewhere; and for each
        unit the mean and biased variance ``[K]`` of its batch (a frozen unit's are its running statistics, or empty), and
        where any is synchronised the number of rows behind them (0 for those that are not).
    """
    save = saves(x, residual, c)
    route = route or routes.of_chain(c, x, x.dtype, save)
    backend = _backend(route)
    if not (_is_captured(x) and _reads_back(backend, x.dtype)):
        c = choose_plans(c, route.covariance)
    parameters, running, integers, eps = c.flatten()
    out, statistics, *_ = torch.ops.resnet_fused.chain(
        x, residual, parameters, running, integers, eps, c.group, save, backend
    )
    if statistics.shape[1] == 0:
        return out, []
    widths = [unit.channels for unit in c.units]
    return out, list(zip(*(vectors.split(widths) for vectors in statistics), strict=True))


def add_relu(a: Tensor, b: Tensor, route: routes.Route | None = None) -> Tensor:
    """``relu(a + b)`` as one operator: two dense tensors of one shape and dtype. Saves one bit per element."""
    save = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return torch.ops.resnet_fused.residual_add_relu(a, b, save, _backend(route or routes.of_add_relu(a)))[0]


def _is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph will hold, or may hold, what runs on ``x``."""
    return x.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


@constant
def _reads_back(backend: str, dtype: torch.dtype) -> bool:
    return backends.get(backend).reads_back(dtype)


def _backend(route: routes.Route) -> str:
    return "aten" if route.backend == routes.STOCK else route.backend


def _chain(
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    spec: Sequence[int],
    eps: Sequence[float],
    group: str,
    save: bool,
    backend: str,
) -> list[Tensor]:
    with _without_autocast(x):
        return plan.forward(backends.get(backend), unflatten(parameters, running, spec, eps, group), x, residual, save)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside an operator every dtype is the plan's own; autocast would round the algebra of statistics."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def _layout(c: Chain, x: Tensor) -> torch.memory_format:
    """The layout in which a chain works on ``x``, as ``plans.chain`` has it."""
    channels_last = c.units[0].conv is not None or x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _chain_fake(
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    spec: Sequence[int],
    eps: Sequence[float],
    group: str,
    save: bool,
    backend: str,
) -> list[Tensor]:
    c = unflatten(parameters, running, spec, eps, group)
    layout = _layout(c, x)

    def like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)

    shapes = []
    shape: Sequence[int] = x.shape
    for unit in c.path:
        shape = shape if unit.conv is None else unit.conv.output_shape(shape, unit.weight.shape)
        shapes.append(shape)
    if c.shortcut == Shortcut.PROJECTION:
        projection = c.units[-1]
        shapes.append(projection.conv.output_shape(x.shape, projection.weight.shape))
    if c.tail == Tail.RELU_MAXPOOL:
        shape = (*shape[:2], (shape[2] - 1) // 2 + 1, (shape[3] - 1) // 2 + 1)

    width = sum(unit.channels for unit in c.units) if save or any(unit.training for unit in c.units) else 0
    rows = 3 if width and c.synchronised else 2
    outputs = [like(shape, x.dtype), x.new_empty((rows, width), dtype=acc_dtype(x.dtype))]
    if save:
        made = [unit.conv is not None and not unit.covariance for unit in c.units]
        outputs += [like(s, x.dtype) for s, is_made in zip(shapes, made, strict=True) if is_made]
        for unit in c.units:
            if unit.covariance and unit.training:
                width = unit.weight.shape[1]
                length = width * (width + 3) // 2 + (width if unit.synchronised else 0)
                outputs.append(x.new_empty(length, dtype=moments_dtype(x.dtype)))
        if c.tail == Tail.RELU_MAXPOOL:
            outputs.append(like(shape, torch.uint8))
        elif c.saves_mask:
            outputs.append(x.new_empty((outputs[0].numel() + 7) // 8, dtype=torch.uint8))
    return outputs


def _chain_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    spec: Sequence[int],
    eps: Sequence[float],
    group: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    needed = chain_backward.Needs(needs[0], needs[1], tuple(needs[2:]))
    c = unflatten(parameters, (), spec, eps, group)
    with _without_autocast(x):
        dx, dresidual, gradients = chain_backward.backward(backends.get(backend), c, grad, x, saved, needed)
    laid_out = [None if g is None else _laid_out_like(g, p) for g, p in zip(gradients, parameters, strict=True)]
    wanted = [g if need else None for g, need in zip([dx, dresidual, *laid_out], needs, strict=True)]
    return [grad.new_empty(0) if g is None else g for g in wanted]


def _laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` with the strides of ``parameter``, as the fake kernel promises and autograd would make them anyway."""
    if gradient.stride() == parameter.stride():
        return gradient
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    same = all(size == 1 or ours == theirs for size, ours, theirs in strides)
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


def _chain_backward_fake(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    spec: Sequence[int],
    eps: Sequence[float],
    group: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    layout = _layout(unflatten(parameters, (), spec, eps), x)
    candidates = [x, grad, *parameters]
    layouts = [layout, layout, *[torch.preserve_format] * len(parameters)]
    return [
        torch.empty_like(t, memory_format=memory_format) if need else grad.new_empty(0)
        for t, memory_format, need in zip(candidates, layouts, needs, strict=True)
    ]


def _chain_setup(ctx, inputs, output) -> None:
    x, _, parameters, running, spec, eps, group, save, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.eps, ctx.group, ctx.backend = spec, eps, group, backend
    ctx.parameter_count, ctx.no_running = len(parameters), [None] * len(running)
    if save:
        ctx.save_for_backward(x, *parameters, *output[1:])


def _chain_vjp(ctx, grads):
    grad = grads[0]
    need_x, need_residual, need_parameters, *_ = ctx.needs_input_grad
    if grad is None:
        return None, None, [None] * ctx.parameter_count, ctx.no_running, *[None] * 5
    x, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.parameter_count], rest[ctx.parameter_count :]
    needs = [need_x, need_residual, *need_parameters]
    if torch.is_grad_enabled():
        found = _differentiable_backward(ctx, grad, x, parameters, saved, needs)
    else:
        found = torch.ops.resnet_fused.chain_backward(
            grad, x, parameters, saved, ctx.spec, ctx.eps, ctx.group, needs, ctx.backend
        )
    found = [g if need else None for g, need in zip(found, needs, strict=True)]
    return found[0], found[1], found[2:], ctx.no_running, *[None] * 5


def _differentiable_backward(
    ctx, grad: Tensor, x: Tensor, parameters: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as a recorded computation: the plain formula again, with the forward's own ReLU mask."""
    # Views: a tensor that is used twice, or made from another input, has the gradient of each use alone.
    x, parameters = x.view_as(x), [p.view_as(p) for p in parameters]
    c = unflatten(parameters, (), ctx.spec, ctx.eps, ctx.group)
    widths = [unit.channels for unit in c.units]
    units = []
    for unit, mean, var in zip(c.units, *(vectors.split(widths) for vectors in saved[0][:2]), strict=True):
        if not unit.training:
            bias = 0 if unit.conv_bias is None else unit.conv_bias.detach()
            unit = replace(unit, running_mean=mean + bias, running_var=var)
        units.append(unit)
    c = replace(c, units=tuple(units))
    passed = grad
    if c.saves_mask:
        passed = torch.where(unpack_mask(saved[-1], grad.contiguous(memory_format=_layout(c, x))), grad, 0.0)
        c = replace(c, tail=Tail.NONE)
    if c.shortcut == Shortcut.TENSOR:
        c = replace(c, shortcut=Shortcut.NONE)
    out = reference.chain(x, None, c)
    wanted = [t for t, need in zip([x, *parameters], [needs[0], *needs[2:]], strict=True) if need]
    gradients = iter(torch.autograd.grad(out, wanted, passed, create_graph=True, allow_unused=True) if wanted else ())
    return [
        next(gradients) if needs[0] else None,
        passed if needs[1] else None,
        *[next(gradients) if need else None for need in needs[2:]],
    ]


def _add_relu(a: Tensor, b: Tensor, save: bool, backend: str) -> tuple[Tensor, Tensor]:
    a = a if a.is_contiguous(memory_format=torch.channels_last) else a.contiguous()
    return backends.get(backend).add_relu(a, plan.match_layout(b, a), save)


def _add_relu_fake(a: Tensor, b: Tensor, save: bool, backend: str) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if a.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    mask_bytes = (a.numel() + 7) // 8 if save else 0
    return torch.empty_like(a, memory_format=layout), a.new_empty(mask_bytes, dtype=torch.uint8)


def _add_relu_setup(ctx, inputs, output) -> None:
    _, _, save, backend = inputs
    out, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    ctx.channels_last = out.is_contiguous(memory_format=torch.channels_last)
    if save:
        ctx.save_for_backward(mask)


def _add_relu_vjp(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    (mask,) = ctx.saved_tensors
    layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
    grad = grad.contiguous(memory_format=layout)
    if torch.is_grad_enabled():
        passed = torch.where(unpack_mask(mask, grad), grad, 0.0)
    else:
        passed = torch.ops.resnet_fused.residual_add_relu_backward(grad, mask, ctx.backend)
    return (passed if ctx.needs_input_grad[0] else None), (passed if ctx.needs_input_grad[1] else None), None, None


def _register(name: str, kernel, fake) -> None:
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=_library)


_register("chain", _chain, _chain_fake)
_register("chain_backward", _chain_backward, _chain_backward_fake)
_register("residual_add_relu", _add_relu, _add_relu_fake)
_register(
    "residual_add_relu_backward",
    lambda grad, mask, backend: backends.get(backend).mask_grad(grad, mask),
    lambda grad, mask, backend: torch.empty_like(grad),
)
torch.library.register_autograd("resnet_fused::chain", _chain_vjp, setup_context=_chain_setup, lib=_library)
torch.library.register_autograd(
    "resnet_fused::residual_add_relu", _add_relu_vjp, setup_context=_add_relu_setup, lib=_library
)
