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
# At 256 threads, blocks of a multiprocessor: 64 registers leave four, 80 three, 128 two; half of them for what is wide.
MOST_REGISTERS = {"steady_act": 80, "steady_backward": 128, "statistics": 64, "gradients": 128, "elementwise": 64}
MOST_REGISTERS |= {"pool": 128, "product": 160, "conv": 160}
FAMILIES = {
    "conv_kernel": "conv",
    "maxpool": "pool",
    "covariance|coupling_kernel": "product",
    r"sums_of.*StatisticsPass": "statistics",
    r"sums_of.*GradientPass": "gradients",
    r"bn_act_kernel<.*, true>\(": "steady_act",
    r"bn_backward_kernel<.*, true>\(": "steady_backward",
    "": "elementwise",
}
# Kernels of which every thread has 64 bytes of so many tensors under way at once, whatever the dtype.
SEVERAL = {
    r"bn_act_kernel<.*, true>\(": 2,
    r"bn_backward_kernel<.*, true>\(": 2,
    "add_relu_kernel": 2,
    r"mask_grad_kernel<.*, true>\(": 2,
    r"mask_grad_kernel<.*, false>\(": 1,
    r"sums_of.*StatisticsPass.*, true>\(": 1,
    r"sums_of.*GradientPass.*, true>\(": 2,
}
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
        family = next(family for part, family in FAMILIES.items() if re.search(part, self.name))
        return MOST_REGISTERS[family] * (2 if self.is_wide else 1)

    @property
    def is_wide(self) -> bool:
        """Many elements of more than two bytes at a time, or with tails; float64."""
        floats = re.search(r"maxpool\w*<float, \(resnet_fused::cuda::Taking\)0>", self.name)
        return "double" in self.name or self.is_ragged or floats is not None

    @property
    def is_ragged(self) -> bool:
        return "(resnet_fused::cuda::Taking)1" in self.name

    @property
    def is_scalar(self) -> bool:
        """One element a thread, or rows that begin anywhere."""
        narrow = re.search(
            "finalise|join_moments|fold_kernel|scale_shift|coefficients|update_running|covariance|coupling", self.name
        )
        general = re.search(r"sums_of.*, false>\(", self.name)
        one = self.is_ragged or "(resnet_fused::cuda::Taking)2" in self.name
        return one or narrow is not None or general is not None

    @property
    def reads_vectors(self) -> bool:
        return not self.is_scalar

    @property
    def writes_vectors(self) -> bool:
        return self.reads_vectors and not re.search("sums_of.*StatisticsPass|maxpool_backward_reduce", self.name)


def loads_at_once(code: str) -> int:
    """16-byte loads between two stores, or from a store to the end, of which there are most: they do not wait for a store, nor
    for one another."""
    parts = re.split(r"\bSTG\.|\bBAR\.", code)
    return max(len(re.findall(r"\bLDG\.E[.\w]*\.128\b", part)) for part in parts)


def loop_of_batches(code: str) -> str:
    """The loop with the most 16-byte loads."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)
    loops = [""]
    for at, text in lines:
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < int(at, 16):
            loops.append("\n".join(t for i, t in lines if int(back[1], 16) <= int(i, 16) <= int(at, 16)))
    return max(loops, key=lambda loop: len(re.findall(r"\bLDG\.E[.\w]*\.128\b", loop)))


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
        tensors = next((tensors for part, tensors in SEVERAL.items() if re.search(part, kernel.name)), 0)
        if tensors:
            loop = loop_of_batches(kernel.code)
            if loads_at_once(loop) < 4 * tensors:
                wrong.append(f"{kernel.name}: {loads_at_once(loop)} loads at once, at least {4 * tensors} expected")
            if re.search(r"\bLDG\.E(\.64)? ", loop):
                wrong.append(f"{kernel.name}: reads vectors in its loop")
        if "conv_kernel" in kernel.name:
            missing = [
                each for each in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128") if each not in kernel.code
            ]
            wrong += [f"{kernel.name}: no {each}" for each in missing]
        if kernel.writes_vectors and not re.search(r"\bSTG\.E[.\w]*\.128\b", kernel.code):
            wrong.append(f"{kernel.name}: no 16-byte stores")
    assert not wrong, "\n".join(wrong)
