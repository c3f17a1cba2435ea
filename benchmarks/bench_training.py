"""Training with stock and with fused networks side by side: do they learn the same?

Each pair starts from the same weights and sees the same batches in the same order. Rounding still parts two runs within a
few steps, so single losses say little; what counts is accuracy over seeds, beside the same difference between stock in two
memory layouts (``stock_nchw``: the same mathematics, summed in another order).

Data: Fashion-MNIST (Debian: ``apt-get install dataset-fashion-mnist``), else scikit-learn's ``digits``. Every finished run is
appended to ``training_losses.csv`` and ``training_accuracy.csv``; runs that are there already are not repeated, so a stopped
benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import labelled_images
import torch
from labelled_images import LabelledImages
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import info, networks
from resnet_fused.arguments import Parser, image_size, one_of, positive
from resnet_fused.console import UsageError, print_table, progress_bar, require_rich
from resnet_fused.result_file import append_csv

PROVIDERS = {"stock": torch.channels_last, "fused": torch.channels_last, "stock_nchw": torch.contiguous_format}
WARM_UP, WEIGHT_DECAY = 0.05, 5e-4  # the warm-up is a fraction of all steps
LAST = 20  # steps whose mean is the final loss
EVALUATION_BATCH = 250

# A file of results holds one setting: its averages are over seeds and nothing else.
SETTING = ("dataset", "size", "batch", "steps", "lr", "test_images")
RUN = ("network", "dtype", "provider", "seed")
LOSS_COLUMNS = (*RUN, "step", "loss")
ACCURACY_COLUMNS = (
    *RUN,
    "final_loss",
    "accuracy",
    "step_s",
    *SETTING,
    "threads",
    "device",
    "versions",
    "commit",
)
# Told apart by people who see no red or green, and in print.
COLOURS = {"stock": "#0072B2", "fused": "#D55E00", "stock_nchw": "#8C8C8C"}
SMOOTHED_OVER = 15
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Plan:
    """What every run has in common."""

    size: int
    batch: int
    steps: int
    lr: float
    test_images: int


def learning_rate(step: int, steps: int) -> float:
    """Fraction of the highest rate: linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1))) / 2


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Which images each step takes: whole epochs, shuffled anew; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // size
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-steps // per_epoch))]
    return [part for epoch in epochs for part in epoch[: per_epoch * size].split(size)][:steps]


def build(network: str, provider: str, seed: int, classes: int) -> nn.Module:
    """The provider's network in training mode, its weights those of stock under ``seed``."""
    torch.manual_seed(seed)
    model = networks.stock_model(network, classes)
    if provider == "fused":
        model = networks.copy_of(network, model.state_dict(), classes, fused=True)
    return networks.in_layout(model, PROVIDERS[provider]).train()


def accuracy(
    model: nn.Module, data: LabelledImages, plan: Plan, layout: torch.memory_format, dtype: torch.dtype
) -> float:
    """Fraction of the first ``test_images`` test images that the network in eval mode gets right."""
    model.eval()
    right = 0
    x, y = data.test_x[: plan.test_images], data.test_y[: plan.test_images]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for images, labels in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH)):
            right += int((model(data.batch(images, plan.size, layout)).argmax(1) == labels).sum())
    return right / len(y)


