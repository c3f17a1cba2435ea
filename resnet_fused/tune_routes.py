"""Measures on a GPU what runs each chain of a network fastest, and writes it into the table of routes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import backends, networks, operators, reference, routes
from .backends import recast, routed
from .backends.cuda import convolves
from .backends.operands import is_pointwise
from .clock import Clock, medians
from .plans.choice import choose_plans
from .plans.spec import Chain, Unit, unflatten
from .providers import GRADIENT_FLOOR
from .routes import STOCK, Entry, Route

SAMPLES = 20
CHECKED_BATCH = 16  # images of which answers are compared with float64
ADD_RELU_SHAPE = (256, 56, 56)  # of ResNet-50's first stage
_SLACK, _ULPS = 2.0, 4.0


# The chains of a network


@dataclass(frozen=True)
class Case:
    """A chain as a network calls it, without values: tensors are on the meta device."""

    chain: Chain
    x: Tensor
    residual: Tensor | None
    save: bool

    @property
    def name(self) -> str:
        n, c, h, w = self.x.shape
        return f"{routes.describe(self.chain)} {n}x{c}x{h}x{w}"


class _Chains(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Case] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.resnet_fused.chain.default:
            x, residual, parameters, running, spec, eps, _, save, _ = args
            case = Case(unflatten(parameters, running, spec, eps), x, residual, save)
            self.found.setdefault(case.name, case)
        return func(*args, **(kwargs or {}))


def chains(network: nn.Module, batch: int, image_size: int, dtype: torch.dtype, training: bool) -> list[Case]:
    """The distinct chains of a step of ``network`` (one of this package's, or from ``fuse``), in forward order.

    ``training``: in training mode with a backward to follow; else in eval mode without gradients.
    """
    mode = _Chains()
    model = copy.deepcopy(network).to("meta", dtype).train(training)
    x = torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta")
    with mode, torch.set_grad_enabled(training):
        model(x)
    return list(mode.found.values())


# Inputs and answers


class Trial:
    """A chain with random values on ``device``: activations in ``dtype``, parameters as under autocast."""

    def __init__(self, case: Case, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        parameters = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(shape: Sequence[int], deviation: float = 1.0) -> Tensor:
            return torch.randn(tuple(shape), generator=generator, device=device) * deviation

        def unit(u: Unit) -> Unit:
            k, deviation = u.channels, 1.0
            if u.weight is not None:
                deviation = (2 / u.weight[0].numel()) ** 0.5
            made = {
                "weight": None if u.weight is None else normal(u.weight.shape, deviation).to(parameters),
                "conv_bias": None if u.conv_bias is None else normal([k], 0.1).to(parameters),
                "bn_weight": (1 + normal([k], 0.2)).to(parameters),
                "bn_bias": normal([k], 0.2).to(parameters),
                "running_mean": None if u.training else normal([k], 0.1).to(parameters),
                "running_var": None if u.training else (1 + normal([k], 0.1).square()).to(parameters),
            }
            return replace(u, **made)

        def activation(like: Tensor) -> Tensor:
            made = normal((batch, *like.shape[1:])).to(dtype)
            return made.contiguous(memory_format=torch.channels_last)

        self.save, self.dtype = case.save, dtype
        self.chain = replace(case.chain, units=tuple(unit(u) for u in case.chain.units))
        self.x, self.residual = activation(case.x), None if case.residual is None else activation(case.residual)
        with torch.no_grad():
            out = reference.chain(self.x, self.residual, self.chain)
        self.grad = activation(out) / out.numel() ** 0.5
        self._inputs = [t for t in (self.x, self.residual, *self.chain.parameters()) if t is not None]
        for t in self._inputs:
            t.requires_grad_(self.save)

    def double(self) -> Trial:
        """The same values in float64."""
        wide = object.__new__(Trial)

        def double(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        names = ("weight", "conv_bias", "bn_weight", "bn_bias", "running_mean", "running_var")
        units = []
        for u in self.chain.units:
            # The activations' dtype rounds the filter on every side.
            rounded = u if u.weight is None else replace(u, weight=u.weight.detach().to(self.dtype).to(u.weight.dtype))
            made = {name: double(getattr(rounded, name)) for name in names}
            units.append(replace(u, **made))  # type: ignore[arg-type]
        wide.save, wide.dtype, wide.chain = self.save, torch.float64, replace(self.chain, units=tuple(units))
        wide.x, wide.residual, wide.grad = double(self.x), double(self.residual), double(self.grad)  # type: ignore[assignment]
        wide._inputs = [t for t in (wide.x, wide.residual, *wide.chain.parameters()) if t is not None]
        for t in wide._inputs:
            t.requires_grad_(self.save)
        return wide

    def run(self, route: Route) -> list[Tensor]:
        """The output and, where a backward follows, every gradient; by stock modules' functions or by a backend."""
        with torch.set_grad_enabled(self.save):
            if route.backend == STOCK:
                out = reference.chain(self.x, self.residual, self.chain)
            else:
                out, _ = operators.chain(self.x, self.residual, self.chain, route)
        if not self.save:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self._inputs, self.grad)]


