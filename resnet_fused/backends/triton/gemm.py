"""Kernels of 1×1 convolutions as rows of activations times a filter, with what batch norm does in front and behind.

An operand may be formed while it is loaded (``tiles``: ``Pending``, ``PendingGrad``, a masked or centred gradient), and what
follows a convolution happens to the sums while they are in registers. Optional tensors are None where they are absent.

A program computes one tile; the tiles of one block of rows follow each other, so that these rows come from L2.

Fewer than 2³¹ rows and filter elements; activations may have more elements.
"""

import triton
from triton import language as tl

from .language import (
    load_tile,
    load_vector,
    passes,
    relu,
    rounded,
    store_mask,
    store_tile,
    tile_moments,
    wide_moments,
)
from .tiles import load_bits, load_filter, load_gradient, load_operand, pixels


@triton.jit
def add_product(
    acc,
    x,
    scale,
    shift,
    centre,
    origin,
    pixel,
    valid_row,
    w,
    low,
    out,
    C,
    K,
    RELU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc`` plus the operand's rows times the columns from ``out`` of the matrix w ``[C, K]``, or of w + low."""
    for c in tl.range(0, C, BLOCK_K):
        a = load_operand(x, scale, shift, centre, origin, pixel, valid_row, c, C, RELU, BLOCK_K)
        acc = tl.dot(a, load_filter(w, c, out, C, K, TRANSPOSED, BLOCK_K, BLOCK_N), acc, input_precision=PRECISION)
        if low is not None:
            b = load_filter(low, c, out, C, K, TRANSPOSED, BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_of(
    x, scale, shift, row, valid_row, w, first, C, K, P, Q, H, W, stride_h, stride_w,
    RELU: tl.constexpr, STRIDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of X Wᵀ from output row ``row`` (int64) and column ``first``; w is stored as ``[K, C]``."""
    origin, pixel = pixels(row, valid_row.shape[0], P, Q, H, W, stride_h, stride_w, STRIDED)
    z = tl.zeros((valid_row.shape[0], BLOCK_N), tl.float32)
    return add_product(
        z,
        x,
        scale,
        shift,
        None,
        origin,
        pixel,
        valid_row,
        w,
        None,
        first,
        C,
        K,
        RELU,
        True,
        PRECISION,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def fprop_kernel(
    x,
    x_scale,
    x_shift,
    w,
    y_scale,
    x2,
    x2_scale,
    x2_shift,
    w2,
    y2_scale,
    shift,
    residual,
    y,
    mask,
    partials,
    M,
    K,
    P,
    Q,
    C,
    H,
    W,
    stride_h,
    stride_w,
    C2,
    H2,
    W2,
    stride2_h,
    stride2_w,
    X_RELU: tl.constexpr,
    X2_RELU: tl.constexpr,
    STRIDED: tl.constexpr,
    STRIDED2: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = act(y_scale·(X Wᵀ) [+ y2_scale·(X2 W2ᵀ)] [+ shift] [+ residual])`` ``[M, K]``, rounded once, at the store.

    ``mask``: one bit for each element of y, where it passes the gradient; K % 8 == 0. ``partials`` ``[tiles of rows, 2, K]``:
    mean and sum of squared deviations of each tile, *of y as it was rounded*, exact in two passes; in float32, or in float64
    with a mean better than float32's.
    """
    across = tl.cdiv(K, BLOCK_N)
    block = tl.program_id(0) // across
    first = tl.program_id(0) % across * BLOCK_N
    row = tl.cast(block * BLOCK_M, tl.int64)
    local = tl.arange(0, BLOCK_M)
    valid_row = local < M - block * BLOCK_M
    out = first + tl.arange(0, BLOCK_N)
    z = product_of(
        x, x_scale, x_shift, row, valid_row, w, first, C, K, P, Q, H, W, stride_h, stride_w,
        X_RELU, STRIDED, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if y_scale is not None:
        z *= load_vector(y_scale, out, K)
    if x2 is not None:
        z2 = product_of(
            x2, x2_scale, x2_shift, row, valid_row, w2, first, C2, K, P, Q, H2, W2, stride2_h, stride2_w,
            X2_RELU, STRIDED2, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if y2_scale is not None:
            z2 *= load_vector(y2_scale, out, K)
        z += z2
    if shift is not None:
        z += load_vector(shift, out, K)
    if residual is not None:
        z += load_tile(residual, row, local, valid_row, first, K, BLOCK_N).to(tl.float32)
    z = rounded(z, y).to(tl.float32)
    activated = relu(z) if RELU else z
    store_tile(y, activated, row, local, valid_row, first, K)
    if mask is not None:
        store_mask(mask + row * (K // 8), local, first, K, passes(z), valid_row, BLOCK_N)
    if partials is not None:
        count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
        if partials.dtype.element_ty == tl.float64:
            mean, square = wide_moments(activated, valid_row[:, None], count)
        else:
            mean, square = tile_moments(activated, valid_row[:, None], count)
        tl.store(partials + 2 * block * K + out, mean, mask=out < K)
        tl.store(partials + (2 * block + 1) * K + out, square, mask=out < K)


@triton.jit
def dgrad_kernel(
    dz,
    mask,
    mean_dz,
    y,
    y_mean,
    y_a,
    y_b,
    y_c,
    w,
    a,
    a_scale,
    a_shift,
    mean_a,
    coupling,
    coupling_low,
    constant,
    residual,
    residual_mask,
    below,
    below_mean,
    below_scale,
    below_shift,
    dx,
    partials,
    M,
    K,
    C,
    P,
    Q,
    H,
    W,
    stride_h,
    stride_w,
    A_RELU: tl.constexpr,
    BELOW_RELU: tl.constexpr,
    STRIDED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    K_ALIGNED: tl.constexpr,
    C_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dx = dY·W [+ (A − mean_a)·coupling] [+ constant] [+ residual where its mask]`` ``[M, C]``, rounded once.

    dY ``[M, K]`` is what ``load_gradient`` makes of dz, mask, mean_dz and y; W is ``[K, C]``, coupling (plus coupling_low)
    ``[C, C]``. STRIDED: A and dx are read and written at the pixels that the convolution reads. ACCUMULATE: dx is added to.

    ``below`` (with BELOW_RELU): dx is kept where the activation ``below_scale·below + below_shift``, as it is rounded, passes
    the gradient; ``partials`` ``[tiles of rows, 2, C]`` float32: each tile's sums of dx and of dx·(below − below_mean), of dx as
    it was rounded.
    """
    across = tl.cdiv(C, BLOCK_N)
    block = tl.program_id(0) // across
    first = tl.program_id(0) % across * BLOCK_N
    row = tl.cast(block * BLOCK_M, tl.int64)
    local = tl.arange(0, BLOCK_M)
    valid_row = local < M - block * BLOCK_M
    out = first + tl.arange(0, BLOCK_N)
    origin, pixel = pixels(row, BLOCK_M, P, Q, H, W, stride_h, stride_w, STRIDED)
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        g = load_gradient(
            dz, mask, mean_dz, y, y_mean, y_a, y_b, y_c, row, valid_row, k, K, BLOCK_K, K_ALIGNED
        )  # fmt: skip
        da = tl.dot(g, load_filter(w, k, first, K, C, False, BLOCK_K, BLOCK_N), da, input_precision=PRECISION)
    if a is not None:
        da = add_product(
            da,
            a,
            a_scale,
            a_shift,
            mean_a,
            origin,
            pixel,
            valid_row,
            coupling,
            coupling_low,
            first,
            C,
            C,
            A_RELU,
            False,
            PRECISION,
            BLOCK_N,
            BLOCK_K,
        )
    if constant is not None:
        da += load_vector(constant, out, C)
    valid = valid_row[:, None] & (out < C)[None, :]
    if residual is not None:
        shortcut = load_tile(residual, origin, pixel, valid_row, first, C, BLOCK_N)
        if residual_mask is not None:
            shortcut = tl.where(
                load_bits(residual_mask, row, valid_row, valid, first, C, BLOCK_N, C_ALIGNED), shortcut, 0.0
            )
        da += shortcut.to(tl.float32)
    if ACCUMULATE:
        da += load_tile(dx, origin, pixel, valid_row, first, C, BLOCK_N).to(tl.float32)
    if below is not None:
        value = load_tile(below, origin, pixel, valid_row, first, C, BLOCK_N).to(tl.float32)
        if BELOW_RELU:
            z = value * load_vector(below_scale, out, C) + load_vector(below_shift, out, C)
            da = tl.where(passes(rounded(z, below).to(tl.float32)), da, 0.0)
        da = tl.where(valid_row[:, None], rounded(da, dx).to(tl.float32), 0.0)
    store_tile(dx, da, origin, pixel, valid_row, first, C)
    if below is not None:
        centred = tl.where(valid_row[:, None], value - load_vector(below_mean, out, C), 0.0)
        tl.store(partials + 2 * block * C + out, tl.sum(da, 0), mask=out < C)
        tl.store(partials + (2 * block + 1) * C + out, tl.sum(da * centred, 0), mask=out < C)
