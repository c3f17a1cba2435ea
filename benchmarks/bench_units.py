"""The blocks of ResNets one at a time: stock, torch.compile and fused, in training and in inference.

Every block that occurs (the stem, a basic block or bottleneck with and without a projection, at each resolution) with the
network's shapes, once for all networks that have it. Answers are compared with float64 first, on the whole batch: what is
chosen by shape is right at the shape that is timed, or gets no number. Then the contestants take turns, each finding L2 flushed;
on a GPU a call is a CUDA graph, so that only the GPU's time counts. Training is forward and backward (for half precision under
autocast), without the input's gradient in the stem.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_time import Bound, Clock, peak
from network_units import Block, read_network
from torch import Tensor, nn
from unit_passes import PLANS, Pass, inference

from resnet_fused import fuse, info, networks, optimize_for_inference, providers
from resnet_fused.arguments import Parser, device_name, image_size, one_of, positive
from resnet_fused.bench import again
from resnet_fused.console import print_table, progress_bar, require_rich, warn
from resnet_fused.result_file import append_csv, check_results_file, key_of, measured

STOCK, COMPILE, FUSED = "stock", "compile", "fused"
PLAN = {STOCK: "stock", COMPILE: "inductor", FUSED: "ours"}  # of unit_passes
LEAST = "ours_own_conv3x3"  # whose passes move least: the roofline of all contestants


@dataclass(frozen=True)
class Case:
    """A block of a network, in one mode and dtype."""

    network: str
    block: Block
    mode: str
    dtype: str

    @property
    def label(self) -> str:
        return "stem" if self.block.pooled else self.block.path[0].name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        first = self.block.path[0]
        return first.n, first.c, first.h, first.w

    @property
    def output(self) -> tuple[int, int, int, int]:
        last = self.block.path[-1]
        p, q = ((last.p + 1) // 2, (last.q + 1) // 2) if self.block.pooled else (last.p, last.q)
        return last.n, last.k, p, q

    def passes(self, contestant: str) -> list[Pass]:
        """Over memory, by the plan of a contestant, or of ``LEAST``."""
        return list(
            PLANS[PLAN.get(contestant, contestant)](self.block) if self.mode == "train" else inference(self.block)
        )

    def fixed(self, device: str) -> dict[str, Any]:
        """What all rows of the case have in common."""
        return {
            "op": f"{self.network} {self.label}",
            "mode": self.mode,
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "layout": "channels_last",
            "device": device,
        }


def cases(names: Iterable[str], batch: int, image: int, modes: Iterable[str], dtype: str) -> list[Case]:
    """Each distinct block once, under the first network that has it."""
    found: dict[Any, tuple[str, Block]] = {}
    for name in names:
        for block in read_network(name, batch, image).blocks:
            geometry = tuple((u.c, u.h, u.w, u.k, u.p, u.q, u.r, u.stride, u.groups) for u in block.units)
            found.setdefault((geometry, block.projection is None), (name, block))
    return [Case(name, block, mode, dtype) for mode in modes for name, block in found.values()]


# Contestants


def stock_block(case: Case) -> nn.Module:
    """The block in stock PyTorch, trained affine parameters and statistics made up."""
    network: Any = networks.stock_model(case.network)
    if case.block.pooled:
        block: nn.Module = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    else:
        block = nn.Sequential(network.get_submodule(case.label))
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return block


Step = Callable[[], list[Tensor]]  # the output, and in training the gradients


def step_of(block: nn.Module, case: Case, x: Tensor, grad: Tensor, autocast: bool = True) -> Step:
    dtype = networks.DTYPES[case.dtype]
    if case.mode == "infer":

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return [block(x)]

        return infer
    inputs = [*block.parameters()] if case.block.pooled else [x.requires_grad_(), *block.parameters()]

    def train() -> list[Tensor]:
        with torch.autocast(x.device.type, dtype, enabled=autocast and dtype.itemsize == 2):
            out = block(x)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return train


def contestant(name: str, source: nn.Module, case: Case) -> nn.Module:
    dtype = networks.DTYPES[case.dtype]
    block = networks.in_layout(copy.deepcopy(source), torch.channels_last).train(case.mode == "train")
    if case.mode == "infer":
        block = optimize_for_inference(block, dtype) if name == FUSED else block.to(dtype)
    elif name == FUSED:
        block = fuse(block)
    return providers.compiled(block, case.mode) if name == COMPILE else block


def errors(found: Sequence[Tensor], gold: Sequence[Tensor]) -> tuple[float, float]:
    """Relative to float64: of the output, and the largest of a gradient."""
    out, *gradients = (networks.relative_error(a, b) for a, b in zip(found, gold, strict=True))
    return out, max(gradients, default=0.0)


def is_right(found: tuple[float, float], stock: tuple[float, float], dtype: torch.dtype) -> bool:
    """As accurate as stock in the same dtype, up to a rounding and flipped ReLUs."""
    allowed = [providers.SLACK * error for error in stock]
    return found[0] <= allowed[0] + torch.finfo(dtype).eps and found[1] <= allowed[1] + providers.GRADIENT_FLOOR


@dataclass
class Result:
    """A contestant's error and times; ``problem`` says why there are none."""

    error: float = 0.0
    samples_ms: Tensor | None = None
    problem: str = ""

    def quantile(self, q: float = 0.5) -> float:
        assert self.samples_ms is not None
        return float(self.samples_ms.quantile(q))