def _errors(found: Iterable[Tensor], gold: Iterable[Tensor]) -> list[float]:
    return [networks.relative_error(a, b) for a, b in zip(found, gold, strict=True)]


class Judge:
    """Compares routes of a chain with float64, on few images."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._gold = trial, trial.double().run(Route(STOCK))
        self._stock = _errors(trial.run(Route(STOCK)), self._gold)

    def problem(self, route: Route) -> str:
        """What is wrong with the answers of a route; "" where they are as accurate as stock's."""
        ours = _errors(self._trial.run(route), self._gold)
        floor = _ULPS * torch.finfo(self._trial.dtype).eps
        for i, (error, stock) in enumerate(zip(ours, self._stock, strict=True)):
            allowed = _SLACK * stock + floor + (GRADIENT_FLOOR if i else 0.0)
            if not error <= allowed:
                return f"{'gradient' if i else 'output'} {i}: error {error:.1e}, of stock {stock:.1e}"
        return ""


# The contest


def options(unit: Unit, x: Tensor) -> list[str]:
    """The providers that have a kernel of their own for a unit's convolution of activations like ``x``; ``cudnn`` is the last."""
    assert unit.weight is not None and unit.conv is not None
    there, weight, conv = backends.providers(), unit.weight.to(x.dtype), unit.conv
    found = []
    if (
        routed.TRITON in there
        and x.dtype != torch.float64
        and (is_pointwise(weight, conv) or _is_own_3x3(x, weight, conv))
    ):
        found.append(routed.TRITON)
    if routed.EXTENSION in there and convolves(x, weight.contiguous(memory_format=torch.channels_last), conv):
        found.append(routed.EXTENSION)
    if recast.MatrixProducts.applies(x, weight, conv):
        found.append(routed.CUBLAS)
    if recast.SpaceToDepth.applies(x, weight, conv):
        found.append(routed.SPACE_TO_DEPTH)
    return [*found, routed.CUDNN]


def _is_own_3x3(x: Tensor, weight: Tensor, conv: Any) -> bool:
    from .backends.triton import conv3x3

    return conv3x3.supports(x, weight, conv)


def _inputs_of(c: Chain, x: Tensor) -> list[Tensor]:
    """Activations like those that each unit reads, without values."""
    found, shape = [], tuple(x.shape)
    for unit in c.path:
        found.append(shape)
        if unit.conv is not None:
            assert unit.weight is not None
            shape = unit.conv.output_shape(shape, unit.weight.shape)
    shapes = [*found, tuple(x.shape)][: len(c.units)]
    return [torch.empty(s, dtype=x.dtype, device="meta").contiguous(memory_format=torch.channels_last) for s in shapes]


