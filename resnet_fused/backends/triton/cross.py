"""Kernels that sum products over rows: gradients of 1×1 filters, and covariances.

The rows are split among programs by chunks; a program takes a fixed range of chunks in order, and the host adds the programs'
partial results in a fixed order. What these sums feed, a variance or batch norm's gradient, may cancel: a chunk's product is a
fresh sum (tensor cores truncate where they accumulate), and in float32 (COMPENSATED) what is lost where chunks are added is
kept apart.
"""

import triton
from triton import language as tl

from .tiles import load_gradient, load_operand, pixels


@triton.jit
def add_exactly(high, low, x):
    """``high + low + x`` as two float32: Knuth's TwoSum. Where ``high`` is not finite, ``low`` is NaN."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


@triton.jit
def add_chunk(high, low, x, COMPENSATED: tl.constexpr):
    if COMPENSATED:
        return add_exactly(high, low, x)
    else:
        # As ``high + x`` the compiler would let the product of the next chunk start from ``high``: one long sum.
        return high - (-x), low


@triton.jit
def join(high, low):
    """The one float64 number that ``add_exactly`` left in two."""
    high = high.to(tl.float64)
    return tl.where(low == low, high + low.to(tl.float64), high)


@triton.jit
def wgrad_tile(
    tile, dz, mask, y, y_mean, y_a, y_b, y_c, a, a_scale, a_shift, centre, partials, sums,
    M, K, C, P, Q, H, W, stride_h, stride_w, chunks,
    A_RELU: tl.constexpr, STRIDED: tl.constexpr, K_ALIGNED: tl.constexpr, COMPENSATED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile number ``tile``, BLOCK_N by BLOCK_K, of one product of ``wgrad_kernel``."""
    across = tl.cdiv(C, BLOCK_K)
    first = tile // across * BLOCK_N
    k = first + tl.arange(0, BLOCK_N)
    first_c = tile % across * BLOCK_K
    c = first_c + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    high = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    low = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_high = tl.zeros((BLOCK_N,), tl.float32)
    sum_low = tl.zeros((BLOCK_N,), tl.float32)
    for chunk in tl.range(split * chunks, tl.minimum((split + 1) * chunks, tl.cdiv(M, BLOCK_M))):
        row = tl.cast(chunk * BLOCK_M, tl.int64)
        valid = tl.arange(0, BLOCK_M) < M - chunk * BLOCK_M
        g = load_gradient(dz, mask, None, y, y_mean, y_a, y_b, y_c, row, valid, first, K, BLOCK_N, K_ALIGNED)
        if y is not None:
            g = tl.where(valid[:, None], g, 0.0)
        origin, pixel = pixels(row, BLOCK_M, P, Q, H, W, stride_h, stride_w, STRIDED)
        x = load_operand(a, a_scale, a_shift, centre, origin, pixel, valid, first_c, C, A_RELU, BLOCK_K)
        if a_scale is not None or centre is not None:
            x = tl.where(valid[:, None], x, 0.0)
        high, low = add_chunk(high, low, tl.dot(tl.trans(g), x, input_precision=PRECISION), COMPENSATED)
        if sums is not None:
            sum_high, sum_low = add_exactly(sum_high, sum_low, tl.sum(g.to(tl.float32), 0))
    inside = (k < K)[:, None] & (c < C)[None, :]
    at = (split.to(tl.int64) * K + k)[:, None] * C + c[None, :]
    if COMPENSATED:
        tl.store(partials + at, join(high, low), mask=inside)
    else:
        tl.store(partials + at, high, mask=inside)
    if sums is not None:
        # Programs of one row of tiles have the same sums; the first of them stores.
        tl.store(sums + split * K + k, join(sum_high, sum_low), mask=(k < K) & (tile % across == 0))


