"""``resnet-fused info``: what is installed, which backends run, and which settings are in force."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import backends, native
from .console import print_table
from .version import __version__

# (name, default, meaning): the one table of every environment variable that this package reads.
ENVIRONMENT = (
    ("RESNET_FUSED_BACKEND", "auto", "backend in use from the start: auto, aten, cpu, triton or cuda"),
    ("RESNET_FUSED_COVARIANCE", "auto", "where the covariance plan is used from the start: auto, always or never"),
    (
        "RESNET_FUSED_CPU_CAPABILITY",
        "the best there is",
        "lowers the kernels' instruction set: baseline, avx2 or avx512",
    ),
    ("RESNET_FUSED_TUNING_TABLE", "in the cache directory", "the user's table of measured configurations and routes"),
    ("MAX_JOBS", "one per core", "build: compilers run at once"),
    ("DEBUG", "0", "build: 1 compiles with -O0 -g and assertions"),
    ("FORCE_CUDA", "0", "build: 1 makes a missing CUDA toolkit an error"),
    ("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0+PTX", "build: GPU architectures"),
)
PACKAGES = ("torchvision", "timm", "numpy", "pillow", "rich", "safetensors", "triton")
INTERESTING_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def commit() -> str:
    """Short hash of the checkout that the package runs from, "-dirty" when changed; "" when it runs from none."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], check=False, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A site-packages folder inside somebody else's checkout is not this package's history.
    if git("ls-files", "--error-unmatch", "version.py") is None:
        return ""
    head = git("rev-parse", "--short", "HEAD") or ""
    return head + "-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else head


def versions() -> dict[str, str]:
    """Versions of what takes part; "not installed" for what does not."""
    found = {
        "resnet_fused": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Name of a torch device, as written into benchmark rows."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain values."""
    cpuinfo = _cpuinfo()
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "backends": dict.fromkeys(backends.available_backends(), "available") | backends.unavailable_backends(),
        "chosen": {kind: backends.choose(torch.device(kind)) for kind in ["cpu", *(["cuda"] if gpus else [])]},
        "device": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "GPUs": gpus or "none visible",
            "instruction sets": [flag for flag in INTERESTING_FLAGS if flag in flags],
            "torch uses": torch.backends.cpu.get_cpu_capability(),
        },
        "library": {"status": native.status(), "CUDA kernels": native.cuda_status(), **native.build_info()},
        "environment": {
            name: {"default": default, "value": os.environ.get(name), "meaning": meaning}
            for name, default, meaning in ENVIRONMENT
        },
    }


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def run(as_json: bool = False) -> int:
    """Print it; always 0."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    print_table("versions", ["", ""], [*found["versions"].items(), ("platform", found["platform"])])
    chosen = found["chosen"]
    rows = []
    for name, state in found["backends"].items():
        used = [kind for kind, choice in chosen.items() if choice == name]
        rows.append((name, state + (f", in use on {', '.join(used)}" if used else "")))
    print_table("backends", ["", ""], rows)
    print_table("device", ["", ""], [(key, _text(value)) for key, value in found["device"].items()])
    print_table("compiled library", ["", ""], [(key, _text(value)) for key, value in found["library"].items()])
    print_table(
        "environment variables",
        ["name", "default", "current", "meaning"],
        [
            (name, entry["default"], "unset" if entry["value"] is None else entry["value"], entry["meaning"])
            for name, entry in found["environment"].items()
        ],
    )
    return 0
