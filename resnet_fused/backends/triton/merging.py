"""Merging partial results of tiles: sums, and means with sums of squared deviations; in float64, in a fixed order."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton import language as tl

_MERGED, _GROUP = (
    512,
    64,
)  # partial results that one program merges; where there are more, a pass for each 64 goes before
_MERGE_BLOCK = (128, 8)


@triton.jit
def merge_moments_kernel(
    partials, out, M, C, rows, tiles, group,
    FINAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merges ``group`` tiles of ``rows`` rows each (the last may have fewer): means and sums of squared deviations
    ``partials[tiles, 2, C]`` to ``out[tiles / group, 2, C]``; FINAL: mean and biased variance, of all.

    Chan's formula for many sets at once, in float64: ``M2 = Σ M2_i + n_i·(µ_i − µ)²``.
    """
    tiles_n = tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = columns < C
    begin = part * group
    end = tl.minimum(begin + group, tiles)
    count = (tl.minimum(end.to(tl.int64) * rows, M) - begin.to(tl.int64) * rows).to(tl.float64)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    for t in tl.range(begin, end, BLOCK_T):
        tile = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = (tile < end)[:, None] & exists[None, :]
        weight = tl.minimum(M - tile * rows, rows).to(tl.float64)[:, None]
        at = tile[:, None] * 2 * C + columns[None, :]
        total += tl.where(valid, weight * tl.load(partials + at, mask=valid, other=0.0).to(tl.float64), 0.0)
    mean = tl.sum(total, 0) / count
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    for t in tl.range(begin, end, BLOCK_T):
        tile = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = (tile < end)[:, None] & exists[None, :]
        weight = tl.minimum(M - tile * rows, rows).to(tl.float64)[:, None]
        at = tile[:, None] * 2 * C + columns[None, :]
        delta = tl.load(partials + at, mask=valid, other=0.0).to(tl.float64) - mean[None, :]
        square = tl.load(partials + at + C, mask=valid, other=0.0).to(tl.float64)
        total += tl.where(valid, square + weight * delta * delta, 0.0)
    square = tl.sum(total, 0)
    if FINAL:
        square = square / count
    to = out + part.to(tl.int64) * 2 * C + columns
    tl.store(to, mean.to(out.dtype.element_ty), mask=exists)
    tl.store(to + C, square.to(out.dtype.element_ty), mask=exists)


@triton.jit
def merge_sums_kernel(partials, out, width, tiles, group, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of ``group`` rows each of ``partials[tiles, width]`` to ``out[tiles / group, width]``, in float64."""
    tiles_n = tl.cdiv(width, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = columns < width
    begin = part * group
    end = tl.minimum(begin + group, tiles)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    for t in tl.range(begin, end, BLOCK_T):
        tile = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        valid = (tile < end)[:, None] & exists[None, :]
        total += tl.load(partials + tile[:, None] * width + columns[None, :], mask=valid, other=0.0).to(tl.float64)
    to = out + part.to(tl.int64) * width + columns
    tl.store(to, tl.sum(total, 0).to(out.dtype.element_ty), mask=exists)


def _levels(tiles: int) -> Iterator[tuple[int, int, int]]:
    """Passes that merge ``tiles`` partial results, as (partial results, how many become one, results)."""
    while tiles > _MERGED:
        yield tiles, _GROUP, triton.cdiv(tiles, _GROUP)
        tiles = triton.cdiv(tiles, _GROUP)
    yield tiles, tiles, 1


def merge_moments(partials: Tensor, m: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` in float32 from those of tiles.

    Args:
        partials (Tensor[tiles, 2, C]): mean and sum of squared deviations of each tile, in float32 or float64.
        m: rows of all tiles. rows: of each tile but the last, which may have fewer.
    Numerics: Chan's formula in float64, in a fixed order.
    """
    block_t, block_n = _MERGE_BLOCK
    c = partials.shape[2]
    for tiles, group, groups in _levels(partials.shape[0]):
        final = groups == 1
        out = partials.new_empty((groups, 2, c), dtype=torch.float32 if final else torch.float64)
        grid = (groups * triton.cdiv(c, block_n),)
        merge_moments_kernel[grid](
            partials, out, m, c, rows, tiles, group, FINAL=final, BLOCK_T=block_t, BLOCK_N=block_n
        )
        partials, rows = out, rows * group
    return partials[0, 0], partials[0, 1]


def merge_sums(partials: Tensor) -> Tensor:
    """``partials[tiles, …]`` summed over the tiles, in float32. Numerics: sums in float64, in a fixed order."""
    block_t, block_n = _MERGE_BLOCK
    width = partials[0].numel()
    for tiles, group, groups in _levels(partials.shape[0]):
        dtype = torch.float32 if groups == 1 else torch.float64
        out = partials.new_empty((groups, *partials.shape[1:]), dtype=dtype)
        grid = (groups * triton.cdiv(width, block_n),)
        merge_sums_kernel[grid](partials, out, width, tiles, group, BLOCK_T=block_t, BLOCK_N=block_n)
        partials = out
    return partials[0]
