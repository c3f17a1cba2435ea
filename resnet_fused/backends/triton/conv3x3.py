"""3×3 convolutions of stride 1 and padding 1, fused with the batch norms around them: implicit products on shifted rows.

An activation dense in channels_last is the matrix ``[M, C]``, ``M = N·H·W``. Filter tap ``(r, s)`` of output row m reads input
row ``m + (r − 1)·W + (s − 1)``, so the convolution is nine products of shifted tiles with ``[C, K]`` slices of the filter. Where
the tap leaves the image, the shifted row is a pixel of another line or image (or lies outside the tensor): it is not read, and
counts as 0 *after* whatever is applied to the operand while it is loaded.

The loop over taps is unrolled: a flat loop over taps and channels that divides to tell them apart is miscompiled by Triton at
eight warps (https://github.com/pytorch/pytorch/issues/173068).
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import Below, Conv, Gradient, Operand, PendingGrad
from .language import load_tile, load_vector, passes, rounded, store_tile, tile_moments
from .launching import (
    described,
    empty,
    front,
    gradient,
    operand,
    options,
    product_precision,
    rows_of,
    shape_of,
    split,
)
from .merging import merge_moments, merge_sums
from .tiles import load_gradient, load_operand
from .tuning import Config, choose


@triton.jit
def load_shifted(
    x, scale, shift, y, mean, a, b, c, row, inside, first, width, RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows from ``row`` (int64) and columns ``[first, first + BLOCK)`` of an operand, zero in rows that are not ``inside``.

    It is what ``load_gradient`` makes of x, y, mean, a, b, c where there is a y, else what ``load_operand`` makes of x, scale,
    shift.
    """
    if y is not None:
        tile = load_gradient(x, None, None, y, mean, a, b, c, row, inside, first, width, BLOCK, False)
    else:
        local = tl.arange(0, inside.shape[0])
        tile = load_operand(x, scale, shift, None, row, local, inside, first, width, RELU, BLOCK)
    if scale is not None or y is not None or isinstance(x, tl.tensor_descriptor):
        tile = tl.where(inside[:, None], tile, 0.0)
    return tile


@triton.jit
def reaches(exists, line, pixel, down, right, H, W):
    """Which rows ``(line, pixel)`` have a pixel ``down`` lines below and ``right`` of them, in the same image."""
    return exists & (line + down >= 0) & (line + down < H) & (pixel + right >= 0) & (pixel + right < W)


