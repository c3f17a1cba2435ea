"""Which backend runs: the registry of backends, and the user's choice among them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import native
from ..compiling import constant
from . import recast, routed
from .aten import AtenKernels
from .cpu import CpuKernels
from .cuda import CudaConvolutionKernels, CudaKernels, cuda_kernels
from .empty import EmptyKernels
from .kernels import Kernels
from .operands import Conv, acc_dtype

__all__ = [
    "Conv",
    "Kernels",
    "acc_dtype",
    "available_backends",
    "backend",
    "choose",
    "get",
    "providers",
    "set_backend",
    "unavailable_backends",
]

ENVIRONMENT_VARIABLE = "RESNET_FUSED_BACKEND"

_EMPTY = EmptyKernels()
_KERNELS: dict[str, Kernels] = {"aten": AtenKernels()}
_REASONS: dict[str, str] = {}
if native.is_loaded():
    _KERNELS["cpu"] = CpuKernels()
else:
    _REASONS["cpu"] = native.status()


def load_triton() -> Kernels | str:
    """The backend, or why it cannot run here."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or torch.cuda.is_available()):
        return "PyTorch sees no GPU; TRITON_INTERPRET=1 runs its kernels on the processor, slowly"
    if not interpreted and (reason := native.too_old()):
        return reason
    try:
        from .triton.dispatch import TritonKernels
    except Exception as error:  # whatever a broken Triton raises, the package must still import
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    # cuDNN's 3×3 until a GPU has measured ours.
    return TritonKernels(own_conv3x3=interpreted)


@functools.cache
def _probe() -> None:
    """Look for the GPU backends. Not at the import: it starts CUDA in this process, which may still fork, or choose its GPU."""
    triton = load_triton()
    if isinstance(triton, str):
        _REASONS["triton"] = triton
    else:
        _KERNELS["triton"] = triton
    if native.cuda_status() == "loaded":
        _KERNELS["cuda"] = cuda_kernels()
    else:
        _REASONS["cuda"] = native.cuda_status()


def available_backends() -> list[str]:
    """Names of the backends that can run here, in the order in which ``auto`` prefers them on their device.

    On a machine with a GPU the first call starts CUDA in this process, as the first fused call on a GPU's tensor does.
    """
    _probe()
    return sorted(_KERNELS, key=lambda name: name == "aten")


def unavailable_backends() -> dict[str, str]:
    """The other backends, each with the reason why it cannot run here."""
    _probe()
    return dict(_REASONS)


def _validated(name: str, source: str) -> str:
    if name == "auto" or name in _KERNELS:
        return name
    _probe()
    if name in _KERNELS:
        return name
    if name in _REASONS:
        raise RuntimeError(f"{source}: backend {name!r} is not available: {_REASONS[name]}")
    known = ", ".join(["auto", *_KERNELS, *_REASONS])
    raise ValueError(f"{source}: expected one of {known}, got {name!r}")


_current: str | None = None  # until set_backend: what the environment says


def current() -> str:
    """The user's choice: of ``set_backend``, or of the environment variable, or "auto".

    Raises:
        ValueError, RuntimeError: the environment variable names no backend, or one that cannot run here.
    """
    return _current or _of_environment()


@constant
def _of_environment() -> str:
    return _validated(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def set_backend(name: str) -> None:
    """Use backend ``name`` ("auto", "aten", "cpu", "triton" or "cuda") from now on, in every thread.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend exists but cannot run here; says why.
    """
    global _current
    _current = _validated(name, "set_backend")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``set_backend(name)`` for the duration of a ``with`` block; a backward runs on the backend of its forward."""
    previous = current()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@functools.cache
def providers() -> dict[str, Kernels]:
    """What a convolution of a GPU can run on here, by the names that routes have for it (``routed``).

    ``cudnn``: PyTorch's convolutions, with the passes over memory of the extension or, without it, of Triton. ``triton``: its
    1×1 and 3×3. ``cuda``: the extension's. ``cublas`` and ``space_to_depth``: ``cudnn`` with 1×1 convolutions as products of
    matrices, and with the stem's 7×7 as a 4×4.
    """
    _probe()
    has_triton, has_extension = "triton" in _KERNELS, "cuda" in _KERNELS
    found: dict[str, Kernels] = {}
    if has_extension:
        found |= {routed.CUDNN: CudaKernels(), routed.EXTENSION: CudaConvolutionKernels()}
    if has_triton:
        from .triton.dispatch import TritonKernels, TritonPasses

        found.setdefault(routed.CUDNN, TritonPasses())
        found[routed.TRITON] = cuda_kernels(own_conv3x3=True) if has_extension else TritonKernels(own_conv3x3=True)
    base = type(found.setdefault(routed.CUDNN, AtenKernels()))
    recasts = {routed.CUBLAS: recast.MatrixProducts, routed.SPACE_TO_DEPTH: recast.SpaceToDepth}
    return found | {name: type(f"{cls.__name__}Kernels", (cls, base), {})() for name, cls in recasts.items()}


@functools.lru_cache(maxsize=1024)
def _routed(name: str) -> Kernels:
    return routed.RoutedKernels(routed.parse(name), providers())


def get(name: str) -> Kernels:
    """The kernels of an available backend, or of the routes in ``name``."""
    if name == _EMPTY.name:
        return _EMPTY
    if name not in _KERNELS:
        _probe()
    found = _KERNELS.get(name)
    return _routed(name) if found is None else found


def for_running_statistics(name: str) -> Kernels:
    """Whose ``update_running`` belongs to backend ``name``: a call outside of the operators, into which torch.compile looks, and
    where it would take the making of routes for a part of the model."""
    found = _EMPTY if name == _EMPTY.name else _KERNELS.get(name)
    return _KERNELS.get("cuda", _KERNELS["aten"]) if found is None else found


def choose(device: torch.device, empty: bool = False) -> str:
    """The backend for tensors on ``device`` that no route names: the user's choice, or under ``auto`` a safe one."""
    if empty:
        return _EMPTY.name
    wish = current()
    if wish == "auto":
        return "cpu" if device.type == "cpu" and "cpu" in _KERNELS else "aten"
    if wish in ("cpu", "cuda") and device.type != wish:
        return "aten"
    return wish
