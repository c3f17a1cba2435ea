"""Memory of a training step on a processor: stock against fused, each in a process of its own.

Three figures: the bytes that autograd keeps for the backward, the growth of the resident set by the forward, and its peak
within a whole step (forward, loss, backward, SGD with momentum), both from before the step. Kept bytes are counted exactly:
whole storages, each once, without parameters and buffers, with the input batch and with what autocast makes of the weights.
The resident set adds what the allocator and the libraries hold.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import info, networks, peak_memory
from resnet_fused.arguments import Parser, image_size, one_of, positive
from resnet_fused.console import UsageError, print_table, progress_bar, require_rich, warn
from resnet_fused.result_file import append_csv

PROVIDERS = ("stock", "fused")
FIGURES = ("saved_bytes", "rss_forward_mib", "rss_peak_mib")
RATIOS = tuple(f"{figure.rpartition('_')[0]}_ratio" for figure in FIGURES)  # stock / this row: above 1 is less memory
COLUMNS = (
    "network",
    "provider",
    "dtype",
    "batch",
    "size",
    *FIGURES,
    *RATIOS,
    "threads",
    "device",
    "versions",
    "commit",
)


@dataclass(frozen=True)
class Case:
    """One measurement."""

    network: str
    provider: str
    dtype: str
    batch: int
    size: int


@dataclass(frozen=True)
class Need:
    """What it gave: how often a storage of (bytes, shape, dtype) is kept; MiB, or None where the system cannot tell."""

    kept: Counter[tuple[int, tuple[int, ...], str]]
    rss_forward_mib: float | None
    rss_peak_mib: float | None

    @property
    def saved_bytes(self) -> int:
        return sum(count * key[0] for key, count in self.kept.items())


def _loss(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        out = model(x)
    return F.cross_entropy(out.float(), target)


def kept_for_backward(
    model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype
) -> Counter[tuple[int, tuple[int, ...], str]]:
    """Storages that one forward and its loss keep; of several tensors in one storage the largest gives shape and dtype."""
    # The tensors are held until the count is done: a freed address may be used again, and would hide a second storage.
    saved = [x]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, x, target, dtype)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    largest: dict[int, Tensor] = {}
    for tensor in saved:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and tensor.untyped_storage().nbytes():
            largest[address] = max(largest.get(address, tensor), tensor, key=lambda t: t.numel() * t.element_size())
    del loss  # held until here as well
    return Counter(
        (t.untyped_storage().nbytes(), tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in largest.values()
    )


def measure_here(case: Case) -> Need:
    """Measure in this process, which should have done nothing before."""
    torch.manual_seed(0)
    dtype = networks.DTYPES[case.dtype]
    model = networks.stock_model(case.network)
    if case.provider == "fused":
        model = networks.copy_of(case.network, model.state_dict(), 1000, fused=True)
    model = networks.in_layout(model, torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    # A small step first: libraries, thread pools and the optimizer's state are there before the step, not of it.
    _loss(model, torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long), dtype).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # Noise rather than zeros: pages that nobody wrote to are not resident.
    x = torch.randn(case.batch, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
    target = torch.arange(case.batch) % 1000

    peak_memory._trim()
    before, highest = peak_memory._status("VmRSS"), peak_memory._status("VmHWM")
    reset = peak_memory._forget_peak()
    loss = _loss(model, x, target, dtype)
    peak_memory._trim()
    forward = peak_memory._status("VmRSS")
    loss.backward()
    optimizer.step()
    peak = peak_memory._status("VmHWM")
    if not reset and peak == highest:
        peak = None  # an older peak that cannot be forgotten is higher than this step's
    optimizer.zero_grad(set_to_none=True)
    del loss
    return Need(
        kept_for_backward(model, x, target, dtype),
        None if before is None or forward is None else forward - before,
        None if before is None or peak is None else peak - before,
    )


def measure(case: Case) -> Need:
    """``measure_here`` in a fresh process: one never gives back all that an earlier provider touched.

    Raises:
        BrokenProcessPool: the process was killed, as it is when memory runs out.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure_here, case).result()


def _figures(need: Need) -> tuple[float | None, ...]:
    return need.saved_bytes, need.rss_forward_mib, need.rss_peak_mib


def _ratios(stock: Need, need: Need) -> list[float | None]:
    return [a / b if a and b and b > 0 else None for a, b in zip(_figures(stock), _figures(need), strict=True)]


