"""The steps of ``gpu.py``: which commands, in which order, where what is wanted most comes first."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_fused import backends, routes, tables
from resnet_fused.backends.cuda import CudaKernels

HERE = Path(__file__).parent
CORRECTNESS, KERNELS, UNITS, TRAIN, INFER = PARTS = ("correctness", "kernels", "units", "train", "infer")
MODELS = ("resnet50", "resnet101", "resnet18")
DTYPES = ("bf16", "fp16")
FIRST_PROVIDERS = ("stock", "stock+graph", "compile", "fused", "fused+graph")
SLOW_PROVIDERS = ("stock", "fused", "compile-max", "timm+compile")  # whose compiler takes minutes
LIBRARY = "resnet_fused"  # as a script: its command line
# Files under the results folder.
NETWORKS, UNITS_FILE, KERNELS_FILE = "networks_gpu.csv", "units_gpu.csv", "kernels_gpu.csv"
TUNE = "tune"
TUNE_SHARE = 0.25  # of all minutes, at most: what a tuning did not come to keeps what the cost model says


@dataclass(frozen=True)
class Step:
    """A command. ``backend``: what RESNET_FUSED_BACKEND says in it; ``share``: of all minutes, how long it may run."""

    part: str
    name: str
    script: str
    arguments: tuple[str, ...]
    backend: str = ""
    share: float = 1.0

    @property
    def command(self) -> str:
        """As one types it in the repository's root."""
        script = "resnet-fused" if self.script == LIBRARY else f"python benchmarks/{self.script}.py"
        variable = f"RESNET_FUSED_BACKEND={self.backend} " if self.backend else ""
        return f"{variable}{script} {shlex.join(self.arguments)}".rstrip()

    @property
    def key(self) -> str:
        """The command without its files and without ``--resume``: what is done once on a kind of device."""
        kept = [a for a in self.arguments if a != "--resume" and "/" not in a and "\\" not in a]
        return dataclasses.replace(self, arguments=tuple(kept)).command


@dataclass(frozen=True)
class Plan:
    """What is asked for. ``tiny``: the least that still goes through everything, where there is no GPU."""

    device: str
    folder: Path
    parts: Sequence[str] = PARTS
    models: Sequence[str] = MODELS
    dtypes: Sequence[str] = DTYPES
    batch: int = 256
    image_size: int = 224
    tune: bool = True
    resume: bool = True
    tiny: bool = False

    def file(self, name: str) -> list[str]:
        return ["--results-file", str(self.folder / name)]

    @property
    def sizes(self) -> list[str]:
        return ["--batch", str(self.batch), "--image-size", str(self.image_size)]

    @property
    def repeats(self) -> list[str]:
        return ["--repeats", "1"] if self.tiny else []

    @property
    def resuming(self) -> list[str]:
        return ["--resume"] if self.resume else []


def steps(plan: Plan, left_out: Callable[[str], None]) -> list[Step]:
    """All of them, in order; ``left_out`` is told what cannot be done here, and why."""
    found: list[Step] = []
    if CORRECTNESS in plan.parts:
        found += _correctness(plan, left_out)
    if KERNELS in plan.parts:
        found += _kernels(plan, left_out)
    if plan.tune and plan.tiny:
        left_out("tune: it measures on a GPU")
    if UNITS in plan.parts:
        found += _units(plan)
    found += _networks(plan, [mode for mode in (TRAIN, INFER) if mode in plan.parts])
    return list(dict.fromkeys(found))  # a tuning that two parts need


def extension(plan: Plan) -> str | None:
    """The backend of the CUDA extension's operators on the device: "cuda", or in a dry run an emulated one."""
    for name in backends.available_backends():
        if isinstance(backends.get(name), CudaKernels) and (name == "cuda") != plan.tiny:
            return name
    return None


def _has_triton(left_out: Callable[[str], None]) -> bool:
    reason = backends.unavailable_backends().get("triton")
    if reason is not None:
        left_out(f"Triton's kernels: {reason}")
    return reason is None


def _correctness(plan: Plan, left_out: Callable[[str], None]) -> Iterator[Step]:
    name = extension(plan)
    reason = backends.unavailable_backends().get("cuda", "a dry run has no GPU, and no emulation is loaded")
    if name is None:
        left_out(f"operators of the CUDA extension: {reason}")
    if (HERE / "check_gpu.py").exists():
        small = ["--small", "--only", "odd inputs", "--backend", "auto"] if plan.tiny else []
        yield Step(CORRECTNESS, "whole behaviours", "check_gpu", ("--device", plan.device, *small))
    models = [model for model in ("resnet18", "resnet50") if model in plan.models and not plan.tiny] or plan.models[:1]
    dtypes = ("fp32",) if plan.tiny else ("fp32", "bf16", "fp16")
    verify = ["verify", "--device", plan.device, "--model", *models, "--dtype", *dtypes]
    for backend in ("aten",) if plan.tiny else ("auto", *(b for b in ("cuda", "triton") if b not in _missing())):
        yield Step(CORRECTNESS, f"networks on {backend}", LIBRARY, tuple(verify), backend)
    if name is not None:
        small = ["--small", "--backend", name, "--dtype", "bf16", "--operator", "norm"] if plan.tiny else []
        yield Step(CORRECTNESS, "operators of the CUDA extension", "check_cuda", tuple(small))
    if _has_triton(left_out):
        for dtype in ("fp32",) if plan.tiny else ("bf16", "fp16", "fp32"):
            yield _triton(plan, CORRECTNESS, f"Triton kernels {dtype}", "--check", "--dtype", dtype)


