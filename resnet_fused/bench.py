"""``resnet-fused bench``: stock PyTorch, this package and torch.compile in turns on the same images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import images, info, networks, peak_memory, providers
from .console import UsageError, print_table, progress_bar, warn
from .providers import Provider, Setting
from .result_file import append_csv, check_results_file

FUSED = "fused"
AGAIN = "fused again"  # the same network timed once more: what the clock alone is worth
MIN_SAMPLE_S = 0.05


@dataclass
class Result:
    """One provider's figures; ``problem`` says why there are none."""

    name: str
    error: tuple[float, float] | None = None
    problem: str = ""
    samples_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.samples_ms, dtype=torch.float64).quantile(q))

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


def timed_ms(call: Callable[[Tensor], object], batch: Tensor, loops: int) -> float:
    """Milliseconds per ``call(batch)``, mean of ``loops`` in a row; by device events on a GPU."""
    if batch.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(loops):
            call(batch)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / loops
    begin = time.perf_counter()
    for _ in range(loops):
        call(batch)
    return (time.perf_counter() - begin) * 1e3 / loops


def operations(setting: Setting) -> int:
    """Floating-point operations of one step of the stock network (convolutions, products), counted without a run."""
    with torch.device("meta"):
        network = networks.stock_model(setting.model).train(setting.mode == "train")
        x = torch.empty(setting.batch, 3, setting.image_size, setting.image_size)
    counter = FlopCounterMode(display=False)
    with counter:
        out = network(x)
        if setting.mode == "train":
            out.sum().backward()
    return int(counter.get_total_flops())


def _prepare(
    names: Sequence[str], source: nn.Module, setting: Setting, x: Tensor, step: Callable[[str], None]
) -> tuple[dict[str, Result], dict[str, Provider]]:
    """Build every provider and check its answers; only those that are right come back as providers."""
    results = {name: Result(name) for name in names}
    ready: dict[str, Provider] = {}
    step("float64 reference")
    gold = providers.gold_answer(source, setting, x)
    for name in names:
        step(f"checking {name}")
        result = results[name]
        try:
            provider = providers.build(name, source, setting)
            result.error = providers.errors(provider, setting, x, gold)
        except Exception as error:  # one provider that cannot run is a row: the others are still measured
            if name == "stock":
                raise
            result.problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        stock = results["stock"].error
        assert stock is not None
        if providers.is_right(result.error, stock, setting):
            ready[name] = provider
        else:
            result.problem = "WRONG ANSWER"
    return results, ready


def measure(
    names: Sequence[str],
    source: nn.Module,
    setting: Setting,
    x: Tensor,
    *,
    repeats: int,
    memory: bool,
    step: Callable[[str], None],
    fused_times: int = 2,
) -> list[Result]:
    """Check, then time the providers in turns, "fused" ``fused_times`` times; then weigh each in a process of its own.

    ``step`` is called ``2 · len(names) + 2 + repeats`` times at most, with what comes next.
    """
    with providers.searched_convolutions():
        results, ready = _prepare(names, source, setting, x, step)
        batch = providers.batch_for(setting, x)
        step("warm-up")
        for name in list(ready):
            try:
                ready[name].step(batch)
            except torch.OutOfMemoryError:
                if name == providers.STOCK:
                    raise
                results[name].problem = "out of memory beside the others"
                del ready[name]
        contestants = {name: provider.step for name, provider in ready.items()}
        for name in again(fused_times) if FUSED in ready else ():
            contestants[name] = ready[FUSED].step
            results[name] = Result(name, results[FUSED].error)
        _time_in_turns(contestants, batch, results, repeats, step)
    names = list(ready)
    ready.clear()
    contestants.clear()
    providers.release(setting.device)
    if memory:
        for name in names:
            step(f"memory of {name}")
            results[name].peak_mib = peak_memory.measure(name, setting)
    return list(results.values())


def again(fused_times: int) -> list[str]:
    """The names under which "fused" is timed after the first time."""
    return [AGAIN if i == 1 else f"{AGAIN}, {i}" for i in range(1, fused_times)]


def _time_in_turns(
    contestants: dict[str, Callable[[Tensor], Tensor]],
    batch: Tensor,
    results: dict[str, Result],
    repeats: int,
    step: Callable[[str], None],
) -> None:
    loops = {
        name: max(1, round(MIN_SAMPLE_S * 1e3 / max(timed_ms(call, batch, 1), 1e-3)))
        for name, call in contestants.items()
    }
    order = list(contestants)
    for repeat in range(repeats):
        step(f"timing, round {repeat + 1}")
        # Every provider is once in each place of the round, so that none always follows the same neighbour's heat.
        shift = repeat % len(order)
        for name in order[shift:] + order[:shift]:
            call = contestants[name]
            results[name].samples_ms.append(timed_ms(call, batch, loops[name]))


def _columns(result: Result, stock: Result, setting: Setting) -> list[str]:
    error = "" if result.error is None else f"{max(result.error):.1e}"
    if not result.samples_ms:
        return [result.name, "", "", "", "", "", error, result.problem]
    ratio = stock.median_ms / result.median_ms
    spread = f"{result.median_ms:.1f} ({result.quantile(0.2):.1f}–{result.quantile(0.8):.1f})"
    peak = "" if result.peak_mib is None else f"{result.peak_mib:,.0f} MiB"
    rate = setting.batch / result.median_ms * 1e3
    saved = "" if result is stock else f"{100 * (1 - 1 / ratio):+.1f} %"
    return [result.name, f"{rate:.1f}", spread, f"{ratio:.2f}×", saved, peak, error, ""]