def search(c: Chain, x: Tensor, time: Callable[[Sequence[Route]], Mapping[str, float]]) -> dict[str, float]:
    """Microseconds of the routes that were measured, by their choice.

    First stock, every convolution on its first provider, and every one on cuDNN; then, from the best of ours, each convolution
    on each of its other providers, and with and without the covariance plan, which needs Triton's products.

    Args:
        time: microseconds of each route by its choice; a route that is wrong or cannot run is missing.
    """
    by_conv: dict[str, list[str]] = {}
    for unit, like in zip(c.units, _inputs_of(c, x), strict=True):
        if unit.conv is not None and unit.weight is not None:
            by_conv.setdefault(routed.signature(unit.weight.shape, unit.conv), options(unit, like))
    following = {routed.signature(u.weight.shape, u.conv) for u in choose_plans(c).units if u.covariance}  # type: ignore
    times: dict[str, float] = {}

    def measure(candidates: Iterable[tuple[dict[str, str], bool]]) -> None:
        made = (
            Route(routed.name_of(r), on and any(r[conv] == routed.TRITON for conv in following)) for r, on in candidates
        )
        times.update(time([route for route in dict.fromkeys(made) if route.choice not in times]))

    def best() -> tuple[dict[str, str], bool] | None:
        ours = {choice: us for choice, us in times.items() if choice != STOCK}
        if not ours:
            return None
        route = routes.route_of(min(ours, key=ours.__getitem__))
        return routed.parse(route.backend), route.covariance

    times.update(time([Route(STOCK)]))
    measure(
        [({conv: names[0] for conv, names in by_conv.items()}, True), (dict.fromkeys(by_conv, routed.CUDNN), False)]
    )
    for conv, names in by_conv.items():
        if (found := best()) is not None:
            plans = (True, False) if conv in following else (found[1],)
            measure((found[0] | {conv: name}, plan) for name in names for plan in plans)
    if (found := best()) is not None:
        measure([(found[0], not found[1])])
    return times


def tune_case(
    case: Case, dtype: torch.dtype, device: torch.device, clock: Clock, path: Path, report: Callable[[str], None]
) -> Entry:
    """Measure one chain and write its route, for its shape and for any (which torch.compile asks for).

    ``report`` is told of every route that was left out, and why.
    """
    judge = Judge(Trial(case, min(len(case.x), CHECKED_BATCH), dtype, device))
    trial = Trial(case, len(case.x), dtype, device)

    def time(candidates: Sequence[Route]) -> Mapping[str, float]:
        samplers: dict[str, Callable[[], float]] = {}
        for route in candidates:
            try:
                problem = "" if route.backend == STOCK else judge.problem(route)
                if not problem:
                    samplers[route.choice] = clock.prepare(functools.partial(trial.run, route))
            except Exception as error:
                if not _is_of_route(error):
                    raise
                problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if problem:
                report(f"{case.name}: {route.choice}: {problem}")
        return medians(samplers, SAMPLES)

    times = search(trial.chain, trial.x, time)
    choice = min(times, key=times.__getitem__)
    entry = Entry(choice, times.pop(choice), times)
    keys = [routes.chain_key(case.chain, shape, dtype, device, case.save) for shape in (case.x.shape, ())]
    routes.add(path, dict.fromkeys(keys, entry))
    return entry


def _is_of_route(error: Exception) -> bool:
    """Whether another route may do better: memory or a GPU's resources do not suffice. An illegal memory access, say, spoils
    the whole process."""
    of_triton = any(base.__module__.startswith("triton") for base in type(error).__mro__)
    return of_triton or isinstance(error, torch.OutOfMemoryError)


def tune_add_relu(
    batch: int, dtype: torch.dtype, device: torch.device, clock: Clock, path: Path, report: Callable[[str], None]
) -> Entry:
    """Measure ``relu(a + b)`` forward and backward, on a large activation."""
    shape = batch, *ADD_RELU_SHAPE
    a, b, grad = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    a, b = a.requires_grad_(), b.requires_grad_()

    def run(route: Route) -> tuple[Tensor, ...]:
        out = reference.add_relu(a, b) if route.backend == STOCK else operators.add_relu(a, b, route)
        return out.detach(), *torch.autograd.grad(out, (a, b), grad)

    exact = run(Route(STOCK))
    samplers = {STOCK: clock.prepare(functools.partial(run, Route(STOCK)))}
    for name in ("cuda", "triton"):
        if name in backends.available_backends():
            route = Route(name)
            if all(map(torch.equal, run(route), exact)):  # one rounding on every side
                samplers[name] = clock.prepare(functools.partial(run, route))
            else:
                report(f"add_relu: {name}: other bits than stock's")
    times = medians(samplers, SAMPLES)
    choice = min(times, key=times.__getitem__)
    entry = Entry(choice, times.pop(choice), times)
    routes.add(path, {routes.add_relu_key(dtype, device): entry})
    return entry
