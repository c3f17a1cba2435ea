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

from . import backends, native, routes, tables
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


def provenance(*packages: str) -> dict[str, str]:
    """The columns "versions", of this package, PyTorch and ``packages``, and "commit" of a measured row."""
    found = versions()
    return {
        "versions": "; ".join(f"{name} {found[name]}" for name in ("resnet_fused", "torch", *packages)),
        "commit": found["commit"],
    }


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


def chosen(device: torch.device) -> str:
    """What runs tensors on ``device``, in words."""
    if routes.applies(device):
        return "as measured, else stock modules"
    return backends.choose(device)


def _tables() -> dict[str, str]:
    """The files of measured choices, and what is in them."""

    def counted(text: str) -> str:
        found = tables.parse(text)
        return f"{len(routes.parse(text))} routes, {len(found['entries'])} Triton configurations"

    return {str(path): tables.state(path, counted) for path in (tables.SHIPPED_TABLE, tables.user_table())}


def _measured(device: torch.device) -> str:
    """What the tables hold for a GPU, and what follows from it."""
    found = routes.of_device(device)
    chains = [entry.choice for key, entry in found.items() if key.startswith(routes.KINDS)]
    problems = [why for choice in chains if (why := routes.problem(choice))]
    told = f"{len(found)} routes"
    if problems:
        told += f", of which {len(problems)} cannot be taken ({problems[0]}),"
    if "triton" in backends.available_backends():
        from .backends.triton import devices, tuning

        told += f" and {len(tuning.of_device(devices.describe(device)))} Triton configurations"
    told += " for this GPU; "
    if not routes.applies(device):
        return told + f"routes are not asked: the backend is {backends.current()!r}"
    others = "everything else" if len(found) > len(problems) else "everything"
    return f"{told}{others} runs as stock PyTorch modules (resnet-fused tune measures)"


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
        "chosen": {kind: chosen(torch.device(kind)) for kind in ["cpu", *(["cuda"] if gpus else [])]},
        "tables": _tables(),
        "measured": {name: _measured(torch.device("cuda", i)) for i, name in enumerate(gpus)},
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
    measured = [*found["tables"].items(), *found["measured"].items()]
    if "cuda" in chosen:
        measured.append(("GPU tensors run", chosen["cuda"]))
    print_table("measured choices", ["", ""], measured)
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
