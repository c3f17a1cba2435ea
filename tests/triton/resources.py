"""What the kernels need of a GPU, found without one: compile for a chip, then read the machine code.

``python tests/triton/resources.py`` compiles every shipped configuration, prints a table and writes ``budget.csv`` beside this
file; with a kernel's name, ``sm_90`` or a dtype it prints only those. Compiling happens in processes of its own, without
Triton's interpreter; one that crashes costs one row.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from registry import ARCHES, Case, multiplies, shipped

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = HERE / "budget.csv"

SHARED_KIB = dict(zip(ARCHES, (164, 228, 228)))  # of a multiprocessor, by architecture
TENSOR_CORE = dict(zip(ARCHES, ("HMMA", "HGMMA", "UTCHMMA")))


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler made of a case. ``failure`` is empty, or says why there is nothing else."""

    registers: int = 0
    stack: int = 0
    spills: int = 0  # LDL and STL
    shared: int = 0  # bytes of a program
    ctas_per_sm: int = 0
    mma: int = 0  # HGMMA on sm_90, UTCHMMA on sm_100, HMMA on sm_80
    hmma: int = 0  # of any architecture
    ldg128: int = 0  # global loads of 16 bytes for each thread, asynchronous copies and those of whole tiles (TMA) too
    stg128: int = 0
    seconds: float = 0.0
    failure: str = ""


def cuobjdump() -> str | None:
    """The disassembler that comes with Triton, else one on the path."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.is_file() else shutil.which("cuobjdump")


# In the process that compiles


def _compile(case: Case) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(case.module), case.function)
    names = list(function.arg_names)
    constants = {p.name: case.constants.get(p.name, False) for p in function.params if p.is_constexpr}
    constants |= {name: case.constants[name] for name in names if name in case.constants}
    missing = [name for name in names if name not in case.types and name not in constants]
    if missing:
        raise KeyError(f"{case.function}: no type for {', '.join(missing)}")
    signature = {name: "constexpr" if name in constants else case.types[name].split(":")[0] for name in names}
    multiples = [
        i
        for i, name in enumerate(names)
        if name not in constants and (signature[name][0] == "*" or ":" in case.types[name])
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    started = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    seconds = time.perf_counter() - started
    return dataclasses.replace(_read(compiled.asm["cubin"], compiled.metadata.shared, case), seconds=round(seconds, 2))


def _read(cubin: bytes, shared: int, case: Case) -> Resources:
    tool = cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", code))

    return Resources(
        registers=registers,
        stack=stack,
        spills=count(r"(?:LDL|STL)[.\w]*"),
        shared=shared,
        ctas_per_sm=occupancy(registers, shared, case.warps, case.arch),
        mma=count(TENSOR_CORE[case.arch] + r"[.\w]*"),
        hmma=count(r"HMMA[.\w]*"),
        ldg128=count(r"(?:LDG(?:STS)?\.[.\w]*128|UTMALDG[.\w]*)"),
        stg128=count(r"(?:STG\.[.\w]*128|UTMASTG[.\w]*)"),
    )


def occupancy(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that one multiprocessor holds at a time."""
    of_warp = -(-32 * registers // 256) * 256
    return min(65536 // (of_warp * warps), SHARED_KIB[arch] * 1024 // (shared + 1024), 64 // warps, 32)


def _work() -> None:
    for line in sys.stdin:
        try:
            found = _compile(Case(**json.loads(line)))
        except Exception as error:
            found = Resources(failure=f"{type(error).__name__}: {error}"[:400])
        print("\0" + json.dumps(dataclasses.asdict(found)), flush=True)  # Triton may print lines of its own


# In the process that asks


def _in_one_process(cases: Sequence[Case], tell: Callable[[Case, Resources], None]) -> list[Resources]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(HERE), environment.get("PYTHONPATH"))))
    found: list[Resources] = []

    def add(result: Resources) -> None:
        tell(cases[len(found)], result)
        found.append(result)

    while len(found) < len(cases):
        with tempfile.TemporaryFile("w+") as requests, tempfile.TemporaryFile("w+") as errors:
            requests.writelines(json.dumps(dataclasses.asdict(case)) + "\n" for case in cases[len(found) :])
            requests.seek(0)
            command = [sys.executable, __file__, "--work"]
            streams = {"stdin": requests, "stdout": subprocess.PIPE, "stderr": errors}
            with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **streams) as process:
                for line in process.stdout:
                    if line.startswith("\0"):
                        add(Resources(**json.loads(line[1:])))
            if len(found) < len(cases):
                errors.seek(0)
                last = errors.read().strip().splitlines()[-1:]
                add(Resources(failure=f"the compiler crashed ({process.returncode}): {' '.join(last)}"[:400]))
    return found


