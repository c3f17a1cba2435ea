"""What nvcc makes of the CUDA kernels, read from its machine code: no spills, registers, 16-byte accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "triton"))

from resources import cuobjdump  # noqa: E402

CUDA = ROOT / "csrc" / "cuda"
INSTANCES = ROOT / "tests" / "cuda_instances.cu"
CASES = [
    ("sm_90a", False),
    *(pytest.param(arch, True, marks=pytest.mark.slow) for arch in ("sm_80", "sm_90a", "sm_100")),
]
# At 256 threads: four, three and two blocks of a multiprocessor, half of that for what is wide.
MOST_REGISTERS = {"elementwise": 64, "sums": 80, "pool": 128, "product": 160, "conv": 160}
_KERNEL = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


@dataclass(frozen=True)
class Compiled:
    name: str
    stack: int
    spilled: int
    registers: int
    code: str

    @property
    def most_registers(self) -> int:
        families = {"conv_kernel": "conv", "maxpool": "pool", "sums_of": "sums"}
        families |= {"covariance": "product", "coupling_kernel": "product", "": "elementwise"}
        family = next(name for part, name in families.items() if part in self.name)
        return MOST_REGISTERS[family] * (2 if self.is_wide else 1)

    @property
    def is_wide(self) -> bool:
        """Many elements of more than two bytes at a time, or with tails; float64."""
        floats = re.search(r"maxpool\w*<float, \(resnet_fused::cuda::Taking\)0>|sums_of_\w+<float", self.name)
        return "double" in self.name or self.is_ragged or floats is not None

    @property
    def is_ragged(self) -> bool:
        return "(resnet_fused::cuda::Taking)1" in self.name

    @property
    def is_scalar(self) -> bool:
        """One element a thread, or rows that begin anywhere."""
        narrow = re.search("finalise|fold_kernel|scale_shift|coefficients|covariance|coupling", self.name)
        return self.is_ragged or narrow is not None or "(resnet_fused::cuda::Taking)2" in self.name

    @property
    def reads_vectors(self) -> bool:
        return not self.is_scalar

    @property
    def writes_vectors(self) -> bool:
        return self.reads_vectors and not re.search("sums_of.*StatisticsPass|maxpool_backward_reduce", self.name)


def tool(name: str) -> str:
    found = cuobjdump() if name == "cuobjdump" and importlib.util.find_spec("triton") else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on the path")
    return found


def compiled(arch: str, all_dtypes: bool, folder: Path) -> Iterator[Compiled]:
    include = Path(torch.__file__).parent / "include"
    cubin = folder / "kernels.cubin"
    command = [tool("nvcc"), "-std=c++20", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-DALL_DTYPES"] if all_dtypes else []
    command += [f"-I{path}" for path in (CUDA, include, include / "torch" / "csrc" / "api" / "include")]
    done = subprocess.run([*command, str(INSTANCES), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sass = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    codes = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S))
    for mangled, stack, stores, loads, registers in _KERNEL.findall(done.stderr):
        name = subprocess.run([tool("c++filt"), mangled], capture_output=True, text=True, check=True).stdout
        yield Compiled(name.strip(), int(stack), int(stores) + int(loads), int(registers), codes[mangled])


@pytest.mark.parametrize("arch, all_dtypes", CASES)
def test_registers_spills_and_accesses(arch: str, all_dtypes: bool, tmp_path: Path) -> None:
    kernels = list(compiled(arch, all_dtypes, tmp_path))
    declared = sum(path.read_text(encoding="utf-8").count("__global__") for path in CUDA.rglob("*.cuh"))
    assert len({kernel.name.split("<")[0] for kernel in kernels}) == declared
    wrong = []
    for kernel in kernels:
        if kernel.stack or kernel.spilled:
            wrong.append(f"{kernel.name}: {kernel.stack} bytes of stack, {kernel.spilled} spilled")
        if kernel.registers > kernel.most_registers:
            wrong.append(f"{kernel.name}: {kernel.registers} registers, at most {kernel.most_registers} expected")
        if kernel.reads_vectors and not re.search(r"\bLDG\.E[.\w]*\.128\b", kernel.code):
            wrong.append(f"{kernel.name}: no 16-byte loads")
        if "conv_kernel" in kernel.name:
            missing = [
                each for each in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128") if each not in kernel.code
            ]
            wrong += [f"{kernel.name}: no {each}" for each in missing]
        if kernel.writes_vectors and not re.search(r"\bSTG\.E[.\w]*\.128\b", kernel.code):
            wrong.append(f"{kernel.name}: no 16-byte stores")
    assert not wrong, "\n".join(wrong)
