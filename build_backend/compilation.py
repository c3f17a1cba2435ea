"""The commands that make the compiled libraries, and running them in parallel (ninja, else a pool of threads)."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from toolchain import BuildError, Toolkit, Torch, gencode, is_x86, truthy

TARGET_VERSION = "0x020a000000000000"  # PyTorch's stable ABI as of 2.10

# One rounding per operation and explicit fused multiply-adds: forward and backward must find the same bits.
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *(*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "-mprefer-vector-width=512",
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns about its own intrinsics
]
INSTRUCTION_SETS = {
    "kernels_avx2": AVX2,
    "kernels_avx512": AVX512,
    "kernels_avx512bf16": [*AVX512, "-mavx512bf16"],
}


@dataclass
class Step:
    """One compiler call."""

    command: list[str]
    inputs: list[Path]
    output: Path
    depfile: Path | None = None


@dataclass
class Library:
    """A shared library: objects, then one link."""

    objects: list[Step] = field(default_factory=list)
    link: Step | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that the commands depend on."""

    root: Path
    temp: Path
    compiler: list[str]
    torch: Torch
    toolkit: Toolkit | None
    environment: Mapping[str, str]

    @property
    def optimisation(self) -> list[str]:
        return ["-O0", "-g"] if truthy(self.environment.get("DEBUG")) else ["-O2", "-DNDEBUG"]

    @property
    def extra(self) -> list[str]:
        return shlex.split(self.environment.get("CXXFLAGS", ""))


def _includes(folders: list[Path]) -> list[str]:
    return [word for folder in folders for word in ("-isystem", str(folder))]


