"""The CUDA extension's kernels one call at a time, on the shapes of ResNet-50.

Passes over memory are timed beside a device copy that moves as many bytes (the goal: 90 % of its speed, from 16 MB on), the
algebra around batch norm beside PyTorch's formulas, and fused convolutions beside cuDNN with the passes that it needs for the
same work. Every call is compared with float64 before it is timed. Then the contestants take turns in one run, each finding L2
flushed and its inputs as they were; ours is timed twice, and a difference below that between the two means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from check_cuda import Side, opened, problem
from cuda_cases import HALF, STOCK, Case, Inputs, algebra, convolutions, folds, passes, pools
from gpu_time import Bound, Clock, launches, peak, roofline_share
from network_units import read_network
from torch import nn

from resnet_fused import info, networks
from resnet_fused.arguments import Parser, positive
from resnet_fused.backends.cuda import CudaConvolutionKernels, CudaKernels
from resnet_fused.console import print_table, progress_bar, warn
from resnet_fused.result_file import append_csv, measured

OURS, AGAIN, EAGER = "cuda", "cuda again", ", eager"
COPY, FORMULAS, CUDNN = "copy", "formulas", "cudnn+passes"
BASELINES = {
    "passes": COPY,
    "pool": COPY,
    "algebra": FORMULAS,
    "fold": FORMULAS,
    "conv": CUDNN,
}  # of each family of calls
# As graphs, so that only the GPU's time counts, or launched by the host, whose time is what the algebra saves. A folding reads
# the host's memory, which a graph may not.
GRAPHS = {"algebra": (True, False), "fold": (False,)}
MODE = "train"
GOAL, GOAL_BYTES = 0.90, 16_000_000  # share of a copy's speed, of calls that move at least so much


# ResNet-50


def network(width: int, image: int) -> list[tuple[int, int, int, int, int]]:
    """R, stride, C, K and the height of the input of every convolution of ResNet-50 in forward order; ``width``: channels of the
    stem, 64 in ResNet-50 itself."""

    def scaled(channels: int) -> int:
        return channels if channels == 3 else channels * width // 64

    units = [u for u in read_network("resnet50", 2, image).units if u.name != "fc"]
    return [(u.r, u.stride, scaled(u.c), scaled(u.k), u.h) for u in units]


def pairs(width: int, dtype: torch.dtype, device: torch.device) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The network's convolutions with their batch norms, which hold running statistics as after training."""
    made = []
    for r, stride, c, k, _ in network(width, 32):
        conv = nn.Conv2d(c, k, r, stride, r // 2, bias=False, device=device, dtype=dtype)
        norm = nn.BatchNorm2d(k, device=device, dtype=dtype)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        made.append((conv, norm))
    return made


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, Case]]:
    """Family, shape in words, and the case."""
    dtype = networks.DTYPES[options.dtype]
    make = Inputs(dtype, torch.channels_last, device)
    layers = network(options.width, options.image_size)
    outputs = dict.fromkeys((k, (size - 1) // stride + 1) for _, stride, _, k, size in layers)
    if "passes" in options.family:
        for k, p in outputs:
            for case in passes(make, (options.batch, k, p, p)):
                yield "passes", f"{options.batch}x{k}x{p}x{p}", case
    if "pool" in options.family:
        k, p = next(iter(outputs))
        for case in pools(make, (options.batch, k, p, p)):
            yield "pool", f"{options.batch}x{k}x{p}x{p}", case
    if "algebra" in options.family:
        for k, c in dict.fromkeys((k, c) for r, _, c, k, _ in layers if r == 1 and k == 4 * c):
            for case in algebra(make, k, c):
                yield "algebra", f"{k}x{c}", case
    if "fold" in options.family:
        # Parameters are trained in float32, whatever they are folded to.
        yield "fold", f"{len(layers)} layers", folds(make, pairs(options.width, torch.float32, device))
    if "conv" in options.family and dtype in HALF:
        for r, stride, c, k, size in dict.fromkeys(layers):
            if r in (1, 3):
                for case in convolutions(make, (r, stride, c, k, size, size), options.batch):
                    yield "conv", f"{options.batch}x{c}x{size}x{size} to {k}", case


# Contests


@dataclass
class Contest:
    """A right case with the times of its contestants.

    Attributes:
        error: relative to float64 (``networks.relative_error``), the largest of all results.
        samples: milliseconds by contestant.
        launched: how many launches ours and the baseline make; known on a GPU, for the algebra.
    """

    family: str
    shape: str
    case: Case
    error: float
    samples: dict[str, list[float]] = field(default_factory=dict)
    launched: tuple[int, int] | None = None

    def quantile(self, name: str, q: float = 0.5) -> float:
        return float(torch.tensor(self.samples[name], dtype=torch.float64).quantile(q))

    @property
    def baseline(self) -> str:
        """The contestant that ours is compared with."""
        return BASELINES[self.family]

    @property
    def seconds(self) -> float:
        """Of ours, the median."""
        return self.quantile(self.ours) * 1e-3

    @property
    def ours(self) -> str:
        """The contestant that the table shows: timed alone, unless it only runs launched by the host."""
        return OURS if OURS in self.samples else OURS + EAGER

    @property
    def ratio(self) -> float:
        """Time of the baseline / ours: above 1 where ours is faster; beside a copy, its share of the copy's speed."""
        return self.quantile(self.baseline + self.ours.removeprefix(OURS)) / self.quantile(self.ours)

    @property
    def noise(self) -> float:
        """Relative difference of ours timed twice."""
        again = AGAIN + self.ours.removeprefix(OURS)
        return abs(self.quantile(again) / self.quantile(self.ours) - 1)


def judged(case: Case, kernels: CudaConvolutionKernels, device: torch.device) -> tuple[str, float]:
    """What is wrong with a case, "" where nothing is; and the error of its worst result."""
    found, stock, gold = (
        side.answers(case) for side in (Side(kernels, device), Side(STOCK, device), Side(STOCK, device, wide=True))
    )
    wrong = problem(case, found, stock, gold)
    errors = [
        networks.relative_error(a, b) for a, b in zip(found, gold) if a.is_floating_point() and a.shape == b.shape
    ]
    return wrong, max(errors, default=0.0)


def contestants(
    family: str, case: Case, kernels: CudaConvolutionKernels, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], Callable[[], None]]:
    """Ours, the same again and the baseline by name; and what restores the inputs that they write over."""
    arguments = Side(kernels, device).copied(case.arguments)

    def restore() -> None:
        for ours, given in zip(arguments[: case.written], case.arguments):
            ours.copy_(given)

    def calling(k: Any) -> Callable[[], Any]:
        return lambda: (case.timed or case.call)(k, *arguments)

    if BASELINES[family] == COPY:
        source = torch.randint(256, (case.moved // 2,), dtype=torch.uint8, device=device)
        baseline = functools.partial(torch.empty_like(source).copy_, source)
    elif BASELINES[family] == CUDNN:
        without_convolutions = CudaKernels()
        without_convolutions.ops = kernels.ops
        baseline = calling(without_convolutions)
    else:
        baseline = calling(STOCK)
    return {OURS: calling(kernels), AGAIN: calling(kernels), BASELINES[family]: baseline}, restore


def held(contest: Contest, kernels: CudaConvolutionKernels, clock: Clock, repeats: int) -> None:
    """Takes the samples, the contestants in turns."""
    calls, restore = contestants(contest.family, contest.case, kernels, clock.device)
    with torch.no_grad():
        samplers = {
            name + ("" if graph else EAGER): clock.prepare(call, restore, graph)
            for graph in GRAPHS.get(contest.family, (True,))
            for name, call in calls.items()
        }
        contest.samples = {name: [] for name in samplers}
        for _ in range(repeats):
            for name, sample in samplers.items():
                contest.samples[name].append(sample())


def count_launches(contests: Sequence[Contest], kernels: CudaConvolutionKernels, device: torch.device) -> None:
    """Behind all timing, which a profiler could disturb."""
    for contest in contests:
        if device.type == "cuda" and contest.baseline == FORMULAS:
            calls, _ = contestants(contest.family, contest.case, kernels, device)
            with torch.no_grad():
                contest.launched = launches(calls[OURS]), launches(calls[FORMULAS])


# Results


def csv_rows(contest: Contest, dtype: str, device: str, bound: Bound) -> list[dict[str, Any]]:
    """With the columns of ``result_file.COLUMNS``, a row for each contestant."""
    case = contest.case
    fixed = {
        "op": case.name,
        "mode": MODE,
        "shape": contest.shape,
        "dtype": dtype,
        "layout": "" if contest.baseline == FORMULAS else "channels_last",
        "device": device,
        **info.provenance(),
    }
    made = []
    for name in contest.samples:
        times = {f"p{round(100 * q)}_ms": f"{contest.quantile(name, q):.5f}" for q in (0.5, 0.2, 0.8)}
        row = fixed | {"provider": name} | times
        seconds = contest.quantile(name) * 1e-3
        if case.moved:
            row["gb_per_s"] = f"{case.moved / seconds / 1e9:.4g}"
        share = roofline_share(case.moved, case.flops, seconds, bound)
        if share is not None:
            row["fraction_of_roofline"] = f"{share:.3g}"
        if case.flops:
            row["tflop_per_s"] = f"{case.flops / seconds / 1e12:.4g}"
        if name.startswith(OURS):
            row["error_vs_fp64"] = f"{contest.error:.2e}"
            if contest.baseline != COPY:  # which is no way to the same result
                stock = contest.baseline + (EAGER if name.endswith(EAGER) else "")
                row["ratio_to_stock"] = f"{contest.quantile(stock) / contest.quantile(name):.3f}"
        made.append(row)
    return made


def print_all(contests: Sequence[Contest], bound: Bound) -> None:
    """A line for each contest: times of ours and of the baseline, their ratio, and what ours reaches."""
    lines = []
    for c in contests:
        us = [f"{1e3 * c.quantile(name):.1f}" for name in (c.ours, c.baseline + c.ours.removeprefix(OURS))]
        eager = [
            f"{1e3 * c.quantile(name + EAGER):.1f}" if c.family == "algebra" else "" for name in (OURS, c.baseline)
        ]
        share = roofline_share(c.case.moved, c.case.flops, c.seconds, bound)
        reached = [
            f"{c.case.moved / c.seconds / 1e9:.0f}" if c.case.moved else "",
            "" if share is None else f"{share:.0%}",
        ]
        launched = "" if c.launched is None else f"{c.launched[0]} / {c.launched[1]}"
        ratio = [f"{c.ratio:.2f}", f"{c.noise:.1%}"]
        lines.append([c.case.name, c.shape, us[0], c.baseline, us[1], *ratio, *reached, *eager, launched])
    header = [
        "op",
        "shape",
        "µs",
        "beside",
        "its µs",
        "ratio",
        "noise",
        "GB/s",
        "of roofline",
        "eager µs",
        "its eager µs",
    ]
    print_table("all calls", [*header, "launches"], lines, right=(2, 4, 5, 6, 7, 8, 9, 10))


def print_summary(contests: Sequence[Contest]) -> None:
    """By operator: passes by their share of a copy's speed where they move enough, others by the ratio of times."""
    groups: dict[tuple[str, str], list[Contest]] = {}
    for c in contests:
        if c.baseline != COPY or c.case.moved >= GOAL_BYTES:
            groups.setdefault(
                (c.case.name if c.baseline == COPY else c.case.name.split(",")[0], c.baseline), []
            ).append(c)
    lines = []
    for (name, baseline), members in groups.items():
        ratios = torch.tensor([c.ratio for c in members], dtype=torch.float64)
        worst = members[int(ratios.argmin())]
        goal = "" if baseline != COPY else "met" if float(ratios.min()) >= GOAL else "MISSED"
        middle = f"{float(ratios.quantile(0.5)):.2f}"
        lines.append([name, baseline, str(len(members)), middle, f"{worst.ratio:.2f}", worst.shape, goal])
    header = ["op", "beside", "calls", "median ratio", "lowest", "at", f"{GOAL:.0%} of a copy"]
    print_table("summary", header, lines, right=(2, 3, 4), caption="ratio: time of what it stands beside / ours")


def run(options: argparse.Namespace, kernels: CudaConvolutionKernels, device: torch.device) -> int:
    """Checks and times every case; rows are appended as they come. 1 when an answer was wrong."""
    on_gpu, name = device.type == "cuda", info.device_name(str(device))
    clock, bound = Clock(device), peak(device, networks.DTYPES[options.dtype])
    done = measured(options.results_file, name) if options.resume else set()
    contests: list[Contest] = []
    wrong = 0
    with progress_bar() as progress, torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        task = progress.add_task("kernels", total=None)
        for family, shape, case in cases(options, device):
            progress.update(task, advance=1, description=f"{case.name} {shape}")
            if (case.name, MODE, shape, options.dtype) in done:
                continue
            told, error = judged(case, kernels, device)
            if told:
                wrong += 1
                warn(f"{case.name} {shape} {options.dtype}: WRONG ANSWER, not timed: {told}")
                continue
            contest = Contest(family, shape, case, error)
            held(contest, kernels, clock, options.repeats)
            if contest.baseline != FORMULAS:  # whose launches are counted in the end
                contest.case = dataclasses.replace(case, arguments=())
            contests.append(contest)
            if options.results_file and on_gpu:
                append_csv(options.results_file, csv_rows(contest, options.dtype, name, bound))
    count_launches(contests, kernels, device)
    print(f"CUDA kernels on {name}, {options.dtype}, commit {info.commit()}:")
    print_all(contests, bound)
    print_summary(contests)
    return 1 if wrong else 0


def octets(value: str) -> int:
    width = positive(value)
    if width % 8:
        raise argparse.ArgumentTypeError(f"expected a multiple of 8 channels, got {width}")
    return width


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--width", type=octets, default=64, help="channels of the network's stem; ResNet-50 has 64")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--repeats", type=positive, default=21)
    parser.add_argument("--backend", metavar="NAME", help="a backend of these operators that runs here; default: cuda")
    parser.add_argument("--results-file", metavar="CSV", help="rows measured on a GPU are appended")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has of this device")
    options = parser.parse_args(argv)
    kernels, device = opened(parser, options.backend)
    if device.type != "cuda" and options.results_file:
        print(f"No rows are written to {options.results_file}.")
    return run(options, kernels, device)


if __name__ == "__main__":
    sys.exit(main())
