"""``resnet-fused tune --mode infer``: what runs each folded convolution of an optimised network on this GPU, by measuring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import clock, folded_gpu, models, networks, routes
from .console import print_table, progress_bar, warn
from .folded import FoldedConv2d
from .folded_gpu import PROVIDERS, STOCK, Layer
from .inference import InferenceModel, optimize_for_inference
from .testing import max_error

SAMPLES = 20
_SLACK, _ULPS = 2.0, 2.0
_ULPS_OF_FLOAT64 = 64.0  # whose reference is no better


@dataclass(frozen=True)
class Question:
    """A folded convolution with inputs of one shape."""

    layer: Layer
    shape: torch.Size
    has_residual: bool

    @property
    def key(self) -> str:
        return self.layer.key(self.shape, self.has_residual)

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layer.describe(self.has_residual)}"


def collect(network: nn.Module, x: Tensor) -> list[Question]:
    """The distinct convolutions of ``network`` on ``x``, each once, in the order in which they run."""
    found: dict[str, Question] = {}

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        question = Question(module.layer(), args[0].shape, len(args) > 1)
        found.setdefault(question.key, question)

    folded = [m for m in network.modules() if isinstance(m, FoldedConv2d)]
    hooks = [m.register_forward_pre_hook(note) for m in folded]
    try:
        network._run(x) if isinstance(network, InferenceModel) else network(x)  # a replayed graph would call no hooks
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


# Right answers


def _random(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    value = torch.randn(tuple(shape), generator=generator, device=like.device).to(like.dtype)
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class Trial:
    """A question with random inputs and weights: compared with float64, and ready to be timed."""

    def __init__(self, question: Question) -> None:
        of, generator = question.layer, torch.Generator(question.layer.weight.device).manual_seed(0)
        fan_in = of.weight[0].numel()
        weight = _random(of.weight.shape, of.weight, generator) / fan_in**0.5
        bias = None if of.bias is None else _random(of.bias.shape, of.weight, generator)
        self.layer = Layer(weight, bias, of.conv, of.relu)
        self.x = _random(question.shape, weight, generator)
        out = of.conv.output_shape(question.shape, weight.shape)
        self.residual = _random(out, weight, generator) if question.has_residual else None

    def names(self) -> list[str]:
        """The providers that apply."""
        return [name for name, provider in PROVIDERS.items() if provider.applies(self.x, self.layer)]

    def run(self, name: str) -> Tensor:
        """By the provider of that name. The residual is not written over."""
        return folded_gpu.run(name, self.x, self.layer, self.residual)

    def _gold(self) -> Tensor:
        bias, residual = (None if t is None else t.double() for t in (self.layer.bias, self.residual))
        of = self.layer
        return folded_gpu.plain(self.x.double(), of.weight.double(), bias, of.conv, residual, of.relu)

    @contextmanager
    def _not_finite(self) -> Iterator[None]:
        """NaN and infinities in a few places of the inputs, apart from each other."""
        tensors = [t for t in (self.x, self.residual) if t is not None]
        kept = [t.clone() for t in tensors]
        try:
            for t in tensors:
                _, c, h, w = t.shape
                for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
                    t[-1, i % c, i * (h - 1) // 2, i * (w - 1) // 2] = value
            yield
        finally:
            for t, before in zip(tensors, kept, strict=True):
                t.copy_(before)

    def wrong(self, names: Iterable[str]) -> dict[str, str]:
        """What is wrong with the results of those providers of which something is."""
        gold, stock = self._gold(), self.run(STOCK)
        ulps = _ULPS_OF_FLOAT64 if stock.dtype == torch.float64 else _ULPS
        floor = ulps * torch.finfo(stock.dtype).eps * gold.abs().max().item()
        allowed = _SLACK * max_error(stock, gold) + floor
        with self._not_finite():
            gold_there, stock_there = self._gold(), self.run(STOCK)

        def problem(name: str) -> str:
            y = self.run(name)
            if y.shape != gold.shape or y.dtype != stock.dtype:
                return f"gives {tuple(y.shape)} in {y.dtype}, stock {tuple(stock.shape)} in {stock.dtype}"
            if not max_error(y, gold) <= allowed:  # not if it is NaN
                return f"wrong: error {max_error(y, gold):.1e}, allowed {allowed:.1e}"
            with self._not_finite():
                return _lost(self.run(name), gold_there, stock_there, PROVIDERS[name].spreads)

        found = {}
        for name in names:
            try:
                if told := problem(name):
                    found[name] = told
            except torch.AcceleratorError:  # an illegal memory access, say: nothing runs in this process any more
                raise
            except Exception as error:  # of cuDNN, which has no engine for it, or of Triton
                found[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return found


def _lost(y: Tensor, gold: Tensor, stock: Tensor, spreads: bool) -> str:
    """What became of NaN and infinities in ``y``; "" where nothing is wrong. Stock may have more of them than float64 has."""
    if not y[gold.isnan()].isnan().all():
        return "wrong: NaN is lost"
    kept = (y == gold) | (y.isnan() & (spreads | stock.isnan()))
    if not kept[gold.isinf()].all():
        return "wrong: an infinity is lost"
    may_be = ~(gold.isfinite() & stock.isfinite())
    if spreads:
        may_be = F.max_pool2d(may_be.any(1, keepdim=True).float(), 3, 1, 1).bool().expand_as(y)
    return "" if y[~may_be].isfinite().all() else "wrong: NaN or an infinity where stock has a number"


# Times


def tune(question: Question, timer: clock.Clock, path: Path, report: Callable[[str], None]) -> routes.Entry:
    """Measure one convolution, and write its route to the table at ``path``; ``report`` gets who is left out, and why."""
    with torch.no_grad():
        trial = Trial(question)
        names = trial.names()
        wrong = trial.wrong(name for name in names if name != STOCK)
        right = [name for name in names if name not in wrong]
        times = clock.medians({name: timer.prepare(functools.partial(trial.run, name)) for name in right}, SAMPLES)
    for name, problem in wrong.items():
        report(f"{question.name}: {name} {problem}")
    best = min(times, key=times.__getitem__)
    entry = routes.Entry(best, times.pop(best), times)
    routes.add(path, {question.key: entry})
    return entry


def row(name: str, entry: routes.Entry) -> list[str]:
    """Of the table for a terminal."""
    stock = entry.us if entry.choice == STOCK else entry.others[STOCK]
    return [name, f"{stock:.1f}", f"{entry.us:.1f}", f"{stock / entry.us:.2f}×", entry.choice]


def tune_network(network: nn.Module, x: Tensor, timer: clock.Clock, path: Path) -> None:
    """Measure the folded convolutions of an optimised network on inputs like ``x``, and write their routes to the table.

    What is done stays in the table when this is interrupted, and is printed.
    """
    rows: list[list[str]] = []
    left_out: list[str] = []
    with torch.no_grad():
        questions = collect(network, x)
    try:
        with progress_bar() as progress:
            task = progress.add_task("folded convolutions", total=len(questions))
            for question in questions:
                progress.update(task, description=question.name)
                rows.append(row(question.name, tune(question, timer, path, left_out.append)))
                progress.advance(task)
    finally:
        routes.reload()
        if rows:
            header = ["folded convolution", "stock µs", "µs", "faster", "runs on"]
            print_table(f"{len(rows)} of {len(questions)} folded convolutions", header, rows, right=(1, 2, 3))
        for line in left_out:
            warn(line)


def run(
    names: Sequence[str], batch: int, image_size: int, dtypes: Sequence[str], device: torch.device, path: Path
) -> None:
    """``tune_network`` for networks by name; the arguments are those of the command."""
    timer = clock.Clock(device)
    for name in names:
        for dtype in (networks.DTYPES[d] for d in dtypes):
            network = optimize_for_inference(models.BUILDERS[name]().to(device), dtype)
            x = torch.zeros(batch, 3, image_size, image_size, dtype=dtype, device=device)
            tune_network(network, x.contiguous(memory_format=torch.channels_last), timer, path)
