"""Measure everything on a GPU: checks, ceilings and kernels, blocks, whole networks; ten minutes at a time.

Every step is a command of its own, in a process of its own: one that crashes, hangs or runs out of memory costs itself only.
Rows are appended to files as soon as they are known, and what is done is noted: the next run goes on with what is left, on the
same kind of device, whatever the commit. A step that failed is run again. When the time is used, no step begins, the one that
runs is stopped, and what is left is told.

Before blocks and networks ``resnet-fused tune`` measures what ``auto`` takes on this GPU, unless the user's table has routes for
it; each tuning gets a quarter of the minutes at most.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import dry_run
import plot
import report
import torch
from gpu_steps import DTYPES, HERE, LIBRARY, MODELS, PARTS, TUNE, Plan, Step, is_tuned, steps

from resnet_fused import backends, info, networks
from resnet_fused.arguments import Parser, image_size, one_of, positive
from resnet_fused.console import require_rich, warn
from resnet_fused.result_file import append_csv, read

PASSED, FAILED, STOPPED = "passed", "FAILED", "stopped"
RECORD = "steps_gpu.csv"
COLUMNS = ("part", "step", "result", "seconds", "device", "key", "versions", "commit")
GRACE_S = 10  # between asking a process to end and ending it


class Record:
    """What was done on a device, in a file."""

    def __init__(self, folder: Path, device: str) -> None:
        self._path, self._device = folder / RECORD, device

    def results(self) -> dict[str, str]:
        """The last result of each step, by its key."""
        return {row["key"]: row["result"] for row in read(self._path) if row["device"] == self._device}

    def add(self, step: Step, result: str, seconds: float) -> None:
        row = {
            "part": step.part,
            "step": step.name,
            "result": result,
            "seconds": f"{seconds:.1f}",
            "device": self._device,
            "key": step.key,
            **info.provenance("triton"),
        }
        append_csv(str(self._path), [row], COLUMNS)


def in_a_process(step: Step, limit_s: float) -> str:
    """Run a step; it is stopped, with all that it started, when ``limit_s`` are over."""
    script = ["-m", LIBRARY] if step.script == LIBRARY else [str(HERE / f"{step.script}.py")]
    environment = os.environ | ({backends.ENVIRONMENT_VARIABLE: step.backend} if step.backend else {})
    process = subprocess.Popen([sys.executable, *script, *step.arguments], env=environment, start_new_session=True)
    try:
        return PASSED if process.wait(limit_s) == 0 else FAILED
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def here(step: Step, limit_s: float) -> str:
    """Run a step in this process, which cannot stop it: for a dry run."""
    module = importlib.import_module("resnet_fused.cli" if step.script == LIBRARY else step.script)
    try:
        with backends.backend(step.backend) if step.backend else nullcontext():
            return PASSED if module.main(list(step.arguments)) == 0 else FAILED
    except SystemExit as end:
        return PASSED if not end.code else FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


def run(todo: Sequence[Step], plan: Plan, minutes: float, record: Record) -> dict[str, list[Step]]:
    """Run steps until the time is over: which passed, failed, were stopped, and are left."""
    begin, execute = time.monotonic(), here if plan.tiny else in_a_process
    found: dict[str, list[Step]] = {PASSED: [], FAILED: [], STOPPED: [], "left": []}
    for number, step in enumerate(todo, 1):
        remaining = 60 * minutes - (time.monotonic() - begin)
        if remaining <= 0:
            found["left"].append(step)
            continue
        print(f"\n[{number} of {len(todo)}, {remaining / 60:.1f} min left] {step.part}: {step.name}\n  {step.command}")
        sys.stdout.flush()
        start, own_share = time.monotonic(), 60 * minutes * step.share
        result = execute(step, min(remaining, own_share))
        if result == STOPPED and own_share > remaining:  # not by its own share: it is still to be done
            found["left"].append(step)
            continue
        found[result].append(step)
        record.add(step, result, time.monotonic() - start)
    return found


def is_done(step: Step, before: dict[str, str]) -> bool:
    """A tuning that used its share up has left what it found in the table, and would begin where it began."""
    result = before.get(step.key)
    return result == PASSED or (result == STOPPED and step.share < 1)


def left_to_do(plan: Plan, record: Record) -> list[Step]:
    """The steps that are not done; says what is left out here."""
    todo = steps(plan, lambda reason: warn(f"left out: {reason}"))
    if not plan.resume:
        return todo
    before = record.results()
    tunings = [step for step in todo if step.name.startswith(TUNE)]
    noted = any(f" {TUNE} " in key for key in before)
    if tunings and not noted and is_tuned(torch.device(plan.device, torch.cuda.current_device())):
        print("tune: the user's table has routes for this device, which are taken as they are")
        todo = [step for step in todo if step not in tunings]
    return [step for step in todo if not is_done(step, before)]


def tell(found: dict[str, list[Step]], options: argparse.Namespace) -> None:
    for step in found[FAILED]:
        warn(f"FAILED: {step.part}: {step.name}\n  {step.command}")
    for step in found[STOPPED]:
        warn(f"stopped after its share of the time: {step.name}; to its end: {step.command}")
    if found["left"]:
        parts = [part for part in PARTS if any(step.part == part for step in found["left"])]
        names = ", ".join(step.name for step in found["left"])
        print(f"\n{len(found['left'])} steps are left: {names}")
        print(f"to go on: python benchmarks/gpu.py --only {' '.join(parts)} {_chosen(options)}".rstrip())
    else:
        print("\nNothing is left.")


def _chosen(options: argparse.Namespace) -> str:
    """The options that are not at their defaults, as one types them."""
    defaults = vars(parser().parse_args([]))
    words: list[str] = []
    for name in ("minutes", "no_tune", "model", "dtype", "batch", "image_size", "results"):
        value = getattr(options, name)
        if value != defaults[name]:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + name.replace("_", "-"), *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)


def parser() -> Parser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    made.add_argument("--minutes", type=float, default=10, help="after which no step begins")
    made.add_argument("--again", action="store_true", help="measure also what is measured")
    made.add_argument("--no-tune", action="store_true", help="do not measure what auto takes")
    model = one_of("model", networks.BUILDERS)
    made.add_argument("--model", type=model, nargs="+", default=list(MODELS), metavar="NAME")
    made.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    made.add_argument("--batch", type=positive, default=256)
    made.add_argument("--image-size", type=image_size, default=224)
    made.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="go through everything on a processor with tiny sizes, in a temporary folder: nothing is measured; with "
        "TRITON_INTERPRET=1 through Triton's kernels too",
    )
    return made


def plan_of(options: argparse.Namespace) -> Plan:
    if options.dry_run:
        device, folder = "cpu", Path(tempfile.mkdtemp(prefix="resnet_fused_dry_run_"))
        batch, size = 4, 64  # with fewer images one rounding decides what stock is off by
    else:
        device, folder, batch, size = "cuda", options.results, options.batch, options.image_size
    return Plan(
        device,
        folder,
        options.only,
        options.model,
        options.dtype,
        batch,
        size,
        not options.no_tune,
        not options.again,
        options.dry_run,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a step failed; what is left is no failure."""
    made = parser()
    options = made.parse_args(argv)
    require_rich()
    if not (options.dry_run or torch.cuda.is_available()):
        made.error("PyTorch sees no GPU; --dry-run goes through everything on a processor")
    if not (options.dry_run or options.results.is_dir()):
        made.error(f"--results: no such folder: {options.results}")
    plan = plan_of(options)
    device = info.device_name(plan.device)
    record = Record(plan.folder, device)
    with dry_run.stand_ins() if plan.tiny else nullcontext():
        todo = left_to_do(plan, record)
        if plan.tiny:
            print(f"A dry run on {device}, into {plan.folder}: nothing below is a measurement.")
        print(f"{len(todo)} steps on {device}, {options.minutes:g} minutes")
        found = run(todo, plan, options.minutes, record)
    tell(found, options)
    report.show(plan.folder, device)
    for path in plot.draw(plan.folder):
        print(f"drawn: {path}")
    print("into the README: python benchmarks/report.py")
    return 1 if found[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
