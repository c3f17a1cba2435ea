"""What the launchers of the convolutions share: checks of their arguments, grids, and how rows are split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import Below, Conv, Gradient, Operand, Pending, PendingGrad
from .devices import describe
from .operands import check_dense
from .tuning import Config

_PROGRAMS_PER_SM = 2
TF32_EPS = 2.0**-10  # as of ``torch.finfo``


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 2 stand in for it in the interpreter."""
    return describe(device).sms if device.type == "cuda" else 2


def check(name: str, x: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """``x``, of this shape, dense in channels_last, and of ``like``'s dtype: kernels see pointers only."""
    if tuple(x.shape) != tuple(shape) or x.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype} {tuple(shape)}, got {x.dtype} {tuple(x.shape)}")
    return check_dense(x)


def vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def matrix(name: str, w: Tensor, like: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(w.shape) != shape or w.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype} {shape}, got {w.dtype} {tuple(w.shape)}")
    return w.contiguous()


def rows_of(shape: Sequence[int]) -> int:
    """Rows of ``[N, C, H, W]`` as a matrix; kernels count them in 32 bits."""
    rows = shape[0] * shape[2] * shape[3]
    if rows >= 2**31:
        raise ValueError(f"expected fewer than 2**31 pixels, got {rows}")
    return rows


def product_precision(x: Tensor, exact: bool) -> str:
    """How float32 is multiplied: as in PyTorch's convolutions, whose setting ``torch.backends.cudnn.conv.fp32_precision`` counts.

    "ieee": exactly, without tensor cores; also the answer for other dtypes. "tf32": operands lose 13 bits. "tf32x3", in its
    place if ``exact``: operands in two parts and three products, for what meets statistics that were not computed from it.
    """
    on_gpu = x.is_meta or (x.is_cuda and describe(x.device).arch >= 80)
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if x.dtype != torch.float32 or not on_gpu or setting.fp32_precision != "tf32":
        return "ieee"
    return "tf32x3" if exact else "tf32"


def strided(conv: Conv) -> bool:
    return tuple(conv.stride) != (1, 1)


def output_shape(x: Tensor, channels: int, conv: Conv) -> tuple[int, ...]:
    if tuple(conv.padding) != (0, 0) or conv.groups != 1:
        raise ValueError(f"expected a 1×1 convolution without padding or groups, got {conv}")
    return conv.output_shape(x.shape, (channels, x.shape[1], 1, 1))


def operand(a: Operand) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """The tensor, scale, shift and whether a ReLU follows."""
    if isinstance(a, Pending):
        return check_dense(a.y), vector(a.scale), vector(a.shift), a.relu
    return check_dense(a), None, None, False


def shape_of(rows: int, c: int, k: int, conv: Conv, precision: str, **flags: bool) -> dict[str, int]:
    """What a configuration depends on; a precision is a flag too (``configs.precision_of``)."""
    asked = {"m": rows, "c": c, "k": k, "stride": max(conv.stride)} | {name: int(on) for name, on in flags.items()}
    return asked | ({} if precision == "ieee" else {precision: 1})


def described(t: Tensor | None, *tile: int) -> Tensor | TensorDescriptor | None:
    """A descriptor for such tiles of a contiguous tensor, or of the rows of images, where GPUs take one; else ``t``."""
    if t is None or t.is_meta or t.numel() == 0:
        return t
    width = t.shape[1 if t.dim() == 4 else -1]
    if t.is_cuda and describe(t.device).arch < 90 or (width * t.itemsize | t.data_ptr()) % 16:
        return t
    shape = [t.numel() // width, width] if t.dim() == 4 else list(t.shape)
    strides = [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]
    return TensorDescriptor(t, shape, strides, list(tile))


def tiles(rows: int, width: int, config: Config) -> tuple[int]:
    return (triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n),)


def split(rows: int, tiles: int, block_m: int, device: torch.device) -> tuple[int, int]:
    """Splits of the rows, none of them empty (but where there are no rows), and chunks in each (the last may have fewer)."""
    chunks = triton.cdiv(rows, block_m)
    splits = max(1, min(chunks, _PROGRAMS_PER_SM * multiprocessors(device) // tiles))
    each = max(1, triton.cdiv(chunks, splits))
    return max(1, triton.cdiv(chunks, each)), each


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of partial results for activations of ``dtype``: float32 has them in twice its precision."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def options(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def gradient(dy: Gradient) -> tuple[Tensor | None, ...]:
    """dz, mask, y, mean, a, b, c: all but the first None for a gradient that is at hand."""
    if not isinstance(dy, PendingGrad):
        return check_dense(dy), *(None,) * 6
    y = check("y", dy.y, dy.dz, dy.dz.shape)
    return check_dense(dy.dz), dy.mask, y, *map(vector, (dy.mean, dy.a, dy.b, dy.c))


def front(below: Below | None, like: Tensor, shape: Sequence[int]) -> tuple[Tensor | None, ...]:
    """y, mean, scale, shift of the batch norm in front: None where there is none."""
    if below is None:
        return (None,) * 4
    return check("below.y", below.y, like, shape), *map(vector, (below.mean, below.scale, below.shift))