def print_results(results: Sequence[Result], setting: Setting, described: str) -> None:
    """The table for a terminal."""
    stock = results[0]
    shape = f"batch {setting.batch}, {setting.image_size}×{setting.image_size}"
    print_table(
        f"{setting.model}, {setting.mode}, {setting.dtype}, {shape}, on {info.device_name(setting.device)}",
        ["", "images/s", "ms (p20–p80)", "to stock", "time saved", "peak memory", "error", ""],
        [_columns(result, stock, setting) for result in results],
        right=(1, 2, 3, 4, 5, 6),
        styles=["red" if result.problem else "bold" if result.name == "fused" else None for result in results],
        caption=f"{described}; stock: {networks.stock_source()}, eager, channels_last; "
        f"{torch.get_num_threads()} threads; error: largest of logits and gradients, relative to float64",
    )


def rows(results: Sequence[Result], setting: Setting, described: str) -> list[dict[str, Any]]:
    """CSV rows; a provider without a right answer has none."""
    flops, found = operations(setting), info.versions()
    fixed = {
        "op": setting.model,
        "mode": setting.mode,
        "shape": f"{setting.batch}x3x{setting.image_size}x{setting.image_size}",
        "dtype": setting.dtype,
        "layout": "channels_last",
        "device": info.device_name(setting.device),
        "versions": f"resnet_fused {found['resnet_fused']}; torch {found['torch']}; torchvision {found['torchvision']}",
        "commit": found["commit"],
        "threads": torch.get_num_threads(),
        "images": described,
    }
    made = []
    for result in results:
        if result.samples_ms and result.error is not None:
            ms = result.median_ms
            made.append(
                fixed
                | {
                    "provider": result.name,
                    "p50_ms": f"{ms:.3f}",
                    "p20_ms": f"{result.quantile(0.2):.3f}",
                    "p80_ms": f"{result.quantile(0.8):.3f}",
                    "tflop_per_s": f"{flops / ms / 1e9:.4f}",
                    "peak_mib": "" if result.peak_mib is None else f"{result.peak_mib:.1f}",
                    "images_per_s": f"{setting.batch / ms * 1e3:.2f}",
                    "ratio_to_stock": f"{results[0].median_ms / ms:.4f}",
                    "error_vs_fp64": f"{max(result.error):.3e}",
                }
            )
    return made


class _Steps:
    """Moves a progress bar on by one, and says what comes next."""

    def __init__(self, progress: Any, task: Any, done: int, prefix: str) -> None:
        self._progress, self._task, self._done, self._prefix = progress, task, done, prefix

    def __call__(self, what: str) -> None:
        self._progress.update(self._task, completed=self._done, description=f"{self._prefix}: {what}")
        self._done += 1


def _available(chosen: Sequence[str], setting: Setting) -> list[str]:
    """The chosen providers in their order, stock first; says which are left out here, and why."""
    names = [providers.STOCK]
    for name in providers.NAMES[1:]:
        if name in chosen:
            reason = providers.missing(name, setting)
            if reason:
                warn(f"{name} is left out: {reason}")
            else:
                names.append(name)
    return names


def _images(count: int, size: int, folder: str | None, noise_on: str | None) -> tuple[Tensor, str]:
    if noise_on is None:
        return images.batch(count, size, folder)
    generator = torch.Generator(noise_on).manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator, device=noise_on), "normal noise made on the device"


def run(
    model: str,
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    mode: str = "infer",
    image_size: int = 224,
    device: str = "cpu",
    folder: str | None = None,
    results_file: str | None = None,
    chosen: Sequence[str] = ("stock", "fused", "compile"),
    repeats: int = 11,
    memory: bool = True,
    noise: bool = False,
    fused_times: int = 2,
) -> int:
    """Measure every batch size and dtype, print a table for each; 1 when a provider failed or was wrong.

    Args as those of the command; ``folder``: its ``--images``.
    """
    check_results_file(results_file)
    if mode == "infer" and "genstats" in chosen:
        raise UsageError("--providers: genstats differs from fused in training only")
    names = _available(chosen, Setting(model, mode, dtypes[0], device, max(batches), image_size))
    x, described = _images(max(batches), image_size, folder, device if noise else None)
    if mode == "train" and min(batches) * (image_size // 32) ** 2 < 2:
        raise UsageError("training needs more than one value per channel: a larger --batch or --image-size")
    torch.manual_seed(0)
    source = networks.stock_model(model)
    few = x[:16].cpu()
    networks.calibrate(source, few if len(x) * (image_size // 32) ** 2 > 1 else few.repeat(2, 1, 1, 1))
    failed = False
    cases = [Setting(model, mode, dtype, device, batch, image_size) for dtype in dtypes for batch in batches]
    per_case = len(names) * (2 if memory else 1) + 2 + repeats
    with progress_bar() as progress:
        task = progress.add_task(model, total=per_case * len(cases))
        for number, setting in enumerate(cases):
            step = _Steps(progress, task, number * per_case, f"{setting.dtype} batch {setting.batch}")
            results = measure(
                names,
                source,
                setting,
                x[: setting.batch],
                repeats=repeats,
                memory=memory,
                step=step,
                fused_times=fused_times,
            )
            progress.stop()
            print_results(results, setting, described)
            progress.start()
            if results_file is not None:
                append_csv(results_file, rows(results, setting, described))
            for result in results:
                if result.problem:
                    failed = True
                    warn(f"{result.name}, {setting.dtype}, batch {setting.batch}: {result.problem}")
    if results_file is not None:
        print(f"rows appended to {results_file}")
    return 1 if failed else 0