def measure(case: Case, clock: Clock, repeats: int, fused_times: int) -> dict[str, Result]:
    """Check all, then time those that are right in turns."""
    device, dtype = clock.device, networks.DTYPES[case.dtype]
    torch.manual_seed(0)
    source = stock_block(case).to(device)
    x = torch.randn(case.shape, device=device).to(memory_format=torch.channels_last)
    if not case.block.pooled:
        x.relu_()  # what a block before this one gives
    # Images are float32 in training, as they are in whole networks: their cast belongs to the stem.
    x = x if case.block.pooled and case.mode == "train" else x.to(dtype)
    grad = torch.randn(case.output, device=device).to(dtype, memory_format=torch.channels_last)

    exact = networks.double_copy(source).train(case.mode == "train")
    gold = step_of(exact, case, x.detach().double(), grad.double(), autocast=False)()
    results: dict[str, Result] = {}
    steps: dict[str, Step] = {}
    stock: tuple[float, float] | None = None
    for name in (STOCK, COMPILE, FUSED):
        try:
            step = step_of(contestant(name, source, case), case, x.detach().clone(), grad)
            error = errors(step(), gold)
        except Exception as failure:  # one that cannot run is told: the others are still measured
            if name == STOCK:
                raise
            results[name] = Result(problem=f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}")
            continue
        stock = stock or error
        right = is_right(error, stock, dtype)
        results[name] = Result(max(error), problem="" if right else "WRONG ANSWER")
        if right:
            steps[name] = step
    del gold, exact
    samplers = {name: clock.prepare(step, lambda: None, graph=True) for name, step in steps.items()}
    for name in again(fused_times) if FUSED in steps else ():
        samplers[name], results[name] = samplers[FUSED], Result(results[FUSED].error)
    samples = [[sample() for sample in samplers.values()] for _ in range(repeats)]
    for name, column in zip(samplers, zip(*samples)):
        results[name].samples_ms = torch.tensor(column, dtype=torch.float64)
    return results


# Results


def roofline_s(case: Case, bound: Bound) -> float | None:
    """Seconds that the plan which moves least needs, each pass at the device's bandwidth or rate."""
    if bound is None:
        return None
    return sum(max(p.bytes / bound[0], p.flops / bound[1]) for p in case.passes(LEAST))


def csv_rows(case: Case, results: dict[str, Result], device: str, bound: Bound) -> list[dict[str, Any]]:
    """A row for each contestant that was right. GB/s are those of its own plan, the roofline is that of ``LEAST``."""
    provenance = info.provenance()
    made = []
    for name, result in results.items():
        if result.samples_ms is None:
            continue
        seconds, least = result.quantile() * 1e-3, roofline_s(case, bound)
        passes = case.passes(FUSED if name.startswith(FUSED) else name)
        flops = sum(p.flops for p in case.passes(STOCK))
        made.append(
            case.fixed(device)
            | {f"p{round(100 * q)}_ms": f"{result.quantile(q):.5f}" for q in (0.5, 0.2, 0.8)}
            | {
                "provider": name,
                "gb_per_s": f"{sum(p.bytes for p in passes) / seconds / 1e9:.4g}",
                "tflop_per_s": f"{flops / seconds / 1e12:.4g}",
                "fraction_of_roofline": "" if least is None else f"{least / seconds:.3g}",
                "ratio_to_stock": f"{results[STOCK].quantile() / result.quantile():.4f}",
                "error_vs_fp64": f"{result.error:.2e}",
                **provenance,
            }
        )
    return made


SHOWN = ("op", "mode", "shape", "provider", "p50_ms", "gb_per_s", "fraction_of_roofline", "ratio_to_stock")


def run(options: argparse.Namespace) -> int:
    """Measure every block; rows are appended as they come. 1 when a contestant failed or was wrong."""
    check_results_file(options.results_file)
    device, name = torch.device(options.device), info.device_name(options.device)
    clock, bound = Clock(device), peak(device, networks.DTYPES[options.dtype])
    todo = cases(options.network, options.batch, options.image_size, options.mode, options.dtype)
    done = measured(options.results_file, name, FUSED) if options.resume else set()
    todo = [case for case in todo if key_of(case.fixed(name)) not in done]
    table: list[list[str]] = []
    failed = 0
    with progress_bar() as progress, providers.searched_convolutions():
        task = progress.add_task("blocks", total=len(todo))
        for case in todo:
            told = f"{case.network} {case.label}, {case.mode}, {case.dtype}"
            progress.update(task, description=told)
            try:
                results = measure(case, clock, options.repeats, options.fused_times)
            except torch.OutOfMemoryError as error:
                results = {STOCK: Result(problem=str(error).splitlines()[0])}
            for contender, result in results.items():
                if result.problem:
                    failed += 1
                    warn(f"{told}: {contender}: {result.problem}")
            rows = csv_rows(case, results, name, bound)
            if options.results_file:
                append_csv(options.results_file, rows)
            providers.release(device)
            table += [[row[column] for column in SHOWN] for row in rows]
            progress.advance(task)
    print_table(f"blocks on {name}, {options.dtype}, commit {info.commit()}", SHOWN, table, right=range(4, 8))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network = one_of("network", networks.BUILDERS)
    default = ["resnet50", "resnet101", "resnet18"]
    parser.add_argument("--network", type=network, nargs="+", default=default, metavar="NAME")
    parser.add_argument("--mode", choices=("train", "infer"), nargs="+", default=["train", "infer"])
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--image-size", type=image_size, default=224)
    parser.add_argument("--device", type=device_name, default="cuda")
    parser.add_argument("--repeats", type=positive, default=11)
    parser.add_argument(
        "--fused-times", type=positive, default=3, metavar="N", help="what differs between them is noise"
    )
    parser.add_argument("--results-file", metavar="CSV", help="rows are appended")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has of this device")
    options = parser.parse_args(argv)
    require_rich()
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