def train(
    key: Key, data: LabelledImages, plan: Plan, advance: Callable[[float], None]
) -> tuple[list[float], float, list[float]]:
    """One run: (losses, test accuracy, seconds of each step, without making its batch)."""
    network, dtype_name, provider, seed = key
    layout, dtype = PROVIDERS[provider], networks.DTYPES[dtype_name]
    model = build(network, provider, seed, int(data.train_y.max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    losses, seconds = [], []
    for step, chosen in enumerate(batches(len(data.train_x), plan.batch, plan.steps, seed)):
        x, y = data.batch(data.train_x[chosen], plan.size, layout), data.train_y[chosen]
        optimizer.param_groups[0]["lr"] = plan.lr * learning_rate(step, plan.steps)
        begin = time.perf_counter()
        logits = networks.training_step(model, x, y, dtype)
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(F.cross_entropy(logits.float(), y)))
        advance(losses[-1])
    return losses, accuracy(model, data, plan, layout, dtype), seconds


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists() or path.stat().st_size == 0:
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise UsageError(f"--results: {path} holds other columns than these rows")
        return list(reader)


def _key(row: dict[str, str]) -> Key:
    return row["network"], row["dtype"], row["provider"], int(row["seed"])


class Results:
    """The two files of a folder. Of a run that is there twice (stopped between its two writes) the later one counts."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"--results: no such folder: {folder}")
        self.loss_path, self.accuracy_path = folder / "training_losses.csv", folder / "training_accuracy.csv"
        self.curves_path = folder / "training_curves.png"
        self.finished: dict[Key, dict[str, str]] = {}
        self.losses: dict[Key, dict[int, float]] = {}
        self.read()

    def read(self) -> None:
        self.finished = {_key(row): row for row in _read(self.accuracy_path, ACCURACY_COLUMNS)}
        self.losses = {}
        for row in _read(self.loss_path, LOSS_COLUMNS):
            self.losses.setdefault(_key(row), {})[int(row["step"])] = float(row["loss"])

    def missing(self, wanted: Sequence[Key], setting: dict[str, Any]) -> list[Key]:
        """The runs still to be made.

        Raises:
            UsageError: the files hold runs under another setting.
        """
        for row in self.finished.values():
            other = [f"{name} {row[name]}" for name in SETTING if row[name] != str(setting[name])]
            if other:
                raise UsageError(
                    f"{self.accuracy_path} holds runs with {', '.join(other)}: name another --results folder"
                )
        return [key for key in wanted if key not in self.finished or key not in self.losses]

    def append(self, key: Key, losses: Sequence[float], row: dict[str, Any]) -> None:
        run = dict(zip(RUN, key))
        rows = [run | {"step": step, "loss": f"{loss:.5g}"} for step, loss in enumerate(losses)]
        append_csv(str(self.loss_path), rows, LOSS_COLUMNS)
        append_csv(str(self.accuracy_path), [run | row], ACCURACY_COLUMNS)

    def panels(self) -> list[tuple[str, str]]:
        """(network, dtype) of every panel and every group of table rows."""
        return list(dict.fromkeys(key[:2] for key in self.finished))

    def column(self, panel: tuple[str, str], provider: str, column: str) -> dict[int, float]:
        """A figure of each seed's run."""
        runs = {key[3]: row for key, row in self.finished.items() if key[:3] == (*panel, provider)}
        return {seed: float(runs[seed][column]) for seed in sorted(runs)}


def _mean_and(values: Sequence[float], spread: Callable[[Sequence[float]], float], form: str, unit: str = "") -> str:
    if not values:
        return ""
    tail = f" ± {spread(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{tail}{unit}"


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def print_results(results: Results) -> None:
    """The table for a terminal."""
    rows = []
    for panel in results.panels():
        stock = results.column(panel, "stock", "accuracy")
        for provider in PROVIDERS:
            found = results.column(panel, provider, "accuracy")
            if not found:
                continue
            paired = (
                [] if provider == "stock" else [100 * (found[seed] - stock[seed]) for seed in found if seed in stock]
            )
            losses = list(results.column(panel, provider, "final_loss").values())
            step_s = statistics.median(results.column(panel, provider, "step_s").values())
            rows.append(
                (
                    *panel,
                    provider,
                    len(found),
                    _mean_and(losses, statistics.stdev, ".4f"),
                    _mean_and([100 * value for value in found.values()], statistics.stdev, ".2f", " %"),
                    _mean_and(paired, _standard_error, "+.2f"),
                    f"{1e3 * step_s:.0f} ms",
                )
            )
    if not rows:
        print("no finished run")
        return
    some = next(iter(results.finished.values()))
    print_table(
        f"{some['dataset']}, {some['size']}×{some['size']}, batch {some['batch']}, {some['steps']} steps",
        ["network", "dtype", "", "seeds", "final loss", "test accuracy", "points to stock", "step"],
        rows,
        right=(3, 4, 5, 6, 7),
        caption=f"± after loss and accuracy: deviation over seeds; after points to stock: standard error of the difference "
        f"seed by seed; {some['test_images']} test images",
    )


def _smooth(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    """Mean over a window around each step, cut at both ends."""
    steps = sorted(losses)
    values, half = [losses[step] for step in steps], SMOOTHED_OVER // 2
    return steps, [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(results: Results) -> None:
    """One panel per network and dtype, a thin line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = results.panels()
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.2), sharey=True, squeeze=False, constrained_layout=True
    )
    some = next(iter(results.finished.values()))
    for axes, panel in zip(grid[0], panels):
        for provider, colour in COLOURS.items():
            found = results.column(panel, provider, "accuracy")
            for seed in found:
                label = None
                if seed == min(found):
                    figures = _mean_and([100 * value for value in found.values()], statistics.stdev, ".2f", " %")
                    label = f"{provider.replace('_nchw', ', NCHW')}: {figures} on the test set"
                steps, values = _smooth(results.losses.get((*panel, provider, seed), {}))
                axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.85, label=label)
        axes.set(
            title=f"{panel[0]}, {panel[1]}",
            xlabel=f"step (batch {some['batch']}, {some['dataset']}, {some['size']}×{some['size']})",
            yscale="log",
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    grid[0][0].set_ylabel(f"training loss, mean over {SMOOTHED_OVER} steps")
    figure.savefig(results.curves_path, dpi=150)
    pyplot.close(figure)


def run(options: argparse.Namespace, results: Results) -> None:
    """Train what the files do not hold yet."""
    data = labelled_images.load(options.data)
    if not 2 <= options.batch <= len(data.train_x):
        raise UsageError(f"--batch: between 2 and the {len(data.train_x)} training images, got {options.batch}")
    plan = Plan(options.size, options.batch, options.steps, options.lr, min(options.test_images, len(data.test_x)))
    setting = {"dataset": data.name, **vars(plan)}
    found = info.versions()
    wanted = [
        (network, dtype, provider, seed)
        for network in options.network
        for dtype in options.dtype
        for seed in options.seeds
        for provider in options.providers
    ]
    todo = results.missing(wanted, setting)
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are in {results.accuracy_path} already")
    with progress_bar() as progress:
        task = progress.add_task("", total=len(todo) * plan.steps)
        for key in todo:
            network, dtype, provider, seed = key

            def advance(loss: float, text: str = f"{network} {dtype} {provider} seed {seed}") -> None:
                progress.update(task, advance=1, description=f"{text}: loss {loss:.3f}")

            losses, right, seconds = train(key, data, plan, advance)
            last = losses[-LAST:]
            results.append(
                key,
                losses,
                setting
                | {
                    "final_loss": f"{statistics.fmean(last):.5g}",
                    "accuracy": f"{right:.5f}",
                    "step_s": f"{statistics.median(seconds):.4f}",
                    "threads": torch.get_num_threads(),
                    "device": info.device_name("cpu"),
                    "versions": f"resnet_fused {found['resnet_fused']}; torch {found['torch']}; "
                    f"torchvision {found['torchvision']}",
                    "commit": found["commit"],
                },
            )
    results.read()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network, provider = one_of("network", networks.BUILDERS), one_of("provider", tuple(PROVIDERS))
    parser.add_argument("--network", type=network, nargs="+", default=["resnet50", "wide_resnet50_2"], metavar="NAME")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32"], help="bf16: autocast")
    parser.add_argument(
        "--providers", type=provider, nargs="+", default=["stock", "fused"], metavar="NAME", help=", ".join(PROVIDERS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--lr", type=float, default=0.005, help="the highest learning rate")
    parser.add_argument("--size", type=image_size, default=32, help="images are enlarged to SIZE×SIZE")
    parser.add_argument("--test-images", type=positive, default=10_000, help="how many, from the first on")
    parser.add_argument(
        "--data", metavar="FOLDER|digits", help="idx files; default: Debian's Fashion-MNIST, else digits"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--plot", action="store_true", help="no training: table and picture from what the files hold")
    options = parser.parse_args(arguments)
    try:
        require_rich()
        results = Results(options.results)
        if not options.plot:
            run(options, results)
        print_results(results)
        if results.finished:
            draw(results)
            print(f"loss curves: {results.curves_path}")
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the runs that were finished are in the files
    return 0


if __name__ == "__main__":
    sys.exit(main())
