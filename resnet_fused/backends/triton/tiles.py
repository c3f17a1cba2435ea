"""Tiles of a product's operands, formed while they are loaded: activations, gradients, filters.

What comes from matrices may come from descriptors (``launching.described``), which need no addresses in registers.
"""

import triton
from triton import language as tl

from .language import affine_in_centred, load_mask, load_tile, load_vector, relu


@triton.jit
def pixels(first, BLOCK: tl.constexpr, P, Q, H, W, stride_h, stride_w, STRIDED: tl.constexpr):
    """The rows of the input matrix ``[N·H·W, C]`` behind the rows ``first`` (int64), first + 1, … of the output ``[N·P·Q, K]``:
    the first of them (int64), and all relative to it: without stride in int32, half the registers of 64-bit addresses."""
    if STRIDED:
        row = first + tl.arange(0, BLOCK)
        pixel = (row // (P * Q) * H + row // Q % P * stride_h) * W + row % Q * stride_w
        origin = (first // (P * Q) * H + first // Q % P * stride_h) * W + first % Q * stride_w
        return origin, pixel - origin
    else:
        return first, tl.arange(0, BLOCK)


@triton.jit
def load_operand(
    x,
    scale,
    shift,
    centre,
    origin,
    pixel,
    valid_row,
    first,
    width,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tile of ``act(scale·x + shift)``, rounded as if it had been stored, minus ``centre``, in the dtype of x.

    Its rows and columns are those of ``load_tile``. Without ``scale`` it is x. Outside ``width`` it is 0; rows that are not
    valid hold anything (what ``load_tile`` has there if there is neither scale nor centre).
    """
    column = first + tl.arange(0, BLOCK)
    stored = load_tile(x, origin, pixel, valid_row, first, width, BLOCK)
    tile = stored
    if scale is not None:
        z = tile.to(tl.float32) * load_vector(scale, column, width)
        z += load_vector(shift, column, width)
        if RELU:
            z = relu(z)
        tile = z.to(stored.dtype)
    if centre is not None:
        tile -= load_vector(centre, column, width)
    return tile


@triton.jit
def load_bits(mask, row, valid_row, valid, first, width, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """``load_mask`` of the rows from ``row`` (int64)."""
    local = tl.arange(0, valid_row.shape[0])
    if ALIGNED:  # it looks at the columns by itself
        return load_mask(mask + row * (width // 8), local, first, width, valid_row[:, None], BLOCK, True)
    else:
        return load_mask(mask, row + local, first, width, valid, BLOCK, False)


@triton.jit
def load_gradient(
    dz,
    mask,
    mean_dz,
    y,
    y_mean,
    y_a,
    y_b,
    y_c,
    row,
    valid_row,
    first,
    width,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The tile of ``dz`` where ``mask``, minus ``mean_dz``; with ``y`` of ``a·dz + b·(y − mean) + c``, rounded as if it had
    been stored. Rows from ``row`` (int64), columns ``[first, first + BLOCK)``.

    Outside ``width`` it is 0; rows that are not valid hold anything (0 if there is neither y nor mean_dz).
    """
    column = first + tl.arange(0, BLOCK)
    valid = valid_row[:, None] & (column < width)[None, :]
    local = tl.arange(0, valid_row.shape[0])
    stored = load_tile(dz, row, local, valid_row, first, width, BLOCK)
    tile = stored
    if mask is not None:
        tile = tl.where(load_bits(mask, row, valid_row, valid, first, width, BLOCK, ALIGNED), tile, 0.0)
    if y is not None:
        values = load_tile(y, row, local, valid_row, first, width, BLOCK).to(tl.float32)
        dy = affine_in_centred(
            tile.to(tl.float32),
            values,
            load_vector(y_mean, column, width),
            load_vector(y_a, column, width),
            load_vector(y_b, column, width),
            load_vector(y_c, column, width),
        )
        tile = dy.to(stored.dtype)
    if mean_dz is not None:
        tile -= load_vector(mean_dz, column, width)
    return tile


@triton.jit
def load_filter(
    w,
    into,
    out,
    depth,
    width,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tile from ``(into, out)`` of a matrix ``[depth, width]``, TRANSPOSED: stored as ``[width, depth]``; 0 outside."""
    if isinstance(w, tl.tensor_descriptor):
        if TRANSPOSED:
            return tl.trans(w.load([out, into]))
        else:
            return w.load([into, out])
    else:
        row = into + tl.arange(0, BLOCK_K)[:, None]
        column = out + tl.arange(0, BLOCK_N)[None, :]
        at = column * depth + row if TRANSPOSED else row * width + column
        return tl.load(w + at, mask=(row < depth) & (column < width), other=0.0)