def _object(settings: Settings, source: Path, flags: list[str]) -> Step:
    output = settings.temp / (source.relative_to(settings.root).as_posix().replace("/", "_") + ".o")
    depfile = output.with_suffix(".d")
    command = [
        *settings.compiler,
        *settings.optimisation,
        *COMMON_FLAGS,
        *flags,
        *settings.extra,
        *("-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)),
    ]
    return Step(command, [source], output, depfile)


def _link(settings: Settings, objects: list[Step], output: Path, libraries: list[str]) -> Step:
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        shared = ["-shared", *([] if truthy(settings.environment.get("DEBUG")) else ["-Wl,-s"])]
    inputs = [step.output for step in objects]
    folder = ["-L" + str(settings.torch.root / "lib")] if libraries else []
    command = [*settings.compiler, *shared, *map(str, inputs), "-o", str(output), *folder, *libraries]
    return Step(command, inputs, output)


def x86_flags() -> list[str]:
    return ["-DRESNET_FUSED_X86"] if is_x86() else []


def _slowest_first(source: Path) -> tuple[bool, str]:
    return not source.stem.startswith("kernels_"), source.stem


def cpu_library(settings: Settings, output: Path) -> Library:
    """The operators and their processor kernels; each instruction set is a file with its own flags."""
    csrc = settings.root / "csrc"
    flags = ["-DTORCH_TARGET_VERSION=" + TARGET_VERSION, *x86_flags(), *_includes(settings.torch.include)]
    library = Library()
    # The kernels take the longest: they go first.
    for source in [*sorted((csrc / "cpu").glob("*.cpp"), key=_slowest_first), csrc / "arguments.cpp", csrc / "ops.cpp"]:
        if source.stem in INSTRUCTION_SETS and not is_x86():
            continue
        library.objects.append(_object(settings, source, [*flags, *INSTRUCTION_SETS.get(source.stem, [])]))
    library.link = _link(settings, library.objects, output, ["-ltorch_cpu", "-lc10"])
    return library


def bindings(settings: Settings, output: Path) -> Library:
    """resnet_fused._C, with the pybind11 that PyTorch ships."""
    if not (settings.torch.include[0] / "pybind11" / "pybind11.h").is_file():
        raise BuildError("pybind11's headers are not among PyTorch's")
    shown = [*settings.optimisation, *COMMON_FLAGS, *settings.extra]
    strings = {
        "FLAGS": shlex.join(shown),
        "TORCH": settings.torch.version,
        "CUDA": settings.toolkit.version if settings.toolkit else "",
    }
    flags = [f'-DRESNET_FUSED_{name}="{value}"' for name, value in strings.items()]
    python = [Path(p) for p in dict.fromkeys((sysconfig.get_path("include"), sysconfig.get_path("platinclude")))]
    flags += [*x86_flags(), *_includes([settings.torch.include[0], *python])]
    library = Library([_object(settings, settings.root / "csrc" / "bindings.cpp", flags)])
    library.link = _link(settings, library.objects, output, [])
    return library


def cuda_library(settings: Settings, output: Path, sources: list[Path]) -> Library:
    """The CUDA kernels, on the stable ABI: nvcc and PyTorch's headers suffice, whatever build of PyTorch it is."""
    assert settings.toolkit is not None
    debug = truthy(settings.environment.get("DEBUG"))
    flags = [
        *(["-O0", "-g", "-G"] if debug else ["-O3", "-DNDEBUG"]),
        *("-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DTORCH_TARGET_VERSION=" + TARGET_VERSION),
        "-DRESNET_FUSED_ON_CUDA",
        *gencode(settings.environment, settings.toolkit),
        *_includes(settings.torch.include),
    ]
    nvcc = str(settings.toolkit.nvcc)
    library = Library()
    # The convolutions take the longest: they go first.
    for source in sorted([*sources, settings.root / "csrc" / "arguments.cpp"], key=lambda path: path.stem != "conv"):
        target = settings.temp / (source.relative_to(settings.root).as_posix().replace("/", "_") + ".cuda.o")
        depfile = target.with_suffix(".d")
        command = [nvcc, *flags, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
        library.objects.append(Step(command, [source], target, depfile))
    inputs = [step.output for step in library.objects]
    # The CUDA run-time library is inside; PyTorch's own CUDA library is looked up when a kernel is first launched.
    link = [nvcc, "-shared", "-cudart", "static", *map(str, inputs), "-o", str(output)]
    link += ["-L" + str(settings.torch.root / "lib"), "-ltorch_cpu", "-lc10", *([] if debug else ["-Xlinker", "-s"])]
    library.link = Step(link, inputs, output)
    return library


def _failure(command: list[str], output: str) -> BuildError:
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-3:]
    return BuildError(f"{command[0]} failed: " + " | ".join(line.strip() for line in lines[:3])[:600])


def _run(step: Step) -> None:
    print(shlex.join(step.command), flush=True)
    try:
        done = subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{step.command[0]} could not be run: {error}") from error
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        raise _failure(step.command, done.stdout)


def ninja_file(steps: list[Step], folder: Path) -> str:
    """The steps as a ninja file, one rule for each; ninja keeps its records in ``folder``."""

    def escaped(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["ninja_required_version = 1.5", f"builddir = {escaped(folder)}"]
    for number, step in enumerate(steps):
        lines += [f"rule r{number}", "  command = " + shlex.join(step.command).replace("$", "$$")]
        lines.append(f"  description = {step.output.name}")
        if step.depfile:
            lines += ["  deps = gcc", "  depfile = " + escaped(step.depfile)]
        lines.append(f"build {escaped(step.output)}: r{number} " + " ".join(map(escaped, step.inputs)))
    return "\n".join([*lines, ""])


def find_ninja() -> str | None:
    """The ninja on PATH, or that of the Python package beside the interpreter (whose folder need not be on PATH)."""
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def run(library: Library, settings: Settings, jobs: int) -> None:
    """Make the library: with ninja, only what changed.

    Raises:
        BuildError: a compiler failed; names its first errors.
    """
    assert library.link is not None
    settings.temp.mkdir(parents=True, exist_ok=True)
    library.link.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, library.objects))
        _run(library.link)
        return
    file = settings.temp / (library.link.output.name + ".ninja")
    file.write_text(ninja_file([*library.objects, library.link], settings.temp), encoding="utf-8")
    command = [ninja, "-f", str(file), "-j", str(jobs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise _failure(library.link.command, done.stdout)