def measure(
    cases: Sequence[Case], processes: int = 1, tell: Callable[[Case, Resources], None] = lambda case, found: None
) -> list[Resources]:
    """What each case needs, in the order of ``cases``; ``tell`` hears of each as soon as it is known."""
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(_in_one_process, (cases[i::processes] for i in range(processes)), [tell] * processes))
    return [results[i % processes][i // processes] for i in range(len(cases))]


# The budget: CSV rows in which the registers of every shipped configuration are pinned

_KEY = ("kernel", "variant", "dtype", "arch", "block_m", "block_n", "block_k", "warps", "stages")
_COLUMNS = (*_KEY, "triton", "registers", "stack", "spills", "shared", "ctas_per_sm", "mma", "ldg128", "stg128")


def row(case: Case, found: Resources) -> dict[str, str]:
    import triton

    blocks = dict(zip(("block_m", "block_n", "block_k"), case.config))
    values = dataclasses.asdict(case) | dataclasses.asdict(found) | blocks
    values["triton"] = ".".join(triton.__version__.split(".")[:2])
    return {name: str(values[name]) for name in _COLUMNS}


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def read_budget() -> dict[tuple[str, ...], dict[str, str]]:
    if not BUDGET.is_file():
        return {}
    with BUDGET.open(encoding="utf-8", newline="") as file:
        return {key(r): r for r in csv.DictReader(file)}


def complaints(case: Case, found: Resources, pinned: dict[str, str] | None = None) -> list[str]:
    """What is wrong with a compiled case; nothing where all is well."""
    if found.failure:
        return [found.failure]
    wrong = []
    if found.stack:
        wrong.append(f"{found.stack} bytes of stack")
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.ctas_per_sm < 1 or found.shared > (SHARED_KIB[case.arch] - 1) * 1024:
        wrong.append(f"does not fit: {found.shared} bytes of shared memory, {found.registers} registers")
    if multiplies(case.kernel) and case.dtype != "float32" and not found.mma:
        wrong.append(f"no {TENSOR_CORE[case.arch]}")
    if not found.ldg128:
        wrong.append("no 16-byte loads")
    if not found.stg128 and not only_vectors(case):
        wrong.append("no 16-byte stores")
    same = pinned is not None and pinned["triton"] == row(case, found)["triton"]
    if same and found.registers > int(pinned["registers"]):
        wrong.append(f"{found.registers} registers, {pinned['registers']} in budget.csv")
    return wrong


def only_vectors(case: Case) -> bool:
    """Whether the kernel stores nothing but per-channel sums, a number for each thread."""
    stores_matrix = {"bn_stats": False, "bn_backward_reduce": "WANT_ACTIVATION" in case.variant}
    return "REDUCE" in case.variant or case.kernel == "flagged1x1" or not stores_matrix.get(case.kernel, True)


def show(case: Case, found: Resources) -> str:
    if found.failure:
        return f"{case.name:78s} {found.failure}"
    needs = f"{found.registers:3d} regs {found.shared / 1024:6.1f} KiB {found.ctas_per_sm:2d}/SM"
    code = f"{TENSOR_CORE[case.arch]} {found.mma:3d} LDG.128 {found.ldg128:3d} STG.128 {found.stg128:3d}"
    spilt = f" STACK {found.stack} SPILLS {found.spills}" if found.stack or found.spills else ""
    return f"{case.name:78s} {needs} {code} {found.seconds:4.1f} s{spilt}"


def main(names: Iterable[str]) -> int:
    sys.path.insert(0, str(ROOT))  # this tree, whatever is installed
    wanted = set(names)
    cases = [case for case in shipped() if not wanted or {case.kernel, f"sm_{case.arch}", case.dtype} >= wanted]
    bad = []

    def tell(case: Case, found: Resources) -> None:
        wrong = complaints(case, found)
        bad.extend(wrong[:1])
        print(show(case, found) + ("  <-- " + "; ".join(wrong) if wrong else ""), flush=True)

    results = measure(cases, min(2, os.cpu_count() or 1), tell)
    print(f"{len(cases)} configurations, {len(bad)} bad")
    if not wanted:
        rows = [row(case, found) for case, found in zip(cases, results) if not found.failure]
        with BUDGET.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda r: [int(v) if v.isdigit() else v for v in key(r)]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(_work() if sys.argv[1:] == ["--work"] else main(sys.argv[1:]))
