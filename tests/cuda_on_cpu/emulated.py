"""The CUDA kernels compiled for a processor: building them, and calling them with tensors.

With ``EMULATED_SANITIZED`` in the environment, the name of a dtype, they are built for that one, with AddressSanitizer and
UndefinedBehaviorSanitizer, whose libraries must then be loaded before Python (``LD_PRELOAD``).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.backends.aten import layout_of, memory_order
from resnet_fused.backends.operands import acc_dtype

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
SANITIZED = os.environ.get("EMULATED_SANITIZED", "")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of kernels.cpp
LAYOUTS = (torch.channels_last, torch.contiguous_format)
EDGE = 64  # elements of a guard band


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(
    folder: Path,
    sources: dict[str, str] | None = None,
    main: Path = HERE / "kernels.cpp",
    only: torch.dtype | None = None,
    optimise: bool = True,
) -> Path:
    """A library of the kernels; ``sources``: text that replaces a file of csrc/cuda; ``only``: of one dtype."""
    include = Path(torch.__file__).parent / "include"
    folders = [HERE, CUDA, include, include / "torch" / "csrc" / "api" / "include"]
    if sources:
        copy = folder / hashlib.sha256(repr(sources).encode()).hexdigest()[:16]
        shutil.copytree(CUDA, copy, dirs_exist_ok=True)
        for name, text in sources.items():
            (copy / name).write_text(text, encoding="utf-8")
        folders[1] = folder = copy
    only = getattr(torch, SANITIZED) if SANITIZED else only
    library = folder / f"{main.stem}{'_asan' if SANITIZED else ''}.so"
    # What runs once takes longer to optimise than to run.
    command = [
        compiler(),
        "-std=c++20",
        "-O0" if only or sources or not optimise else "-O1",
        "-g1",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-Wno-unknown-pragmas", "-Wno-clobbered", *(SANITIZERS if SANITIZED else ())]
    command += [f"-DONLY_DTYPE={DTYPES.index(only)}"] if only else []
    command += [f"-I{path}" for path in folders]
    subprocess.run([*command, str(main), "-o", str(library)], check=True)
    return library


def built_once(folder: Path, build_in: Callable[[Path], Path]) -> Path:
    """What ``build_in(folder)`` makes, for all processes of a test run: one builds, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            done.write_text(str(build_in(folder)), encoding="utf-8")
    return Path(done.read_text(encoding="utf-8"))


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.") or "none"


class Shape(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), *((name, ctypes.c_int) for name in ("inner", "channels", "aligned"))]


class Run(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("general", ctypes.c_int),
        ("idle", ctypes.c_int),
    ]


class Banded:
    """Memory for a tensor between two guard bands, full of NaN (integers: 255), ``offset`` elements from where it is aligned."""

    def __init__(self, count: int, dtype: torch.dtype, offset: int = 0) -> None:
        self._fill = math.nan if dtype.is_floating_point else 255
        self._memory = torch.full((count + 2 * EDGE + offset,), self._fill, dtype=dtype)
        self._begin = EDGE + offset
        self.flat = self._memory[self._begin : self._begin + count]

    def holding(self, values: Tensor) -> Banded:
        self.flat.copy_(values)
        return self

    def check(self) -> Tensor:
        """The tensor; raises where something was written outside of it."""
        guards = torch.cat([self._memory[: self._begin], self._memory[self._begin + self.flat.numel() :]])
        untouched = guards.isnan() if guards.is_floating_point() else guards == 255
        assert untouched.all(), f"{int((~untouched).sum())} elements were written outside of the tensor"
        return self.flat


def image(dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype).contiguous(memory_format=layout)


def vector(dtype: torch.dtype, channels: int, low: float = -1.0) -> Tensor:
    """Per-channel values for activations of ``dtype``, within 2 above ``low``."""
    return (low + 2 * torch.rand(channels, dtype=torch.float64)).to(acc_dtype(dtype))


def banded(t: Tensor | None, offset: int = 0) -> Banded | None:
    if t is None:
        return None
    return Banded(t.numel(), t.dtype, offset).holding(memory_order(t) if t.dim() == 4 else t)


class Kernels:
    """Calls of a library. Tensors are ``Banded``; results too."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        converted = []
        for value in arguments:
            if value is None:
                converted.append(ctypes.c_void_p(None))
            elif isinstance(value, Banded):
                converted.append(ctypes.c_void_p(value.flat.data_ptr()))
            elif isinstance(value, float):
                converted.append(ctypes.c_double(value))
            else:
                converted.append(value)
        error = function(DTYPES.index(dtype), *converted)
        if error is not None:
            raise RuntimeError(error.decode())


def shape_of(x: Tensor, aligned: bool = True) -> Shape:
    _, c, h, w = x.shape
    return Shape(x.numel(), 1 if layout_of(x) == torch.channels_last else h * w, c, int(aligned))
