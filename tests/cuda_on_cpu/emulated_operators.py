"""The ``cuda`` backend without a GPU: its launchers and kernels compiled for a processor, as operators of tensors there."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from emulated import CUDA, HERE, compiler

from resnet_fused import backends
from resnet_fused.backends.cuda import CudaConvolutionKernels, CudaKernels

NAMESPACE = "resnet_fused_emulated"
FLAGS = [
    *("-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-Wno-clobbered", "-x", "c++", "-include", str(HERE / "emulation.h"), f"-I{CUDA}"),
    *(f"-DRESNET_FUSED_NAMESPACE={NAMESPACE}", "-DRESNET_FUSED_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
]


def build_operators(folder: Path) -> Path:
    """A library with every launcher of csrc/cuda, and the schemas under a name of their own."""
    root = Path(torch.__file__).parent
    include = [
        f"-isystem{path}" for path in (root / "include", root / "include" / "torch" / "csrc" / "api" / "include")
    ]
    launchers = [path for path in sorted(CUDA.glob("*.cu")) if path.stem != "support"]  # of the device itself
    library = folder / "operators.so"

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        subprocess.run([compiler(), *FLAGS, *include, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [*launchers, CUDA.parent / "arguments.cpp", CUDA.parent / "ops.cpp"]))
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler(), "-shared", *objects, *libraries, "-o", str(library)], check=True)
    return library


class EmulatedCuda(CudaKernels):
    """Registered under a name of its own, so that blocks and networks run on it."""

    name = "cuda_emulated"

    def __init__(self) -> None:
        self.ops: Any = getattr(torch.ops, NAMESPACE)


class EmulatedConvolutions(EmulatedCuda, CudaConvolutionKernels):
    """As where Triton is missing."""

    name = "cuda_emulated_without_triton"


WITH_TRITON = "cuda_emulated_with_triton"


def load(library: Path) -> None:
    """Registers the backends; that with Triton's products where Triton's interpreter runs."""
    torch.ops.load_library(str(library))
    made: list[EmulatedCuda] = [EmulatedCuda(), EmulatedConvolutions()]
    if "triton" in backends.available_backends():
        from resnet_fused.backends.triton.dispatch import TritonKernels

        class EmulatedWithTriton(EmulatedCuda, TritonKernels):
            name = WITH_TRITON

            def __init__(self) -> None:
                EmulatedCuda.__init__(self)
                TritonKernels.__init__(self, own_conv3x3=False)

        made.append(EmulatedWithTriton())
    for backend in made:
        backends._KERNELS[backend.name] = backend
