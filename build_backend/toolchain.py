"""What the build finds on the machine (PyTorch, compiler, CUDA toolkit), and what the environment asks for."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TORCH_MINIMUM = (2, 10)


class BuildError(RuntimeError):
    """The compiled part cannot be built; the package is then installed without it."""


class ConfigurationError(RuntimeError):
    """The user asked for something that cannot be had; the installation fails."""


@dataclass(frozen=True)
class Torch:
    """An installed PyTorch, as files."""

    root: Path
    version: str

    @property
    def include(self) -> list[Path]:
        include = self.root / "include"
        return [include, include / "torch" / "csrc" / "api" / "include"]


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit."""

    nvcc: Path
    version: str
    architectures: frozenset[str] = frozenset()  # that nvcc compiles for, such as "90"; empty: unknown


def truthy(value: str | None) -> bool:
    return (value or "").strip().lower() in {"1", "on", "yes", "true"}


def torch_at(root: Path) -> Torch | None:
    """The PyTorch in directory ``root``, if its headers and libraries are there."""
    version = root / "version.py"
    if not version.is_file() or not (root / "include").is_dir() or not (root / "lib").is_dir():
        return None
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", version.read_text(encoding="utf-8"), re.MULTILINE)
    return Torch(root, found.group(1)) if found else None


def find_torch() -> Torch | None:
    """The PyTorch to build against, without importing it: what ``import`` would find, else the environment's own."""
    candidates: list[Path] = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent)
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    candidates += [Path(folder) / "torch" for folder in folders]
    return next((torch for candidate in candidates if (torch := torch_at(candidate))), None)


def require_torch(torch: Torch | None) -> Torch:
    if torch is None:
        raise BuildError("no PyTorch was found in this environment")
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2])
    if numbers < TORCH_MINIMUM:
        raise BuildError(f"PyTorch {torch.version} is too old: the kernels need 2.10 or later")
    return torch


def find_compiler(environment: Mapping[str, str]) -> list[str]:
    """The C++ compiler as the first words of a command."""
    if environment.get("CXX"):
        words = environment["CXX"].split()
        if shutil.which(words[-1]) or shutil.which(words[0]):
            return words
        raise BuildError(f"the compiler that CXX names, {environment['CXX']!r}, was not found")
    if os.name == "nt":
        raise BuildError("the kernels need GCC or Clang, which this build does not look for on Windows")
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (c++, g++ or clang++; CXX names another one)")


def find_toolkit(environment: Mapping[str, str]) -> Toolkit | None:
    """The CUDA toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH; no GPU is needed."""
    nvcc: str | None = None
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            nvcc = shutil.which("nvcc", path=str(Path(environment[variable]) / "bin"))
            break
    else:
        nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if nvcc is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    if not found:
        return None
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False, timeout=60).stdout
    return Toolkit(Path(nvcc), found.group(1), frozenset(re.findall(r"compute_(\d+)", listed)))


_NAMED = {"ampere": "8.0;8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX", "blackwell": "10.0;12.0+PTX"}
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def gencode(environment: Mapping[str, str], toolkit: Toolkit | None) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST; without it for every supported architecture that the toolkit knows, and PTX of
    the last one for those to come."""
    known = [
        entry
        for entry in DEFAULT_ARCHITECTURES
        if toolkit is None or not toolkit.architectures or entry.replace(".", "") in toolkit.architectures
    ]
    return parse_architectures(environment.get("TORCH_CUDA_ARCH_LIST") or ";".join(known) + "+PTX")


def parse_architectures(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX", spaces or semicolons, or names such as Hopper) as nvcc's -gencode options.

    Raises:
        ConfigurationError: an entry is no architecture.
    """
    words = re.split(r"[;\s]+", text.strip())
    entries = [entry for word in words for entry in _NAMED.get(word.lower(), word).split(";") if entry]
    options: list[str] = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry, re.IGNORECASE)
        if not found:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 10.0+PTX, or one of"
                f" {', '.join(name.title() for name in _NAMED)}; got {entry!r}"
            )
        number = found.group(1) + found.group(2) + found.group(3).lower()
        kinds = [f"arch=compute_{number},code=sm_{number}"]
        if found.group(4):
            kinds.append(f"arch=compute_{number},code=compute_{number}")
        options += [option for kind in kinds if (option := f"-gencode={kind}") not in options]
    return options


def choose_cuda(environment: Mapping[str, str], toolkit: Toolkit | None, sources: list[Path]) -> tuple[bool, str]:
    """Whether to compile the CUDA library, and one line that says what was found.

    Raises:
        ConfigurationError: FORCE_CUDA=1 without a toolkit, or a TORCH_CUDA_ARCH_LIST that cannot be read.
    """
    architectures = gencode(environment, toolkit)
    if toolkit is None:
        if truthy(environment.get("FORCE_CUDA")):
            raise ConfigurationError(
                "FORCE_CUDA=1, but no CUDA toolkit was found: put nvcc on PATH or name its folder in CUDA_HOME,"
                " or unset FORCE_CUDA to build for the processor only"
            )
        return False, "CUDA: no toolkit found (no nvcc on PATH, no CUDA_HOME); building for the processor only"
    found = f"CUDA: toolkit {toolkit.version} found"
    if not sources:
        return False, f"{found}; this version has no CUDA sources, building for the processor only"
    return True, f"{found}; compiling {len(sources)} files for {', '.join(a.rpartition('=')[2] for a in architectures)}"


def leave_out(library: str, error: BuildError, environment: Mapping[str, str]) -> None:
    """A library that could not be built is left out, but not the CUDA library with FORCE_CUDA=1.

    Raises:
        ConfigurationError: that was asked for.
    """
    if library == "_cuda" and truthy(environment.get("FORCE_CUDA")):
        raise ConfigurationError(f"FORCE_CUDA=1, but the CUDA library cannot be built: {error}") from error


def is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def jobs(environment: Mapping[str, str]) -> int:
    """How many compilers run at a time: MAX_JOBS, else one per processor."""
    text = environment.get("MAX_JOBS", "").strip()
    if not text:
        return os.cpu_count() or 1
    if not text.isdigit() or int(text) == 0:
        raise ConfigurationError(f"MAX_JOBS: expected a positive number, got {text!r}")
    return int(text)
