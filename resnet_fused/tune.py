"""``resnet-fused tune``: measures on this GPU what networks run, and keeps what is fastest in a table.

First the configurations of the Triton kernels, then with these the routes: which kernels run each chain.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import backends, clock, models, networks, routes, tables, tune_folded, tune_routes
from .console import UsageError, print_table, progress_bar, warn

if TYPE_CHECKING:  # Triton may be absent
    from .backends.triton import devices
    from .backends.triton.recorder import Workload
    from .backends.triton.trial import Trial
    from .backends.triton.tuning import Config
    from .backends.triton.tuning import Entry as ConfigEntry

SAMPLES = 20


def gpu_to_measure() -> torch.device:
    """The current GPU.

    Raises:
        UsageError: nothing can be measured here; says what is missing.
    """
    if torch.are_deterministic_algorithms_enabled():
        raise UsageError(
            "tune: deterministic algorithms are asked for (torch.use_deterministic_algorithms), and a new table may change "
            "the last bits of results: tune without, then use the table"
        )
    if importlib.util.find_spec("triton") is None:
        raise UsageError("tune: Triton is not installed: pip install resnet_fused[triton]")
    if not torch.cuda.is_available():
        raise UsageError("tune: PyTorch sees no GPU: the kernels are measured where they run")
    reason = backends.unavailable_backends().get("triton")
    if reason is not None:
        raise UsageError(f"tune: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Group:
    """Workloads that share an entry of the table, and how often each occurs."""

    members: dict[Workload, int]

    @property
    def first(self) -> Workload:
        return next(iter(self.members))

    def mean(self, of: Callable[[Workload], float]) -> float:
        """Of a launch."""
        return sum(count * of(workload) for workload, count in self.members.items()) / sum(self.members.values())


def groups(counts: Iterable[tuple[Workload, int]], gpu: devices.Device, kernels: Sequence[str] | None) -> list[Group]:
    """By entry of the table, in the order of their first workload; of ``kernels`` only (None: of all)."""
    from .backends.triton.tuning import entry_key

    found: dict[str, dict[Workload, int]] = {}
    for workload, count in counts:
        if kernels is None or workload.kernel in kernels:
            members = found.setdefault(entry_key(workload.kernel, workload.shape, workload.dtype, gpu), {})
            members[workload] = members.get(workload, 0) + count
    return [Group(members) for members in found.values()]


def tune_group(
    group: Group,
    gpu: devices.Device,
    device: torch.device,
    timer: clock.Clock,
    path: Path | None,
    report: Callable[[str], None],
    most: int | None = None,
) -> ConfigEntry:
    """Measure one entry of the table and write it: the mean time of a launch, over all members.

    ``most`` configurations are tried, those first that the cost model finds fastest; None: all.

    Raises:
        tuning.NothingWorks: no configuration is right, or none runs.
    """
    from .backends.triton import cost, tuning
    from .backends.triton.trial import Trial

    question = group.first.kernel, group.first.shape, group.first.dtype, gpu
    trials = {workload: Trial(workload, device) for workload in group.members}

    def microseconds(trial: Trial, config: Config) -> float:
        sample = timer.prepare(lambda: trial.call(config))
        return statistics.median(sample() for _ in range(SAMPLES))

    return tuning.tune(
        *question,
        run=lambda config: group.mean(lambda workload: microseconds(trials[workload], config)),
        check=lambda config: all(trial.accuracy(config).is_right for trial in trials.values()),
        configs=cost.ranked(*question)[:most],
        path=path,
        report=report,
    )


def describe_shape(workload: Workload) -> str:
    """Its sizes, and the flags that are set."""
    of = workload.shape
    sizes = [f"{name} {of[name]}" for name in ("m", "c", "k", "h", "w") if of.get(name)]
    flags = sorted(name for name, value in of.items() if name not in ("m", "c", "k", "h", "w", "stride") and value)
    return " ".join([*sizes, *(["stride 2"] if of.get("stride", 1) == 2 else []), *flags])


def describe_config(config: Config) -> str:
    return f"{config.block_m}×{config.block_n}×{config.block_k} w{config.warps} s{config.stages}"


def _row(group: Group, entry: ConfigEntry, gpu: devices.Device) -> list[str]:
    from .backends.triton import cost

    first = group.first
    predicted = cost.predict(first.kernel, first.shape, first.dtype, entry.config, gpu).seconds * 1e6
    bound = group.mean(lambda workload: workload.roofline_seconds(gpu)) * 1e6
    figures = [f"{entry.us:.1f}", f"{predicted:.1f}", f"{100 * bound / entry.us:.0f} %"]
    return [first.kernel, describe_shape(first), describe_config(entry.config), *figures]


def _counts(
    names: Sequence[str], batch: int, image_size: int, dtype: str, training: bool
) -> Iterable[tuple[Workload, int]]:
    """Of the networks, with 3×3 convolutions of this package and of cuDNN: only times tell which will be used."""
    from .workloads import workloads

    for name in names:
        network = _on_meta(name)
        for own_conv3x3 in (True, False):
            yield from workloads(network, batch, image_size, networks.DTYPES[dtype], training, own_conv3x3).items()


def tune_all(
    todo: Sequence[Group],
    gpu: devices.Device,
    device: torch.device,
    timer: clock.Clock,
    path: Path | None,
    most: int | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Measure every group. What is done stays in the table when this is interrupted, and is printed.

    Returns:
        Rows of the table for a terminal; what was left out, and why.
    """
    from .backends.triton import tuning

    rows: list[list[str]] = []
    left_out: list[str] = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("tune", total=len(todo))
            for group in todo:
                progress.update(task, description=f"{group.first.kernel} {describe_shape(group.first)}")
                try:
                    rows.append(_row(group, tune_group(group, gpu, device, timer, path, left_out.append, most), gpu))
                except tuning.NothingWorks as error:
                    left_out.append(str(error))
                progress.advance(task)
    finally:
        if rows:
            header = ["kernel", "shape", "configuration", "µs", "predicted µs", "of roofline"]
            print_table(f"{len(rows)} of {len(todo)} entries on {gpu.name}", header, rows, right=(3, 4, 5))
    return rows, left_out