def _missing() -> dict[str, str]:
    return backends.unavailable_backends()


def _triton(plan: Plan, part: str, name: str, *arguments: str) -> Step:
    sizes = plan.sizes if not plan.tiny else ["--family", "bn", "--mode", "infer", "--batch", "1", "--image-size", "32"]
    return Step(part, name, "bench_triton", ("--model", plan.models[0], *sizes, *arguments))


def _kernels(plan: Plan, left_out: Callable[[str], None]) -> Iterator[Step]:
    more = [*plan.repeats, *plan.resuming, *plan.file(KERNELS_FILE)]
    small = ["--mib", "1", "--size", "16"] if plan.tiny else []
    yield Step(KERNELS, "ceilings", "ceilings", ("--device", plan.device, *small, *more))
    name = extension(plan)
    if name is None:
        left_out("times of the CUDA extension's kernels: as for its operators")
    else:
        sizes = ["--batch", "1", "--image-size", "16", "--width", "8", "--backend", name] if plan.tiny else plan.sizes
        for family in ("fold",) if plan.tiny else ("passes", "pool", "conv", "algebra", "fold"):
            yield Step(KERNELS, f"CUDA kernels, {family}", "bench_cuda", ("--family", family, *sizes, *more))
    if plan.tiny:
        left_out("times of Triton's kernels: they are taken by events of a GPU")
    elif _has_triton(lambda reason: None):
        for family in ("gemm", "bn", "conv3x3"):
            yield _triton(plan, KERNELS, f"Triton kernels, {family}", "--family", family, *more)


def _has_own_blocks(plan: Plan, model: str) -> bool:
    """ResNet-101's have the shapes of ResNet-50's."""
    return model != "resnet101" or "resnet50" not in plan.models


def _tuning(plan: Plan, model: str, mode: str, dtype: str) -> Iterator[Step]:
    """What "auto" takes in blocks and networks, before they are measured."""
    if plan.tune and not plan.tiny and "triton" not in _missing() and _has_own_blocks(plan, model):
        part = next(part for part in (UNITS, TRAIN, INFER) if part in plan.parts)
        arguments = ("tune", "--model", model, "--dtype", dtype, "--mode", mode, "--configs", "8", *plan.sizes)
        yield Step(part, f"{TUNE} {model} {mode} {dtype}", LIBRARY, arguments, share=TUNE_SHARE)


def is_tuned(device: torch.device) -> bool:
    """Whether the user's table has routes for a GPU."""
    key = routes.key_of("", "", (), torch.float32, device).split()[-3:]
    return any(entry.split()[-3:] == key for entry in routes.read(tables.user_table()))


def _units(plan: Plan) -> Iterator[Step]:
    more = ["--device", plan.device, *plan.sizes, *plan.repeats, *plan.resuming, *plan.file(UNITS_FILE)]
    dtype = plan.dtypes[0]
    for model in plan.models:
        for mode in (TRAIN, INFER) if _has_own_blocks(plan, model) else ():
            yield from _tuning(plan, model, mode, dtype)
            arguments = ("--network", model, "--mode", mode, "--dtype", dtype, *more)
            yield Step(UNITS, f"blocks of {model}, {mode} {dtype}", "bench_units", arguments)


def _networks(plan: Plan, modes: Sequence[str]) -> Iterator[Step]:
    def timed(name: str, providers: Sequence[str], dtype: str, model: str, mode: str) -> Step:
        more = ["--device", plan.device, "--noise", "--no-memory", "--fused-times", "3", *plan.repeats]
        case = ["bench", "--model", model, "--mode", mode, "--dtype", dtype, *plan.sizes, "--providers", *providers]
        return Step(mode, f"{model} {mode} {dtype}{name}", LIBRARY, (*case, *more, *plan.file(NETWORKS)))

    for dtype in plan.dtypes:
        cases = [(dtype, model, mode) for model in plan.models for mode in modes]
        for case in cases:
            yield from _tuning(plan, case[1], case[2], dtype)
            yield timed("", FIRST_PROVIDERS, *case)
        for _, model, mode in cases:
            arguments = ["--model", model, "--mode", mode, "--dtype", dtype, *plan.sizes, "--device", plan.device]
            weighed = ("stock", "fused+graph") if plan.tiny else FIRST_PROVIDERS
            arguments += ["--providers", *weighed, *plan.file(NETWORKS)]
            yield Step(mode, f"{model} {mode} {dtype}, memory", "gpu_memory", tuple(arguments))
    for dtype in plan.dtypes:
        for model in plan.models:
            for mode in modes:
                yield timed(", slow compilers", SLOW_PROVIDERS, dtype, model, mode)
