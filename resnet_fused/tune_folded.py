"""``resnet-fused tune --mode infer``: what runs each folded convolution of an optimised network on this GPU, by measuring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import folded_gpu, models, networks, routes
from .console import print_table, progress_bar
from .folded import FoldedConv2d
from .folded_gpu import PROVIDERS, STOCK, Layer
from .inference import InferenceModel, optimize_for_inference
from .testing import max_error

if TYPE_CHECKING:  # Triton may be absent
    from .backends.triton.trial import Clock

SAMPLES = 20
_SLACK, _ULPS = 2.0, 2.0


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
        names = list(names)
        found: dict[str, str] = {}
        gold, stock = self._gold(), self.run(STOCK)
        floor = _ULPS * torch.finfo(stock.dtype).eps * gold.abs().max().item()
        allowed = _SLACK * max_error(stock, gold) + floor
        for name in names:
            try:
                y = self.run(name)
            except (RuntimeError, ValueError) as error:
                found[name] = f"fails: {str(error).strip().splitlines()[0]}"
                continue
            if y.shape != gold.shape or y.dtype != stock.dtype:
                found[name] = f"gives {tuple(y.shape)} in {y.dtype}, stock {tuple(stock.shape)} in {stock.dtype}"
            elif not (error := max_error(y, gold)) <= allowed:  # not if it is NaN
                found[name] = f"wrong: error {error:.1e}, allowed {allowed:.1e}"
            elif not torch.equal(y, self.run(name)) and name != STOCK:
                found[name] = "differs from run to run"
        with self._not_finite():
            gold, stock = self._gold(), self.run(STOCK)
            for name in (name for name in names if name not in found):
                if problem := _lost(self.run(name), gold, stock, PROVIDERS[name].spreads):
                    found[name] = problem
        return found


def _lost(y: Tensor, gold: Tensor, stock: Tensor, spreads: bool) -> str:
    """What became of NaN and infinities in ``y``; "" where nothing is wrong. Stock may have more of them than float64 has."""
    if not y[gold.isnan()].isnan().all():
        return "wrong: NaN is lost"
    infinite = gold.isinf()
    if not ((y == gold) | y.isnan())[infinite].all() or (not spreads and y[infinite & (stock == gold)].isnan().any()):
        return "wrong: an infinity is lost"
    may_be = ~(gold.isfinite() & stock.isfinite())
    if spreads:
        may_be = F.max_pool2d(may_be.any(1, keepdim=True).float(), 3, 1, 1).bool().expand_as(y)
    return "" if y[~may_be].isfinite().all() else "wrong: NaN or an infinity where stock has a number"


# Times


def measure(trial: Trial, names: Sequence[str], clock: Clock, samples: int = SAMPLES) -> dict[str, float]:
    """Microseconds of each provider: medians of turns in one run."""
    with torch.no_grad():
        clocks = {name: clock.prepare(lambda name=name: trial.run(name)) for name in names}  # type: ignore[misc]
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(samples):
            for name, sample in clocks.items():
                taken[name].append(sample())
    return {name: statistics.median(times) for name, times in taken.items()}


def tune(question: Question, clock: Clock, path: Path, report: Callable[[str], None]) -> routes.Entry:
    """Measure one convolution, and write its route to the table at ``path``; ``report`` gets who is left out, and why."""
    with torch.no_grad():
        trial = Trial(question)
        names = trial.names()
        wrong = trial.wrong(names)
    for name, problem in wrong.items():
        report(f"{question.name}: {name} {problem}")
    times = measure(trial, [name for name in names if name == STOCK or name not in wrong], clock)
    best = min(times, key=times.__getitem__)
    entry = routes.Entry(best, times.pop(best), times)
    routes.add(path, {question.key: entry})
    return entry


def _row(question: Question, entry: routes.Entry) -> list[str]:
    stock = entry.others.get(STOCK, entry.us)
    losers: Mapping[str, float] = {name: us for name, us in entry.others.items() if name != STOCK}
    others = ", ".join(f"{name} {us:.1f}" for name, us in sorted(losers.items(), key=lambda pair: pair[1]))
    return [question.name, entry.choice, f"{entry.us:.1f}", f"{stock:.1f}", f"{stock / entry.us:.2f}", others]


def tune_network(network: nn.Module, x: Tensor, clock: Clock, path: Path, report: Callable[[str], None]) -> int:
    """Measure the folded convolutions of an optimised network on inputs like ``x``, and write their routes to the table.

    What is done stays in the table when this is interrupted, and is printed.

    Returns:
        How many convolutions were measured: those that are alike are measured once.
    """
    rows: list[list[str]] = []
    with torch.no_grad():
        questions = collect(network, x)
    try:
        with progress_bar() as progress:
            task = progress.add_task("folded convolutions", total=len(questions))
            for question in questions:
                progress.update(task, description=question.name)
                rows.append(_row(question, tune(question, clock, path, report)))
                progress.advance(task)
    finally:
        routes.reload()
        if rows:
            header = ["folded convolution", "runs on", "µs", "stock µs", "stock / it", "others, µs"]
            print_table(f"{len(rows)} of {len(questions)} folded convolutions", header, rows, right=(2, 3, 4))
    return len(questions)


def run(
    names: Sequence[str],
    batch: int,
    image_size: int,
    dtypes: Sequence[str],
    device: torch.device,
    clock: Clock,
    path: Path,
    report: Callable[[str], None],
) -> int:
    """``tune_network`` for networks by name; the arguments are those of the command."""
    done = 0
    for name in names:
        for dtype in dtypes:
            network = optimize_for_inference(models.BUILDERS[name]().to(device), networks.DTYPES[dtype])
            x = torch.zeros(batch, 3, image_size, image_size, dtype=networks.DTYPES[dtype], device=device)
            x = x.contiguous(memory_format=torch.channels_last)
            done += tune_network(network, x, clock, path, report)
    return done
