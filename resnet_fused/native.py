"""The compiled libraries: loading them, saying what became of them, and shapes of their operators for tracing.

``_cpu.so`` holds the operators of namespace ``resnet_fused`` (csrc/ops.cpp) and their processor kernels, ``_cuda.so`` their
CUDA kernels; ``_C`` tells how they were built. All are optional: without them the ``aten`` backend runs, and ``status`` and
``cuda_status`` say why.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
LIBRARIES = ("_cpu.so", "_cpu.dylib", "_cpu.dll")
FAILURE_NOTE = "_build_failure.txt"  # written by the build when there was no compiler, or it failed

CAPABILITY_VARIABLE = "RESNET_FUSED_CPU_CAPABILITY"
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/cpu/isa.h
CUDA_LIBRARY = "_cuda.so"
OLDEST_GPU = (8, 0)  # compute capability that has the instructions of the GPU kernels

# None: not tried yet; "loaded"; otherwise the reason
_status: str | None = None
_cuda_status: str | None = None


def load() -> bool:
    """Load the library once; never raises. True when its operators can be called."""
    global _status
    if _status is None:
        _status = _load()
    return _status == "loaded"


def _load() -> str:
    library = next((path for name in LIBRARIES if (path := _HERE / name).exists()), None)
    if library is None:
        note = _HERE / FAILURE_NOTE
        if note.exists():
            return "the C++ build failed: " + note.read_text(encoding="utf-8").strip()
        return "not compiled: run 'pip install .' (or 'python setup.py build_ext --inplace') with a C++20 compiler"
    capability = os.environ.get(CAPABILITY_VARIABLE, "")
    if capability and capability not in CAPABILITIES:
        known = ", ".join(CAPABILITIES)
        warnings.warn(f"{CAPABILITY_VARIABLE}: expected one of {known}, got {capability!r}; ignored", stacklevel=2)
    try:
        torch.ops.load_library(str(library))
        _register_fakes()
    except Exception as error:  # whatever the dynamic loader or the registration raises, the package must still import
        return f"{library.name} could not be loaded: {error}"
    return "loaded"


def is_loaded() -> bool:
    """Whether the operators can be called."""
    return load()


def status() -> str:
    """``"loaded"``, or the reason why the library is not."""
    load()
    assert _status is not None
    return _status


def cuda_status() -> str:
    """``"loaded"``, or the reason why the CUDA kernels are not: they are only where PyTorch has CUDA and sees a GPU."""
    global _cuda_status
    if _cuda_status is None:
        _cuda_status = _load_cuda()
    return _cuda_status


def too_old() -> str:
    """Why the current GPU runs none of this package's kernels; "" where it does."""
    try:
        if torch.cuda.get_device_capability() >= OLDEST_GPU:
            return ""
    except Exception as error:  # of a driver that PyTorch sees but cannot use
        return f"PyTorch cannot use the GPU: {error}"
    return "it needs an NVIDIA GPU of compute capability {}.{} or higher".format(*OLDEST_GPU)


def _load_cuda() -> str:
    if not load():
        return f"the library that declares its operators is missing: {status()}"
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    library = _HERE / CUDA_LIBRARY
    if not library.exists():
        return "not compiled: run 'pip install .' where nvcc is on the PATH or CUDA_HOME names its toolkit"
    if reason := too_old():
        return reason
    device = torch.cuda.current_device()
    try:
        problem = ctypes.CDLL(str(library)).resnet_fused_cuda_problem
        problem.argtypes, problem.restype = [ctypes.c_int], ctypes.c_char_p
        reason = problem(device)
        if reason is not None:
            return f"{library.name} does not run on {torch.cuda.get_device_name(device)}: {reason.decode()}"
        torch.ops.load_library(str(library))
    except Exception as error:  # whatever the dynamic loader or the registration raises, the package must still import
        return f"{library.name} could not be loaded: {error}"
    return "loaded"


def build_info() -> dict[str, object]:
    """How the library was built: compiler, flags, instruction_sets compiled, detected and selected one, torch version.

    Empty when it was not built.
    """
    try:
        extension = importlib.import_module("._C", __package__)
    except ImportError:
        return {}
    return dict(extension.build_info())


def _bytes(like: Tensor, wanted: bool) -> Tensor:
    return like.new_empty((like.numel() + 7) // 8 if wanted else 0, dtype=torch.uint8)


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def _bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _bytes(x, save_mask)


def _bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    want_activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _channels(x), _channels(x), torch.empty_like(x) if want_activation else x.new_empty(0)


def _bn_act_backward(grad: Tensor, x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


def _add_relu(a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), _bytes(a, save_mask)


def _mask_grad(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, c, (h + 1) // 2, (w + 1) // 2), dtype=dtype, device=x.device, memory_format=layout)


def _bn_relu_maxpool(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _pooled(x, x.dtype), _pooled(x, torch.uint8)


def _bn_relu_maxpool_backward_reduce(grad: Tensor, index: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def _bn_relu_maxpool_backward(grad: Tensor, index: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(x)


def _strided(x: Tensor, stride: Sequence[int]) -> tuple[int, int, int]:
    n, _, h, w = x.shape
    return n, (h + stride[0] - 1) // stride[0], (w + stride[1] - 1) // stride[1]


def _pointwise(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    scale: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    stride2: Sequence[int],
    scale2: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    relu: bool,
    save_mask: bool,
    centre: Tensor | None = None,
    centre2: Tensor | None = None,
    weight2_low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n, h, w = _strided(x, stride)
    shape = (n, weight.shape[0], h, w)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out, _bytes(out, save_mask)


def _pointwise_wgrad(
    dy: Tensor, mask: Tensor | None, x: Tensor, centre: Tensor | None, stride: Sequence[int]
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if x.dtype.itemsize == 2 else torch.float64
    return x.new_empty((dy.shape[1], x.shape[1]), dtype=dtype), _channels(dy)


def _gram(x: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return x.new_empty(channels, dtype=torch.float64), x.new_empty((channels, channels), dtype=torch.float64)


def _nothing(*args: object) -> None:
    return None


_FAKES = {
    "bn_stats": _bn_stats,
    "bn_act": _bn_act,
    "bn_act_": _nothing,
    "bn_act_backward_reduce": _bn_act_backward_reduce,
    "bn_act_backward": _bn_act_backward,
    "bn_act_backward_": _nothing,
    "add_relu": _add_relu,
    "mask_grad": _mask_grad,
    "mask_grad_add_": _nothing,
    "bn_relu_maxpool": _bn_relu_maxpool,
    "bn_relu_maxpool_backward_reduce": _bn_relu_maxpool_backward_reduce,
    "bn_relu_maxpool_backward": _bn_relu_maxpool_backward,
    "pointwise": _pointwise,
    "pointwise_add_": _nothing,
    "pointwise_wgrad": _pointwise_wgrad,
    "gram": _gram,
    "update_running_": _nothing,
}


def _register_fakes() -> None:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"resnet_fused::{name}", fake)


load()