def tune_kernels(
    names: Sequence[str],
    batch: int,
    image_size: int,
    dtypes: Sequence[str],
    training: bool,
    device: torch.device,
    path: Path,
    kernels: Sequence[str] | None,
    most: int | None,
) -> bool:
    """Configurations of the Triton kernels that the networks launch. Returns whether every entry found one."""
    from .backends.triton import devices, tuning

    gpu = devices.describe(device)
    counts = [pair for dtype in dtypes for pair in _counts(names, batch, image_size, dtype, training)]
    todo = groups(counts, gpu, kernels)
    if not todo:
        raise UsageError(f"--kernel: these networks launch no {' and no '.join(kernels or ())}")
    rows, left_out = tune_all(todo, gpu, device, clock.Clock(device), path, most)
    tuning.reload()  # routes are measured with what was found
    for line in left_out:
        warn(line)
    print(f"{len(rows)} entries written to {path}")
    return len(rows) == len(todo)


def tune_chains(
    names: Sequence[str],
    batch: int,
    image_size: int,
    dtypes: Sequence[str],
    training: bool,
    device: torch.device,
    path: Path,
) -> None:
    """Routes of the chains of the networks, and of the residual addition alone."""
    timer = clock.Clock(device)
    rows: list[list[str]] = []
    left_out: list[str] = []
    cases = {
        (case.name, dtype): case
        for dtype in dtypes
        for name in names
        for case in tune_routes.chains(_on_meta(name), batch, image_size, networks.DTYPES[dtype], training)
    }
    try:
        with progress_bar() as progress:
            task = progress.add_task("routes", total=len(cases))
            for (name, dtype), case in cases.items():
                progress.update(task, description=name)
                entry = tune_routes.tune_case(case, networks.DTYPES[dtype], device, timer, path, left_out.append)
                rows.append(tune_folded.row(f"{name} {dtype}", entry))
                progress.advance(task)
        for dtype in dtypes if training else ():
            entry = tune_routes.tune_add_relu(batch, networks.DTYPES[dtype], device, timer, path, left_out.append)
            rows.append(tune_folded.row(f"add_relu {dtype}", entry))
    finally:
        if rows:
            header = ["chain", "stock µs", "µs", "faster", "runs on"]
            print_table(f"{len(rows)} routes", header, rows, right=(1, 2, 3))
    for line in left_out:
        warn(line)
    print(f"{len(rows)} routes written to {path}")


def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.BUILDERS[name]()


PARTS = ("kernels", "routes")


def run(
    names: Sequence[str],
    *,
    batch: int = 256,
    image_size: int = 224,
    dtypes: Sequence[str] = ("bf16",),
    mode: str = "train",
    table: str | None = None,
    kernels: Sequence[str] | None = None,
    most: int | None = None,
    only: Sequence[str] | None = None,
) -> int:
    """Measure what the networks run, and update the table; 1 when an entry found no configuration.

    Args as those of the command; ``most``: its ``--configs``, see ``tune_group``; ``only``: of ``PARTS``, by default both, or
    the kernels alone where ``kernels`` names some.
    """
    parts = only or (PARTS if kernels is None else PARTS[:1])
    device = gpu_to_measure()
    from .backends.triton import configs

    for name in kernels or ():
        if name not in configs.KERNELS:
            raise UsageError(f"--kernel: unknown kernel {name!r}, expected one of {', '.join(configs.KERNELS)}")
    path = tables.user_table() if table is None else Path(table).expanduser()
    if path.is_dir():
        raise UsageError(f"--table: {path} is a folder")
    if mode == "train" and batch * (image_size // 32) ** 2 < 2:
        raise UsageError("training needs more than one value per channel: a larger --batch or --image-size")
    question = names, batch, image_size, dtypes, mode == "train", device, path
    complete = tune_kernels(*question, kernels, most) if "kernels" in parts else True
    if "routes" in parts:
        tune_chains(*question)
        routes.reload()
        if mode == "infer":
            tune_folded.run(names, batch, image_size, dtypes, device, path)
    return 0 if complete else 1
