"""Device functions that the kernels share. Tiles are ``[BLOCK_M, BLOCK_N]``: rows (pixels) by channels."""

import triton
from triton import language as tl


@triton.jit
def relu(z):
    """``where(z <= 0, 0, z)``: NaN stays NaN, as in stock PyTorch."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def passes(z):
    """Where ReLU lets the gradient through: ``!(z <= 0)``, so also at NaN."""
    return (z <= 0) == 0


@triton.jit
def rounded(z, x):
    """``z`` in the dtype of what ``x``, a pointer or a descriptor, refers to."""
    if isinstance(x, tl.tensor_descriptor):
        return z.to(x.dtype)
    else:
        return z.to(x.dtype.element_ty)


@triton.jit
def load_tile(x, origin, pixel, valid, first, width, BLOCK_N: tl.constexpr):
    """Columns ``[first, first + BLOCK_N)`` of the rows ``origin`` (int64) plus ``pixel`` of a matrix with ``width`` columns.

    Behind a descriptor of x the rows follow each other from ``origin``; what lies outside of the matrix is 0. Behind a pointer
    rows are 0 where they are not ``valid`` ``[BLOCK_M]`` too.
    """
    if isinstance(x, tl.tensor_descriptor):
        return x.load([origin.to(tl.int32), first])
    else:
        column = first + tl.arange(0, BLOCK_N)
        inside = valid[:, None] & (column < width)[None, :]
        return tl.load(x + origin * width + pixel[:, None] * width + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(x, tile, origin, pixel, valid, first, width):
    """The inverse of ``load_tile``, in the dtype of x; the rows that are not ``valid`` lie outside of the matrix."""
    if isinstance(x, tl.tensor_descriptor):
        x.store([origin.to(tl.int32), first], tile.to(x.dtype))
    else:
        column = first + tl.arange(0, tile.shape[1])
        at = x + origin * width + (pixel[:, None] * width + column[None, :])
        tl.store(at, tile.to(x.dtype.element_ty), mask=valid[:, None] & (column < width)[None, :])


@triton.jit
def load_mask(mask, rows, first, width, valid, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Bits of the tile of ``rows`` ``[BLOCK_M]`` (int64) and columns ``[first, first + BLOCK_N)`` of a mask of row length
    ``width``; False where not ``valid`` ``[BLOCK_M, BLOCK_N]``. ALIGNED: ``width`` and ``first`` are multiples of 8."""
    if ALIGNED:
        columns = first // 8 + tl.arange(0, BLOCK_N // 8)
        inside = (rows >= 0)[:, None] & (columns < width // 8)[None, :]
        inside = inside & (tl.sum(valid.to(tl.int32), 1) > 0)[:, None]
        byte = tl.load(mask + rows[:, None] * (width // 8) + columns[None, :], mask=inside, other=0).to(tl.int32)
        bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        return (tl.reshape(bits, (rows.shape[0], BLOCK_N)) != 0) & valid
    else:
        at = rows[:, None] * width + (first + tl.arange(0, BLOCK_N))[None, :]
        byte = tl.load(mask + at // 8, mask=valid, other=0).to(tl.int32)
        return (((byte >> (at % 8).to(tl.int32)) & 1) != 0) & valid


@triton.jit
def store_mask(mask, rows, first, width, bits, valid, BLOCK_N: tl.constexpr):
    """The inverse of ``load_mask`` with ALIGNED: one byte for eight columns; ``valid``: of whole rows, ``[BLOCK_M]``."""
    powers = tl.reshape(bits.to(tl.int32), (rows.shape[0], BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    columns = first // 8 + tl.arange(0, BLOCK_N // 8)
    inside = valid[:, None] & (columns < width // 8)[None, :]
    # Disjoint bits: their sum is their union.
    tl.store(mask + rows[:, None] * (width // 8) + columns[None, :], tl.sum(powers, 2).to(tl.uint8), mask=inside)


@triton.jit
def tile_moments(x, valid, count):
    """Mean and sum of squared deviations ``[BLOCK_N]`` of a tile in the accumulation type, over its ``count`` rows that are
    ``valid`` ``[BLOCK_M, BLOCK_N]``; exact in two passes over registers."""
    mean = tl.sum(tl.where(valid, x, 0.0), 0) / count
    centred = tl.where(valid, x - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, 0)


@triton.jit
def wide_moments(x, valid, count):
    """``tile_moments`` of float32 with a mean in float64: far from zero, what the mean was rounded by would show in the
    differences between tiles."""
    mean, square = tile_moments(x, valid, count)
    slip = tl.sum(tl.where(valid, x - mean[None, :], 0.0), 0) / count
    slip = tl.where(tl.abs(slip) < float("inf"), slip, 0.0)  # an infinite mean stays infinite
    return mean.to(tl.float64) + slip.to(tl.float64), square - slip * slip * count


@triton.jit
def load_vector(vector, columns, width):
    """Per-channel values of a tile's ``columns``, ``[1, BLOCK_N]``; 0 beyond ``width``."""
    return tl.load(vector + columns, mask=columns < width, other=0.0)[None, :]


@triton.jit
def affine_in_centred(dz, y, mean, a, b, c):
    """``a·dz + b·(y − mean) + c``, the gradient behind a batch norm, of a tile; the vectors are ``[1, BLOCK_N]``."""
    # Frozen statistics have b = 0 and a gradient that does not depend on y: 0·NaN must not enter.
    return (dz * a + c) + tl.where(b == 0, 0.0, y - mean) * b