@triton.jit
def load_tap(
    filters,
    tap: tl.constexpr,
    c0,
    n0,
    C,
    K,
    BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile from ``(c0, n0)`` of ``filter(tap)`` ``[C, K]`` of ``conv3x3_kernel``; 0 outside."""
    if isinstance(filters, tl.tensor_descriptor):
        if BACKWARD:
            return tl.reshape(filters.load([c0, 8 - tap, n0]), (BLOCK_K, BLOCK_N))
        else:
            return tl.trans(tl.reshape(filters.load([n0, tap, c0]), (BLOCK_N, BLOCK_K)))
    else:
        c = c0 + tl.arange(0, BLOCK_K)[:, None]
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        at = c * (9 * K) + ((8 - tap) * K + n) if BACKWARD else n * (9 * C) + (tap * C + c)
        return tl.load(filters + at, mask=(c < C) & (n < K), other=0.0)


@triton.jit
def conv3x3_kernel(
    x, scale, shift, y, mean, a, b, c,
    filters, out, partials,
    below, below_mean, below_scale, below_shift,
    M, H, W, C, K,
    RELU: tl.constexpr, BACKWARD: tl.constexpr, BELOW_RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[m, k] = Σ_{tap, c} operand[m + offset(tap), c] · filter(tap)[c, k]``: a tile ``[BLOCK_M, BLOCK_N]`` per program.

    The operand ``[M, C]`` is that of ``load_shifted``. ``filters`` is ``[K, 9, C]``; with BACKWARD it is ``[C, 9, K]``, that
    of the convolution whose input gradient this is, read flipped and transposed.
    ``partials[tile, 2, K]``, of the tile's values as stored: mean and sum of squared deviations; with ``below`` ``Σ out`` and
    ``Σ out·(below − below_mean)``, and ``out`` has passed the gradient of the ReLU at ``below_scale·below + below_shift``
    (BELOW_RELU).
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    first = tile_m * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    line = (rows // W) % H
    pixel = rows % W
    exists = rows < M
    n0 = (tl.program_id(0) % tiles_n) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(9):
        inside = reaches(exists, line, pixel, tap // 3 - 1, tap % 3 - 1, H, W)
        row = first.to(tl.int64) + (tap // 3 - 1) * W + (tap % 3 - 1)
        for c0 in tl.range(0, C, BLOCK_K):
            operand = load_shifted(x, scale, shift, y, mean, a, b, c, row, inside, c0, C, RELU, BLOCK_K)
            taps = load_tap(filters, tap, c0, n0, C, K, BACKWARD, BLOCK_N, BLOCK_K)
            acc = tl.dot(operand, taps, acc, input_precision=PRECISION)

    row = first.to(tl.int64)
    local = tl.arange(0, BLOCK_M)
    if below is not None:
        value = load_tile(below, row, local, exists, n0, K, BLOCK_N).to(tl.float32)
        if BELOW_RELU:
            # Rounded as the activation was: what became 0 then passes no gradient.
            z = value * load_vector(below_scale, n, K) + load_vector(below_shift, n, K)
            acc = tl.where(passes(rounded(z, out).to(tl.float32)), acc, 0.0)
    values = rounded(acc, out).to(tl.float32)
    store_tile(out, values, row, local, exists, n0, K)
    if partials is not None:
        valid = exists[:, None]
        if below is None:
            one, two = tile_moments(values, valid, tl.minimum(M - first, BLOCK_M).to(tl.float32))
        else:
            one = tl.sum(tl.where(valid, values, 0.0), 0)
            two = tl.sum(tl.where(valid, values * (value - load_vector(below_mean, n, K)), 0.0), 0)
        to = partials + tile_m.to(tl.int64) * (2 * K) + n
        tl.store(to, one, mask=n < K)
        tl.store(to + K, two, mask=n < K)


@triton.jit
def wgrad3x3_kernel(
    dz, y, y_mean, y_a, y_b, y_c,
    x, scale, shift, partials,
    M, H, W, C, K, ROWS,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partials[split, k, tap, c] = Σ_m dy[m, k] · a[m + offset(tap), c]`` over the ROWS rows of a split.

    dy and a are what ``load_shifted`` makes of dz, y, … and of x, scale, shift. One program per (tap, ``BLOCK_N`` of K,
    ``BLOCK_K`` of C, split): neighbouring programs are taps of the same tiles. ROWS is a multiple of BLOCK_M.
    """
    tap = tl.program_id(0) % 9
    tile = tl.program_id(0) // 9
    down = tap // 3 - 1
    right = tap % 3 - 1
    tiles_c = tl.cdiv(C, BLOCK_K)
    k0 = (tile // tiles_c) * BLOCK_N
    c0 = (tile % tiles_c) * BLOCK_K
    split = tl.program_id(1)
    begin = split * ROWS
    end = tl.minimum(begin + ROWS, M)
    local = tl.arange(0, BLOCK_M)
    # Line and pixel advance by counting: a division per row and step is dear.
    line = ((begin + local) // W) % H
    pixel = (begin + local) % W
    step_lines = (BLOCK_M // W) % H
    step_pixels = BLOCK_M % W

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in tl.range(begin, end, BLOCK_M):
        inside = reaches(first + local < end, line, pixel, down, right, H, W)
        row = tl.cast(first, tl.int64)
        g = load_shifted(dz, None, None, y, y_mean, y_a, y_b, y_c, row, inside, k0, K, False, BLOCK_N)
        row += down * W + right
        a = load_shifted(x, scale, shift, None, None, None, None, None, row, inside, c0, C, RELU, BLOCK_K)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
        pixel += step_pixels
        line += step_lines + (pixel >= W).to(tl.int32)
        pixel = tl.where(pixel >= W, pixel - W, pixel)
        line = tl.where(line >= H, line - H, line)

    k = k0 + tl.arange(0, BLOCK_N)
    c = c0 + tl.arange(0, BLOCK_K)
    at = k[:, None] * (9 * C) + (tap * C + c)[None, :]
    to = partials + split.to(tl.int64) * K * (9 * C) + at
    tl.store(to, acc, mask=(k < K)[:, None] & (c < C)[None, :])


Described = Callable[..., Tensor | TensorDescriptor | None]


def _tensor_access(dtype: torch.dtype, precision: str) -> Described:
    """``described``, or what leaves tensors as they are."""
    # Without tensor cores kernels multiply from registers, and some of these would spill.
    return (lambda t, *tile: t) if dtype == torch.float32 and precision == "ieee" else described


_CONV = Conv((1, 1), (1, 1), (1, 1), 1)


def supports(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether these kernels take the convolution of ``x`` ``[N, C, H, W]`` with ``weight``."""
    return (
        conv == _CONV
        and weight.dtype == x.dtype
        and tuple(weight.shape[1:]) == (x.shape[1], 3, 3)
        and x.numel() > 0
        and weight.shape[0] > 0
    )


def fprop(
    a: Operand, weight: Tensor, stats: bool, config: Config | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw output of the convolution, and with ``stats`` its batch statistics.

    Args:
        a (Operand[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last. A pending activation is rounded to this dtype.
        weight (Tensor[K, C, 3, 3]): in the dtype of ``a``; dense in channels_last, or it is copied.
    Returns:
        y ``[N, K, H, W]`` in channels_last; mean and biased variance ``[K]`` in fp32 of y as stored, or None.
    Numerics: accumulates in fp32, rounds once at the store; statistics are exact two-pass within a tile, tiles merge with
        Chan's formula in float64; the same bits on every run.
    Traffic: reads a (nine times, eight of them from L2) and the filter, writes y.
    """
    y, partials, rows = _convolve("fprop3x3", a, weight, False, stats, None, config)
    if partials is None:
        return y, None, None
    mean, var = merge_moments(partials, rows_of(y.shape), rows)
    return y, mean, var


def dgrad(
    dy: Gradient, weight: Tensor, below: Below | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient at the convolution's input; with ``below``, behind the batch norm and ReLU in front of it.

    Args:
        dy (Tensor[N, K, H, W] or PendingGrad): dense in channels_last. A pending gradient is rounded to its dtype.
        weight (Tensor[K, C, 3, 3]): in the dtype of ``dy``; dense in channels_last, or it is copied.
        below: of the shape ``[N, C, H, W]``.
    Returns:
        dx ``[N, C, H, W]``, None, None; or with ``below`` dz, ``Σ dz`` and ``Σ dz·(y − mean)`` ``[C]`` in fp32, of dz as stored.
    Numerics: accumulates in fp32, rounds once at the store; partial sums of tiles meet in float64, in a fixed order. The ReLU
        passes the gradient where the activation, as rounded, is not ``<= 0``.
    Traffic: reads dy (both of its tensors), the filter and ``below.y``, writes dx.
    """
    dx, partials, _ = _convolve("dgrad3x3", dy, weight, True, False, below, config)
    if partials is None:
        return dx, None, None
    sum_dz, sum_dz_centred = merge_sums(partials)
    return dx, sum_dz, sum_dz_centred


def wgrad(dy: Gradient, a: Operand, config: Config | None = None) -> Tensor:
    """The gradient at the filter.

    Args:
        dy (Tensor[N, K, H, W] or PendingGrad), a (Operand[N, C, H, W]): of one dtype, dense in channels_last.
    Returns:
        Tensor[K, C, 3, 3] in fp32, dense in channels_last.
    Numerics: accumulates in fp32 over a split of the rows; the splits are summed in a fixed order.
    Traffic: reads dy and a (each again for every tap and every tile of the other's channels, from L2), writes a partial
        gradient per split and reads them.
    """
    dz, *pending = _unmasked(dy)
    x, scale, shift, relu = operand(a)
    (_, c, h, w), k, m = x.shape, dz.shape[1], rows_of(x.shape)
    precision = product_precision(x, exact=False)
    if config is None:
        flags = {"pending": scale is not None, "pending_grad": isinstance(dy, PendingGrad)}
        asked = shape_of(m, c, k, _CONV, precision, **flags) | {"h": h, "w": w}
        config = choose("wgrad3x3", asked, x.dtype, x.device)
    tiles = 9 * triton.cdiv(k, config.block_n) * triton.cdiv(c, config.block_k)
    splits, chunks = split(m, tiles, config.block_m, x.device)
    partials = torch.empty(splits, k, 9, c, dtype=torch.float32, device=x.device)
    y, *coefficients = pending
    gradient_tile, operand_tile = (config.block_m, config.block_n), (config.block_m, config.block_k)
    access = _tensor_access(x.dtype, precision)
    wgrad3x3_kernel[(tiles, splits)](
        access(dz, *gradient_tile), access(y, *gradient_tile), *coefficients,
        access(x, *operand_tile), scale, shift, partials, m, h, w, c, k, chunks * config.block_m,
        RELU=relu, PRECISION=precision, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **options(config),
    )  # fmt: skip
    return partials.sum(0).view(k, 3, 3, c).permute(0, 3, 1, 2)


def _unmasked(dy: Gradient) -> tuple[Tensor | None, ...]:
    """dz, y, mean, a, b, c."""
    dz, mask, *pending = gradient(dy)
    if mask is not None:
        raise ValueError("dy: expected a gradient without a mask: these kernels read none")
    return dz, *pending


def _convolve(
    kernel: str,
    a: Operand | PendingGrad,
    weight: Tensor,
    backward: bool,
    stats: bool,
    below: Below | None,
    config: Config | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Launches ``conv3x3_kernel``: its output, its partials and the rows of a tile."""
    pending: Sequence[Tensor | None] = (None,) * 5
    if isinstance(a, PendingGrad):
        (x, *pending), scale, shift, relu = _unmasked(a), None, None, False
    else:
        x, scale, shift, relu = operand(a)
    (n, c, h, w), k, m = x.shape, weight.shape[1 if backward else 0], rows_of(x.shape)
    precision = product_precision(x, exact=False)
    if config is None:
        flags = {"pending": scale is not None, "pending_grad": isinstance(a, PendingGrad), "below": below is not None}
        inputs, outputs = (k, c) if backward else (c, k)  # of the forward convolution
        asked = shape_of(m, inputs, outputs, _CONV, precision, **flags, stats=stats) | {"h": h, "w": w}
        config = choose(kernel, asked, x.dtype, x.device)
    tiles = triton.cdiv(m, config.block_m)
    out = empty(x, (n, k, h, w))
    partials = None
    if stats or below is not None:
        partials = torch.empty(tiles, 2, k, dtype=torch.float32, device=x.device)
    operand_tile, out_tile = (config.block_m, config.block_k), (config.block_m, config.block_n)
    filter_tile = (config.block_k, 1, config.block_n) if backward else (config.block_n, 1, config.block_k)
    filters = weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
    y, *coefficients = pending
    below_y, *below_vectors = front(below, x, out.shape)
    access = _tensor_access(x.dtype, precision)
    conv3x3_kernel[(tiles * triton.cdiv(k, config.block_n),)](
        access(x, *operand_tile), scale, shift, access(y, *operand_tile), *coefficients,
        access(filters, *filter_tile), access(out, *out_tile), partials,
        access(below_y, *out_tile), *below_vectors,
        m, h, w, c, k,
        RELU=relu, BACKWARD=backward, BELOW_RELU=below is not None and below.relu,
        PRECISION=precision, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **options(config),
    )  # fmt: skip
    return out, partials, config.block_m
