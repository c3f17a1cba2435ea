"""Why residual networks: plain and residual networks of two depths, trained alike on Fashion-MNIST.

The networks are those of He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2: 6n + 2 layers in three
stages, with shortcuts that have no parameters. A plain network is the residual one without its additions, from the same
weights, on the same batches, under the same learning rates. The pictures are averaged to 14×14.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import fashion_mnist
import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import BasicBlock
from resnet_fused.arguments import Parser, positive
from resnet_fused.console import print_table
from resnet_fused.layers import run_units

BATCH = 64
PEAK, MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4  # at 0.1, the paper's rate, the deep residual network starts badly here
PROBES, PROBE = 4, 256  # batches whose gradients are compared, and their size
REPORT_EVERY = 100


class PlainBlock(BasicBlock):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))))``: a BasicBlock without its addition; ``downsample`` is not used."""

    def forward(self, x: Tensor) -> Tensor:
        return run_units(x, [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)])


class PaddedIdentity(nn.Module):
    """Every second pixel of ``x``, zeros for the channels that are missing: option A of He et al.

    Args:
        missing: how many channels are added.
    """

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.missing))


class Network(nn.Module):
    """A 3×3 convolution, three stages of ``(depth − 2) / 6`` blocks, the mean over the pixels, a classifier.

    Args:
        block: BasicBlock or PlainBlock; both give the same parameters, and one seed the same values.
        depth: layers with weights, 6n + 2.
        width: channels of the first stage; the others have two and four times as many and half and a quarter of the extent.
    Input: ``[N, 1, H, W]``. Returns ``[N, 10]``.
    Raises:
        ValueError: ``depth`` is not 6n + 2.
    """

    def __init__(self, block: type[BasicBlock], depth: int, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth: expected 6n + 2, as 8, 14, 20, got {depth}")
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            first = block(channels // 2, channels, 2, PaddedIdentity(channels // 2)) if stage else block(width, width)
            stages += [first, *(block(channels, channels) for _ in range(blocks - 1))]
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(4 * width, len(fashion_mnist.CLASSES))
        for conv in convolutions(self):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = run_units(x, [(self.conv1, self.bn1, self.relu)])
        return self.fc(self.blocks(x).mean((2, 3)))


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """In the order in which they run."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def pictures(images: Tensor) -> Tensor:
    """``float32 [N, 1, 14, 14]``, channels_last, normalised: the means of 2×2 pixels of ``uint8 [N, 1, 28, 28]``."""
    x = (images.float() / 255 - fashion_mnist.MEAN) / fashion_mnist.DEVIATION
    return F.avg_pool2d(x, 2).contiguous(memory_format=torch.channels_last)


class Gradients(NamedTuple):
    """Of each convolution's weights ``w``, over several batches with gradients ``g``.

    ``size`` is the mean of ``‖g‖ · ‖w‖``: behind a batch norm the scale of ``w`` is of no effect, and this is the gradient
    along its direction. ``agreement`` is the mean cosine between the gradients of two different batches.
    """

    size: list[float]
    agreement: list[float]


def probe(network: Network, split: fashion_mnist.Split) -> Gradients:
    """Gradients of the first pictures of ``split``, on a copy of the network."""
    network = deepcopy(network).train()
    found: list[list[Tensor]] = []
    for images, labels in zip(split.images.split(PROBE)[:PROBES], split.labels.split(PROBE)):
        network.zero_grad()
        F.cross_entropy(network(pictures(images)), labels).backward()
        found.append([conv.weight.grad.flatten() for conv in convolutions(network)])
    size, agreement = [], []
    for conv, gradients in zip(convolutions(network), zip(*found)):
        norms = torch.stack([gradient.norm() for gradient in gradients])
        size.append(float(norms.mean() * conv.weight.detach().norm()))
        cosines = [F.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(gradients, 2)]
        agreement.append(float(torch.stack(cosines).mean()))
    return Gradients(size, agreement)


@dataclass
class Run:
    """One training: ``losses`` of every step, ``error`` on the test pictures, seconds and seconds of the processor."""

    kind: str
    depth: int
    losses: list[float]
    error: float
    before: Gradients
    after: Gradients
    training_s: float
    processor_s: float

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def error_of(network: Network, split: fashion_mnist.Split) -> float:
    network.eval()
    with torch.inference_mode():
        parts = zip(split.images.split(500), split.labels.split(500))
        wrong = sum(int((network(pictures(images)).argmax(1) != labels).sum()) for images, labels in parts)
    return wrong / len(split.labels)


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate: up in a line during the first tenth of the steps, down along a cosine to zero."""
    return min((step + 1) / max(1, steps // 10), (1 + math.cos(math.pi * step / steps)) / 2)


def train(case: tuple[str, int], options: argparse.Namespace) -> Run:
    """SGD with momentum of the network ``case``: "plain" or "residual", and its depth."""
    kind, depth = case
    training, test = fashion_mnist.load(options.data)
    torch.manual_seed(options.seed)
    network = Network(PlainBlock if kind == "plain" else BasicBlock, depth, options.width)
    network.to(memory_format=torch.channels_last)
    before = probe(network, training)
    epoch = len(training.labels) // BATCH
    steps = options.epochs * epoch
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_peak, steps=steps))
    order = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    begin, begin_processor = time.perf_counter(), time.process_time()
    network.train()
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(training.labels), generator=order)[: epoch * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(pictures(training.images[chosen])), training.labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % REPORT_EVERY == 0:
                recent = sum(losses[-REPORT_EVERY:]) / REPORT_EVERY
                print(f"{kind}-{depth}: step {len(losses)} of {steps}, loss {recent:.3f}", file=sys.stderr, flush=True)
    elapsed, processor = time.perf_counter() - begin, time.process_time() - begin_processor
    return Run(kind, depth, losses, error_of(network, test), before, probe(network, training), elapsed, processor)


def train_all(options: argparse.Namespace) -> list[Run]:
    """All four, several at once: on pictures this small two threads mostly wait for each other."""
    cases = [(kind, depth) for depth in sorted(options.depths, reverse=True) for kind in ("plain", "residual")]
    work = partial(train, options=options)
    if options.processes == 1:
        return [work(case) for case in cases]
    with ProcessPoolExecutor(
        options.processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(work, cases))


def smoothed(losses: list[float]) -> list[float]:
    """The mean over the last fortieth of the steps, at each step."""
    values = torch.tensor(losses, dtype=torch.float64)
    window = max(1, len(losses) // 40)
    sums = F.pad(values.cumsum(0), (1, 0))
    ends = torch.arange(1, len(losses) + 1)
    begins = (ends - window).clamp(min=0)
    return ((sums[ends] - sums[begins]) / (ends - begins)).tolist()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when everything is written."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    unfinished.replace(path)


def _curves(axes, runs: list[Run], colours: dict[int, str]) -> None:
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=colours[run.depth], linewidth=0.5, alpha=0.25)
        label = f"{run.depth} layers: test error {100 * run.error:.1f} %"
        axes.plot(steps, smoothed(run.losses), color=colours[run.depth], linewidth=2.2, label=label)
    axes.set(xlabel="step", title=f"{runs[0].kind} networks")
    axes.legend(frameon=False)


def draw(runs: list[Run], path: Path) -> None:
    """Above: the training losses, plain and residual. Below: size and agreement of the gradients before training."""
    depths = sorted({run.depth for run in runs})
    colours = dict(zip(depths, ("#2a78b5", "#d1495b")))
    figure, ((plain, residual), (size, agreement)) = pyplot.subplots(2, 2, figsize=(10, 7.2), constrained_layout=True)
    for axes, kind in ((plain, "plain"), (residual, "residual")):
        _curves(axes, sorted((run for run in runs if run.kind == kind), key=lambda run: run.depth), colours)
    highest = max(max(smoothed(run.losses)[len(run.losses) // 50 :]) for run in runs)
    lowest = min(min(smoothed(run.losses)) for run in runs)
    for axes in (plain, residual):
        axes.set(yscale="log", ylim=(0.8 * lowest, 1.1 * highest))
        axes.yaxis.set_major_locator(pyplot.FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5]))
        axes.yaxis.set_minor_locator(pyplot.NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    plain.set_ylabel("training loss")
    for run in sorted(runs, key=lambda run: (run.kind, run.depth)):
        style = {"color": colours[run.depth], "linestyle": "-" if run.kind == "residual" else (0, (3, 1.2))}
        place = [i / (len(run.before.size) - 1) for i in range(len(run.before.size))]
        for axes, values in ((size, run.before.size), (agreement, run.before.agreement)):
            axes.plot(place, values, linewidth=1.8, label=f"{run.kind}, {run.depth} layers", **style)
    size.set(yscale="log", title="before training: size of the gradients", ylabel="‖gradient‖ · ‖weights‖")
    agreement.set(title="before training: do two batches agree?", ylabel="cosine of their gradients")
    agreement.axhline(0, color="black", linewidth=0.8)
    for axes in (size, agreement):
        axes.set_xticks([0, 0.5, 1], ["first", "convolution", "last"])
        axes.legend(frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)


def write_curves(runs: list[Run], path: Path) -> None:
    """A row for each step, a column for each network."""
    with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *(f"{run.kind}-{run.depth}" for run in runs)])
        for step, losses in enumerate(zip(*(run.losses for run in runs)), 1):
            writer.writerow([step, *(f"{loss:.5f}" for loss in losses)])


def report(runs: list[Run], options: argparse.Namespace) -> None:
    print_table(
        f"Fashion-MNIST averaged to 14×14, {len(runs[0].losses)} steps of {BATCH} pictures, width {options.width}",
        ["", "parameters", "training loss", "test error", "training", "processor"],
        [
            (
                f"{run.kind}, {run.depth} layers",
                f"{sum(p.numel() for p in Network(BasicBlock, run.depth, options.width).parameters()):,}",
                f"{run.final_loss:.3f}",
                f"{100 * run.error:.2f} %",
                f"{run.training_s:.0f} s",
                f"{run.processor_s:.0f} s",
            )
            for run in runs
        ],
        right=(1, 2, 3, 4, 5),
        caption="training loss: mean of the last tenth of the steps",
    )
    print_table(
        "Gradients of the convolutions' weights, before → after training",
        ["", "size: first", "middle", "last", "agreement: first", "middle", "last"],
        [
            (
                f"{run.kind}, {run.depth} layers",
                *(f"{run.before.size[i]:.2g} → {run.after.size[i]:.2g}" for i in (0, len(run.before.size) // 2, -1)),
                *(
                    f"{run.before.agreement[i]:.2f} → {run.after.agreement[i]:.2f}"
                    for i in (0, len(run.before.size) // 2, -1)
                ),
            )
            for run in runs
        ],
        right=range(1, 7),
        caption=f"size: ‖gradient‖ · ‖weights‖; agreement: cosine between two of {PROBES} batches of {PROBE}",
    )


def depth(value: str) -> int:
    number = positive(value)
    if number < 8 or number % 6 != 2:
        raise argparse.ArgumentTypeError(f"expected 6n + 2 layers, as 8, 14, 20, got {number}")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=depth, nargs=2, default=[20, 44], metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--width", type=positive, default=16, help="channels of the first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the four files of Fashion-MNIST")
    parser.add_argument(
        "--output", type=Path, default=Path("degradation.png"), metavar="PNG", help="a .csv comes with it"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=min(4, os.cpu_count() or 1),
        help="networks trained at once, one thread each",
    )
    options = parser.parse_args(argv)
    if len(set(options.depths)) != 2:
        parser.error(f"--depths: expected two different ones, got {options.depths[0]} twice")
    if options.output.suffix != ".png":
        parser.error(f"--output: expected a name that ends in .png, got {options.output}")
    try:
        training, _ = fashion_mnist.load(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    if len(training.labels) < 2 * PROBE:
        parser.error(f"--data: expected at least {2 * PROBE} training pictures, got {len(training.labels)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)

    runs = train_all(options)
    report(runs, options)
    draw(runs, options.output)
    curves = options.output.with_suffix(".csv")
    write_curves(runs, curves)
    print(f"figure: {options.output}, curves: {curves}")


if __name__ == "__main__":
    main()