def rows(case: Case, needs: dict[str, Need]) -> list[dict[str, Any]]:
    """CSV rows of one network and dtype."""
    found = info.versions()
    made = []
    for provider, need in needs.items():
        figures = dict(zip(FIGURES, ["" if f is None else f"{f:.1f}" for f in _figures(need)], strict=True))
        ratios = _ratios(needs["stock"], need)
        made.append(
            {"network": case.network, "provider": provider, "dtype": case.dtype, "batch": case.batch, "size": case.size}
            | figures
            | {"saved_bytes": need.saved_bytes}
            | dict(zip(RATIOS, ["" if r is None else f"{r:.4f}" for r in ratios], strict=True))
            | {
                "threads": torch.get_num_threads(),
                "device": info.device_name("cpu"),
                "versions": f"resnet_fused {found['resnet_fused']}; torch {found['torch']}; "
                f"torchvision {found['torchvision']}",
                "commit": found["commit"],
            }
        )
    return made


def _cells(case: Case, stock: Need, need: Need) -> list[str]:
    mib = (need.saved_bytes / 2**20, need.rss_forward_mib, need.rss_peak_mib)
    pairs = zip(mib, _ratios(stock, need), strict=True)
    cells = [(f"{f:,.1f}" if f is not None else "", f"{r:.2f}×" if r is not None else "") for f, r in pairs]
    return [case.network, case.dtype, case.provider, *(cell for pair in cells for cell in pair)]


def print_detail(case: Case, needs: dict[str, Need]) -> None:
    """What is kept, provider beside provider, the largest sum first."""
    keys = {key for need in needs.values() for key in need.kept}
    totals = {key: max(need.kept[key] for need in needs.values()) * key[0] for key in keys}
    made = []
    for key in sorted(keys, key=lambda key: (-totals[key], key)):
        nbytes, shape, dtype = key
        whole = math.prod(shape) * getattr(torch, dtype).itemsize
        part = "" if whole == nbytes else f"{whole / 2**20:.3f} of "  # a view that keeps more than it shows
        made.append(
            [
                "×".join(map(str, shape)) or "scalar",
                dtype,
                f"{part}{nbytes / 2**20:,.3f}",
                *(
                    cell
                    for need in needs.values()
                    for cell in (
                        (need.kept[key], f"{need.kept[key] * nbytes / 2**20:,.2f}") if need.kept[key] else ("", "")
                    )
                ),
            ]
        )
    print_table(
        f"{case.network}, {case.dtype}: storages kept for the backward, MiB",
        ["shape", "dtype", "each", *(title for name in needs for title in (f"{name}: count", "sum"))],
        made,
        right=range(2, 3 + 2 * len(needs)),
    )


def _check_results_file(path: Path) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--results-file: cannot write {path}: no such folder, or a folder itself")
    if path.exists() and path.stat().st_size:
        with open(path, newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise UsageError(f"--results-file: {path} holds other columns than these rows")


def run(options: argparse.Namespace) -> int:
    """Measure all, append rows after each pair, print the table; 1 when a process did not come back."""
    _check_results_file(options.results_file)
    pairs = [(network, dtype) for network in options.network for dtype in options.dtype]
    table: list[list[str]] = []
    failed = False
    with progress_bar() as progress:
        task = progress.add_task("", total=len(PROVIDERS) * len(pairs))
        for network, dtype in pairs:
            needs: dict[str, Need] = {}
            for provider in PROVIDERS:
                case = Case(network, provider, dtype, options.batch, options.size)
                progress.update(task, description=f"{network} {dtype} {provider}")
                try:
                    needs[provider] = measure(case)
                except BrokenProcessPool:
                    warn(f"{network}, {dtype}, {provider}: the process was killed, most likely for want of memory")
                    failed = True
                    break  # one provider alone says nothing
                progress.advance(task)
            if len(needs) < len(PROVIDERS):
                continue
            append_csv(str(options.results_file), rows(case, needs), COLUMNS)
            table += [_cells(Case(network, name, dtype, 0, 0), needs["stock"], need) for name, need in needs.items()]
            if options.detail:
                progress.stop()
                print_detail(case, needs)
                progress.start()
    print_table(
        f"memory of a training step, batch {options.batch}, {options.size}×{options.size}, MiB",
        ["network", "dtype", "", "kept for backward", "", "forward", "", "peak of step", ""],
        table,
        right=range(3, 9),
        caption="×: stock / this row; forward and peak: growth of the resident set from before the step",
    )
    print(f"rows appended to {options.results_file}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network = one_of("network", networks.BUILDERS)
    parser.add_argument(
        "--network", type=network, nargs="+", default=["resnet18", "resnet50", "resnet101"], metavar="NAME"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"], help="bf16: autocast")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--size", type=image_size, default=224)
    parser.add_argument("--detail", action="store_true", help="what is kept, by shape and dtype, largest first")
    default = Path(__file__).parent / "results" / "memory_cpu.csv"
    parser.add_argument("--results-file", type=Path, default=default, metavar="CSV", help="rows are appended")
    options = parser.parse_args(arguments)
    try:
        require_rich()
        if options.batch * (options.size // 32) ** 2 < 2:
            raise UsageError("training needs more than one value per channel: a larger --batch or --size")
        return run(options)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
