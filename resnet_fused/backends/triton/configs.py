"""Tile configurations of the kernels: which are worth trying for a dtype and an architecture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

PRODUCTS = ("fprop1x1", "dgrad1x1", "wgrad1x1", "gram", "fprop3x3", "dgrad3x3", "wgrad3x3")
REDUCTIONS = ("bn_stats", "bn_backward_reduce")
KERNELS = (*PRODUCTS, *REDUCTIONS, "bn_act", "bn_backward", "add_relu", "pool", "pool_backward")


def over_rows(kernel: str) -> bool:
    """Whether the product reduces over the M rows, which it then splits among programs."""
    return kernel in ("wgrad1x1", "wgrad3x3", "gram")


def precision_of(shape: Mapping[str, int]) -> str:
    """How float32 is multiplied: a flag of the shape, else "ieee"."""
    return next((name for name in ("tf32", "tf32x3") if shape.get(name)), "ieee")


@dataclass(frozen=True)
class Config:
    """Tile sizes and compiler options of one launch.

    ``block_m`` always runs along the rows (pixels) of the ``[M, C]`` matrices; what the others run along:

    ==================================  ==================  =====================
    kernel                              ``block_n``         ``block_k``
    ==================================  ==================  =====================
    fprop1x1, fprop3x3                  K, of the output    C, the reduction
    dgrad1x1, dgrad3x3                  C, of the output    K, the reduction
    wgrad1x1, wgrad3x3 (reduce over M)  K, rows of dW       C, columns of dW
    gram (reduces over M)               C, rows of AᵀA      C, columns (the same)
    all others                          C                   unused (1)
    ==================================  ==================  =====================
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_TENSOR_TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32))
_PLAIN_TILES = ((64, 64), (64, 32), (32, 64), (32, 32))  # products without tensor cores live in registers


# (kernel, units that multiply, architecture, configuration) of which some variant spills though registers are left: ptxas
# trades a few stores for one more program on a multiprocessor.
_SPILLING = {
    ("fprop3x3", "ieee", 80, Config(32, 64, 16, 4, 2)),
    ("fprop3x3", "ieee", 80, Config(32, 32, 16, 4, 2)),
    ("dgrad3x3", "ieee", 80, Config(32, 32, 16, 4, 2)),
    ("fprop3x3", "ieee", 90, Config(32, 64, 16, 4, 2)),
    ("dgrad3x3", "ieee", 100, Config(32, 64, 16, 4, 2)),
    ("fprop3x3", "half", 80, Config(64, 128, 64, 8, 3)),
    ("dgrad3x3", "half", 100, Config(64, 128, 64, 8, 3)),
    ("dgrad3x3", "half", 100, Config(64, 128, 32, 8, 4)),
    ("fprop3x3", "ieee", 90, Config(32, 64, 32, 8, 2)),
    ("fprop3x3", "half", 80, Config(64, 128, 64, 8, 2)),
    ("fprop3x3", "ieee", 80, Config(32, 32, 32, 4, 2)),
    ("fprop3x3", "ieee", 80, Config(32, 64, 16, 8, 2)),
    ("fprop3x3", "ieee", 90, Config(32, 64, 32, 4, 2)),
    ("dgrad3x3", "ieee", 80, Config(32, 32, 32, 4, 2)),
    ("fprop3x3", "half", 80, Config(64, 128, 32, 4, 2)),
    ("fprop3x3", "half", 80, Config(64, 128, 32, 4, 4)),
    ("fprop3x3", "ieee", 90, Config(32, 32, 32, 4, 2)),
    ("wgrad3x3", "half", 80, Config(32, 64, 64, 4, 3)),
    ("fprop3x3", "half", 80, Config(64, 128, 32, 4, 3)),
    ("fprop3x3", "half", 80, Config(64, 128, 64, 8, 4)),
    ("fprop3x3", "tf32", 100, Config(128, 64, 32, 8, 3)),
    ("fprop3x3", "tf32", 80, Config(64, 128, 32, 8, 3)),
    ("wgrad1x1", "half", 100, Config(64, 128, 64, 8, 1)),
    ("wgrad1x1", "half", 90, Config(32, 128, 64, 4, 3)),
    ("wgrad1x1", "half", 90, Config(64, 128, 128, 8, 3)),
    ("wgrad1x1", "tf32", 100, Config(32, 64, 64, 4, 1)),
    ("fprop3x3", "tf32", 100, Config(128, 64, 32, 8, 2)),
    ("fprop3x3", "tf32", 100, Config(128, 64, 32, 8, 4)),
    ("fprop3x3", "tf32", 80, Config(64, 128, 32, 8, 2)),
    ("wgrad1x1", "half", 90, Config(32, 128, 64, 4, 2)),
    ("wgrad1x1", "half", 90, Config(32, 128, 64, 4, 4)),
    ("wgrad1x1", "half", 90, Config(64, 128, 128, 8, 2)),
    ("fprop3x3", "tf32", 80, Config(64, 128, 32, 8, 4)),
    ("wgrad1x1", "half", 90, Config(64, 128, 128, 8, 4)),
}