@triton.jit
def wgrad_kernel(
    dz, mask, y, y_mean, y_a, y_b, y_c,
    a, a_scale, a_shift, centre, partials,
    a2, a2_scale, a2_shift, centre2, partials2,
    sums,
    M, K, P, Q, chunks,
    C, H, W, stride_h, stride_w,
    C2, H2, W2, stride2_h, stride2_w,
    A_RELU: tl.constexpr, A2_RELU: tl.constexpr, STRIDED: tl.constexpr, STRIDED2: tl.constexpr,
    K_ALIGNED: tl.constexpr, COMPENSATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partials`` ``[splits, K, C]`` of ``dYᵀ(A − centre)``, ``partials2`` ``[splits, K, C2]`` the same of a second operand,
    and ``sums`` ``[splits, K]`` of dY.

    dY ``[M, K]`` is what ``load_gradient`` makes of dz, mask and y. Program (t, s) computes tile t, first those of A, over the
    chunks ``[s·chunks, (s + 1)·chunks)`` of BLOCK_M rows: programs that run together read the same rows of dY, once from memory.
    """
    tile = tl.program_id(0)
    if a2 is not None:
        tiles = tl.cdiv(K, BLOCK_N) * tl.cdiv(C, BLOCK_K)
        if tile >= tiles:
            wgrad_tile(
                tile - tiles, dz, mask, y, y_mean, y_a, y_b, y_c, a2, a2_scale, a2_shift, centre2, partials2, None,
                M, K, C2, P, Q, H2, W2, stride2_h, stride2_w, chunks,
                A2_RELU, STRIDED2, K_ALIGNED, COMPENSATED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            return
    wgrad_tile(
        tile, dz, mask, y, y_mean, y_a, y_b, y_c, a, a_scale, a_shift, centre, partials, sums,
        M, K, C, P, Q, H, W, stride_h, stride_w, chunks,
        A_RELU, STRIDED, K_ALIGNED, COMPENSATED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def gram_kernel(
    x,
    scale,
    shift,
    partials,
    sums,
    centres,
    M,
    C,
    P,
    Q,
    H,
    W,
    stride_h,
    stride_w,
    chunks,
    RELU: tl.constexpr,
    STRIDED: tl.constexpr,
    COMPENSATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``partials`` ``[splits, C, C]`` of ``(A − centre)ᵀ(A − centre)``, ``sums`` ``[splits, C]`` of A − centre, in float64.

    Only tiles that touch the upper triangle are written. ``centres`` ``[splits, C]`` float32, where there are any, receives
    the mean of each split's first chunk (0 where that is not finite), which is subtracted while A is loaded; else centre = 0.
    Program (t, s) computes tile t over the chunks ``[s·chunks, (s + 1)·chunks)`` of BLOCK_M rows.
    """
    side = tl.cdiv(C, BLOCK_N)
    i = tl.program_id(0) // side
    j = tl.program_id(0) % side
    if i > j:
        return
    split = tl.program_id(1)
    ci = i * BLOCK_N + tl.arange(0, BLOCK_N)
    cj = j * BLOCK_N + tl.arange(0, BLOCK_N)
    high = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    sum_high = tl.zeros((BLOCK_N,), tl.float32)
    sum_low = tl.zeros((BLOCK_N,), tl.float32)
    if centres is not None:
        centre_i = _first_mean(
            x, scale, shift, split * chunks, i * BLOCK_N, M, C, P, Q, H, W, stride_h, stride_w, RELU, STRIDED, BLOCK_M, BLOCK_N
        )  # fmt: skip
        centre_j = _first_mean(
            x, scale, shift, split * chunks, j * BLOCK_N, M, C, P, Q, H, W, stride_h, stride_w, RELU, STRIDED, BLOCK_M, BLOCK_N
        )  # fmt: skip
    for chunk in tl.range(split * chunks, tl.minimum((split + 1) * chunks, tl.cdiv(M, BLOCK_M))):
        row = tl.cast(chunk * BLOCK_M, tl.int64)
        valid = tl.arange(0, BLOCK_M) < M - chunk * BLOCK_M
        origin, pixel = pixels(row, BLOCK_M, P, Q, H, W, stride_h, stride_w, STRIDED)
        a = load_operand(x, scale, shift, None, origin, pixel, valid, i * BLOCK_N, C, RELU, BLOCK_N)
        b = load_operand(x, scale, shift, None, origin, pixel, valid, j * BLOCK_N, C, RELU, BLOCK_N)
        if centres is not None:
            a -= centre_i[None, :]
            b -= centre_j[None, :]
        if scale is not None or centres is not None:
            a = tl.where(valid[:, None], a, 0.0)
            b = tl.where(valid[:, None], b, 0.0)
        high, low = add_chunk(high, low, tl.dot(tl.trans(a), b, input_precision=PRECISION), COMPENSATED)
        sum_high, sum_low = add_exactly(sum_high, sum_low, tl.sum(a.to(tl.float32), 0))
    at = (split.to(tl.int64) * C + ci)[:, None] * C + cj[None, :]
    inside = (ci < C)[:, None] & (cj < C)[None, :]
    if COMPENSATED:
        tl.store(partials + at, join(high, low), mask=inside)
    else:
        tl.store(partials + at, high, mask=inside)
    store_vector = (ci < C) & (i == j)
    tl.store(sums + split * C + ci, join(sum_high, sum_low), mask=store_vector)
    if centres is not None:
        tl.store(centres + split * C + ci, centre_i, mask=store_vector)


@triton.jit
def _first_mean(
    x, scale, shift, chunk, first, M, C, P, Q, H, W, stride_h, stride_w,
    RELU: tl.constexpr, STRIDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The mean of a chunk's rows, 0 where it is not finite."""
    row = tl.cast(chunk * BLOCK_M, tl.int64)
    valid = tl.arange(0, BLOCK_M) < M - chunk * BLOCK_M
    origin, pixel = pixels(row, BLOCK_M, P, Q, H, W, stride_h, stride_w, STRIDED)
    a = load_operand(x, scale, shift, None, origin, pixel, valid, first, C, RELU, BLOCK_N)
    count = tl.minimum(M - chunk * BLOCK_M, BLOCK_M).to(tl.float32)
    mean = tl.sum(tl.where(valid[:, None], a, 0.0), 0) / count
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