def _most_sums(kernel: str, units: str, warps: int, arch: int, feedback: bool) -> int:
    """Sums of a thread beyond which some variant of the kernel spills, as compiled by Triton 3.6."""
    if units == "ieee":
        return 16
    if units == "tf32x3":  # four parts of operands are in registers
        return 16 if over_rows(kernel) else 32
    if units == "tf32" and arch < 90:
        return 32
    if kernel.startswith("dgrad"):  # its epilogue reads tensors too
        return 64 if 90 <= arch < 100 and warps == 8 and not feedback else 32
    if kernel == "gram" and 90 <= arch < 100:  # both of its operands are transformed
        return 32
    return 64 if over_rows(kernel) or arch < 100 else 32


def _product_candidates(kernel: str, units: str, arch: int, feedback: bool) -> Iterator[Config]:
    """``units``: "half" for products of half precision, else the precision of float32's."""
    on_tensor_cores = units != "ieee"
    steps = {"half": (64, 32), "tf32": (32, 16), "tf32x3": (16, 32) if arch >= 90 else (16,), "ieee": (16, 32)}[units]
    for (rows, columns), step in itertools.product(_TENSOR_TILES if on_tensor_cores else _PLAIN_TILES, steps):
        for warps, stages in itertools.product((4, 8), (3, 2, 4) if on_tensor_cores else (2,)):
            if not 8 <= rows * columns / (32 * warps) <= _most_sums(kernel, units, warps, arch, feedback):
                continue
            if kernel == "gram" and rows != columns:
                continue
            if kernel.startswith("dgrad") and (
                arch < 90 and step > 32 if on_tensor_cores else rows * columns > 64 * 32
            ):
                continue  # spills, as compiled by Triton 3.6
            if over_rows(kernel):
                if units == "tf32" and step * min(rows, columns) < 4 * 32 * warps:
                    continue  # a thread has no 16 bytes of a tile
                if arch >= 100 and stages != 2:
                    continue  # more stages with a transposed operand fail inside Triton 3.6: one choice is left
                yield Config(step, rows, columns, warps, 1 if arch >= 100 else stages)
            else:
                yield Config(rows, columns, step, warps, stages)


def _stream_candidates(kernel: str, dtype: torch.dtype) -> Iterator[Config]:
    most = 8 if kernel.startswith("pool") else 32  # nine taps, or four windows and four pixels, want as many tiles
    for rows, columns, warps in itertools.product((32, 64, 16, 128), (64, 128, 32), (4, 8)):
        # Rows of whole 128-byte lines; at least a 16-byte load for each thread, and its tile in registers.
        if columns * dtype.itemsize >= 128 and 8 <= rows * columns / (32 * warps) <= most:
            yield Config(rows, columns, 1, warps, 1)


@functools.lru_cache(maxsize=256)
def candidates(
    kernel: str, dtype: torch.dtype, arch: int, feedback: bool = False, precision: str = "ieee"
) -> tuple[Config, ...]:
    """The configurations of ``kernel`` that are worth trying, in a fixed order.

    Args:
        feedback: those of an input gradient with a coupling.
        precision: of float32's products, see ``precision_of``.
    Raises:
        ValueError: no kernel has that name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    units = "half" if dtype.itemsize == 2 else precision
    products = kernel in PRODUCTS
    found = _product_candidates(kernel, units, arch, feedback) if products else _stream_candidates(kernel, dtype)
    return tuple(c for c in dict.fromkeys(found) if (kernel, units, arch, c) not in _SPILLING)
