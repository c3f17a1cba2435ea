"""3×3 convolutions of stride 1 and padding 1, fused with the batch norms around them: implicit products on shifted rows.

An activation dense in channels_last is the matrix ``[M, C]``, ``M = N·H·W``. Filter tap ``(r, s)`` of output row m reads input
row ``m + (r − 1)·W + (s − 1)``, so the convolution is nine products of shifted tiles with ``[C, K]`` slices of the filter. Where
the tap leaves the image, the shifted row is a pixel of another line or image (or lies outside the tensor): it is not read, and
counts as 0 *after* whatever is applied to the operand while it is loaded.

The loop over taps is unrolled, around a loop over tiles of channels. FLAT makes one loop of both, so that its pipeline does
not drain nine times. It counts taps up: a flat loop that divides to tell taps from channels is miscompiled by Triton at eight
warps (https://github.com/pytorch/pytorch/issues/173068).
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..kernels import Conv, Operand, Pending
from . import tuning
from .cost import describe
from .language import passes, relu, tile_moments
from .operands import Below, PendingGrad, check_dense, source


@triton.jit
def load_operand(
    x, y, scale, shift, slope, mean, at, columns, width, inside,
    PENDING: tl.constexpr, GRAD: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Tile of an operand at offsets ``at`` ``[rows, columns]`` of a matrix of row length ``width``, in the dtype of ``x``.

    Plain: ``x``. PENDING: ``act(scale·x + shift)``. GRAD: ``scale·x + slope·(y − mean) + shift``. Zero in rows that are not
    ``inside``, whatever lies there, and in columns beyond ``width``.
    """
    exists = columns < width
    valid = inside[:, None] & exists[None, :]
    tile = tl.load(x + at, mask=valid, other=0.0)
    if PENDING or GRAD:
        dtype = tile.dtype
        scales = tl.load(scale + columns, mask=exists, other=0.0)[None, :]
        shifts = tl.load(shift + columns, mask=exists, other=0.0)[None, :]
        z = tile.to(tl.float32) * scales + shifts
        if GRAD:
            slopes = tl.load(slope + columns, mask=exists, other=0.0)[None, :]
            means = tl.load(mean + columns, mask=exists, other=0.0)[None, :]
            centred = tl.load(y + at, mask=valid, other=0.0).to(tl.float32) - means
            # Frozen statistics have slope 0 and a gradient that does not depend on y: 0·NaN must not enter.
            z += tl.where(slopes == 0, 0.0, centred) * slopes
        if RELU:
            z = relu(z)
        tile = tl.where(inside[:, None], z, 0.0).to(dtype)
    return tile


@triton.jit
def reaches(exists, line, pixel, down, right, H, W):
    """Which rows ``(line, pixel)`` have a pixel ``down`` lines below and ``right`` of them, in the same image."""
    return exists & (line + down >= 0) & (line + down < H) & (pixel + right >= 0) & (pixel + right < W)


@triton.jit
def multiply_tap(
    acc, x, x_y, scale, shift, slope, mean, filters, first, exists, line, pixel, n,
    tap, down, right, c0, H, W, C, K,
    PENDING: tl.constexpr, GRAD: tl.constexpr, RELU: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of one tap, ``down`` and ``right``, and the channels from ``c0`` on."""
    inside = reaches(exists, line, pixel, down, right, H, W)
    origin = (first.to(tl.int64) + down * W + right) * C
    c = c0 + tl.arange(0, BLOCK_K)
    a = load_operand(
        x + origin, x_y + origin if GRAD else x_y, scale, shift, slope, mean,
        tl.arange(0, BLOCK_M)[:, None] * C + c[None, :], c, C, inside, PENDING, GRAD, RELU,
    )  # fmt: skip
    if BACKWARD:
        at = c[:, None] * (9 * K) + ((8 - tap) * K + n)[None, :]
    else:
        at = n[None, :] * (9 * C) + (tap * C + c)[:, None]
    b = tl.load(filters + at, mask=(c < C)[:, None] & (n < K)[None, :], other=0.0)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def conv3x3_kernel(
    x, x_y, scale, shift, slope, mean,
    filters, out, partials,
    below_y, below_mean, below_scale, below_shift,
    M, H, W, C, K,
    PENDING: tl.constexpr, GRAD: tl.constexpr, RELU: tl.constexpr,
    BACKWARD: tl.constexpr, STATS: tl.constexpr, BELOW: tl.constexpr, BELOW_RELU: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[m, k] = Σ_{tap, c} operand[m + offset(tap), c] · filter(tap)[c, k]``: a tile ``[BLOCK_M, BLOCK_N]`` per program.

    The operand ``[M, C]`` is that of ``load_operand``. ``filters`` is ``[K, 9, C]``; with BACKWARD it is ``[C, 9, K]``, that
    of the convolution whose input gradient this is, read flipped and transposed.
    STATS: mean and sum of squared deviations of the tile's values as stored, to ``partials[tile, 2, K]``.
    BELOW: gradient of the ReLU at ``below_scale·below_y + below_shift`` on the way out (BELOW_RELU), and ``Σ out`` and
    ``Σ out·(below_y − below_mean)`` of the values as stored, to ``partials[tile, 2, K]``.
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    first = tile_m * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    line = (rows // W) % H
    pixel = rows % W
    exists = rows < M
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLAT:
        tap = 0
        down = -1
        right = -1
        c0 = 0
        for _ in tl.range(9 * tl.cdiv(C, BLOCK_K)):
            acc = multiply_tap(
                acc, x, x_y, scale, shift, slope, mean, filters, first, exists, line, pixel, n,
                tap, down, right, c0, H, W, C, K, PENDING, GRAD, RELU, BACKWARD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            c0 += BLOCK_K
            last = c0 >= C
            c0 = tl.where(last, 0, c0)
            tap += last.to(tl.int32)
            right += last.to(tl.int32)
            down += (right > 1).to(tl.int32)
            right = tl.where(right > 1, -1, right)
    else:
        for tap in tl.static_range(9):
            for c0 in tl.range(0, C, BLOCK_K):
                acc = multiply_tap(
                    acc, x, x_y, scale, shift, slope, mean, filters, first, exists, line, pixel, n,
                    tap, tap // 3 - 1, tap % 3 - 1, c0, H, W, C, K, PENDING, GRAD, RELU, BACKWARD, BLOCK_M, BLOCK_K,
                )  # fmt: skip

    valid = exists[:, None] & (n < K)[None, :]
    at = tl.arange(0, BLOCK_M)[:, None] * K + n[None, :]
    origin = first.to(tl.int64) * K
    if BELOW:
        y = tl.load(below_y + origin + at, mask=valid, other=0.0).to(tl.float32)
        if BELOW_RELU:
            scales = tl.load(below_scale + n, mask=n < K, other=0.0)[None, :]
            shifts = tl.load(below_shift + n, mask=n < K, other=0.0)[None, :]
            # Rounded as the activation was: what became 0 then passes no gradient.
            z = (y * scales + shifts).to(out.dtype.element_ty).to(tl.float32)
            acc = tl.where(passes(z), acc, 0.0)
    stored = acc.to(out.dtype.element_ty)
    tl.store(out + origin + at, stored, mask=valid)
    if STATS or BELOW:
        values = stored.to(tl.float32)
        if STATS:
            one, two = tile_moments(values, valid, tl.minimum(M - first, BLOCK_M).to(tl.float32))
        else:
            means = tl.load(below_mean + n, mask=n < K, other=0.0)[None, :]
            one = tl.sum(tl.where(valid, values, 0.0), 0)
            two = tl.sum(tl.where(valid, values * (y - means), 0.0), 0)
        to = partials + tile_m.to(tl.int64) * (2 * K) + n
        tl.store(to, one, mask=n < K)
        tl.store(to + K, two, mask=n < K)


@triton.jit
def wgrad3x3_kernel(
    dy, dy_y, dy_scale, dy_shift, dy_slope, dy_mean,
    x, scale, shift, partials,
    M, H, W, C, K, ROWS,
    GRAD: tl.constexpr, PENDING: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partials[split, k, tap, c] = Σ_m dy[m, k] · a[m + offset(tap), c]`` over the ROWS rows of a split.

    One program per (tap, ``BLOCK_N`` of K, ``BLOCK_K`` of C, split): neighbouring programs are taps of the same tiles. ROWS is a
    multiple of BLOCK_M, the rows of one step.
    """
    tap = tl.program_id(0) % 9
    tile = tl.program_id(0) // 9
    down = tap // 3 - 1
    right = tap % 3 - 1
    tiles_c = tl.cdiv(C, BLOCK_K)
    k = (tile // tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tile % tiles_c) * BLOCK_K + tl.arange(0, BLOCK_K)
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
        origin = tl.cast(first, tl.int64) * K
        g = load_operand(
            dy + origin, dy_y + origin if GRAD else dy_y, dy_scale, dy_shift, dy_slope, dy_mean,
            local[:, None] * K + k[None, :], k, K, inside, False, GRAD, False,
        )  # fmt: skip
        origin = (tl.cast(first, tl.int64) + down * W + right) * C
        a = load_operand(
            x + origin, x, scale, shift, scale, shift,
            local[:, None] * C + c[None, :], c, C, inside, PENDING, False, RELU,
        )  # fmt: skip
        acc = tl.dot(tl.trans(g), a, acc, input_precision="ieee")
        pixel += step_pixels
        line += step_lines + (pixel >= W).to(tl.int32)
        pixel = tl.where(pixel >= W, pixel - W, pixel)
        line = tl.where(line >= H, line - H, line)

    at = k[:, None] * (9 * C) + (tap * C + c)[None, :]
    to = partials + split.to(tl.int64) * K * (9 * C) + at
    tl.store(to, acc, mask=(k < K)[:, None] & (c < C)[None, :])


def supports(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether these kernels take the convolution of ``x`` ``[N, C, H, W]`` with ``weight`` ``[K, C, 3, 3]``."""
    return (
        conv == Conv((1, 1), (1, 1), (1, 1), 1)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and x.dim() == 4
        and tuple(weight.shape[1:]) == (x.shape[1], 3, 3)
        and x.numel() > 0
        and weight.shape[0] > 0
        and x.numel() // x.shape[1] < 2**31 - 2**16  # rows are counted in 32 bits, elements in 64
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def fprop(
    a: Operand, weight: Tensor, stats: bool, config: tuning.Config | None = None, flat: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw output of the convolution, and with ``stats`` its batch statistics.

    Args:
        a (Operand[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last. A pending activation is rounded to this dtype.
        weight (Tensor[K, C, 3, 3]): in the dtype of ``a``; dense in channels_last, or it is copied.
        flat: one loop over taps and channels.
    Returns:
        y ``[N, K, H, W]`` in channels_last; mean and biased variance ``[K]`` in fp32 of y as stored, or None.
    Numerics: accumulates in fp32, rounds once at the store; statistics are exact two-pass within a tile, tiles merge with
        Chan's formula in float64; the same bits on every run.
    Traffic: reads a (nine times, eight of them from L2) and the filter, writes y.
    """
    x = check_dense(source(a))
    y, partials, block_m = _convolve("fprop3x3", a, weight, False, stats, None, config, flat)
    if partials is None:
        return y, None, None
    mean, var = _merge(partials, x.numel() // x.shape[1], block_m)
    return y, mean, var


def dgrad(
    dy: Tensor | PendingGrad,
    weight: Tensor,
    below: Below | None = None,
    config: tuning.Config | None = None,
    flat: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient at the convolution's input; with ``below``, behind the batch norm and ReLU in front of it.

    Args:
        dy (Tensor[N, K, H, W] or PendingGrad): dense in channels_last. A pending gradient is rounded to its dtype.
        weight (Tensor[K, C, 3, 3]): in the dtype of ``dy``; dense in channels_last, or it is copied.
        below: of the shape ``[N, C, H, W]``.
        flat: one loop over taps and channels.
    Returns:
        dx ``[N, C, H, W]``, None, None; or with ``below`` dz, ``Σ dz`` and ``Σ dz·(y − mean)`` ``[C]`` in fp32, of dz as stored.
    Numerics: accumulates in fp32, rounds once at the store; partial sums of tiles meet in float64, in a fixed order. The ReLU
        passes the gradient where the activation, as rounded, is not ``<= 0``.
    Traffic: reads dy (both of its tensors), the filter and ``below.y``, writes dx.
    """
    dx, partials, _ = _convolve("dgrad3x3", dy, weight, True, False, below, config, flat)
    if partials is None:
        return dx, None, None
    sum_dz, sum_dz_centred = partials.sum(0, dtype=torch.float64).float().unbind()
    return dx, sum_dz, sum_dz_centred


def wgrad(dy: Tensor | PendingGrad, a: Operand, config: tuning.Config | None = None) -> Tensor:
    """The gradient at the filter.

    Args:
        dy (Tensor[N, K, H, W] or PendingGrad), a (Operand[N, C, H, W]): of one dtype, dense in channels_last.
    Returns:
        Tensor[K, C, 3, 3] in fp32, dense in channels_last.
    Numerics: accumulates in fp32 over a split of the rows; the splits are summed in a fixed order.
    Traffic: reads dy and a (each again for every tap and every tile of the other's channels, from L2), writes a partial
        gradient per split and reads them.
    """
    g, grad_arguments, x = *_gradient(dy), check_dense(source(a))
    (n, c, h, w), k = x.shape, g.shape[1]
    m = n * h * w
    if config is None:
        config = tuning.choose("wgrad3x3", {"m": m, "c": c, "k": k, "h": h, "w": w}, x.dtype, x.device)
    tiles = 9 * triton.cdiv(k, config.block_n) * triton.cdiv(c, config.block_k)
    steps = triton.cdiv(m, config.block_m)
    rows = triton.cdiv(steps, _splits(tiles, steps, x.device)) * config.block_m
    splits = triton.cdiv(m, rows)
    partials = torch.empty(splits, k, 9, c, dtype=torch.float32, device=x.device)
    scale, shift, act = (a.scale, a.shift, a.relu) if isinstance(a, Pending) else (None, None, False)
    wgrad3x3_kernel[(tiles, splits)](
        g, *grad_arguments, x, scale, shift, partials, m, h, w, c, k, rows,
        GRAD=isinstance(dy, PendingGrad), PENDING=isinstance(a, Pending), RELU=act,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    dweight = partials[0] if splits == 1 else partials.sum(0)
    return dweight.view(k, 3, 3, c).permute(0, 3, 1, 2)


def _gradient(dy: Tensor | PendingGrad) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The tensor that is read, and the kernels' further arguments ``y, scale, shift, slope, mean``."""
    if isinstance(dy, PendingGrad):
        return check_dense(dy.dz), (check_dense(dy.y), dy.a, dy.c, dy.b, dy.mean)
    return check_dense(dy), (None,) * 5


def _convolve(
    kernel: str,
    a: Operand | PendingGrad,
    weight: Tensor,
    backward: bool,
    stats: bool,
    below: Below | None,
    config: tuning.Config | None,
    flat: bool,
) -> tuple[Tensor, Tensor | None, int]:
    """Launches ``conv3x3_kernel``: its output, its partials and the rows of a tile."""
    arguments: tuple[Tensor | None, ...]
    if isinstance(a, Pending):
        x, arguments = check_dense(a.y), (None, a.scale, a.shift, None, None)
    else:
        x, arguments = _gradient(a)
    (n, c, h, w), k, m = x.shape, weight.shape[1 if backward else 0], x.numel() // x.shape[1]
    if config is None:
        shape = {"m": m, "c": k if backward else c, "k": c if backward else k, "h": h, "w": w}
        config = tuning.choose(kernel, shape, x.dtype, x.device)
    tiles = triton.cdiv(m, config.block_m)
    out = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partials = None
    if stats or below is not None:
        partials = torch.empty(tiles, 2, k, dtype=torch.float32, device=x.device)
    vectors = (None,) * 4 if below is None else (check_dense(below.y), below.mean, below.scale, below.shift)
    conv3x3_kernel[(tiles * triton.cdiv(k, config.block_n),)](
        x, *arguments, weight.permute(0, 2, 3, 1).contiguous(), out, partials, *vectors, m, h, w, c, k,
        PENDING=isinstance(a, Pending), GRAD=isinstance(a, PendingGrad), RELU=isinstance(a, Pending) and a.relu,
        BACKWARD=backward, STATS=stats, BELOW=below is not None, BELOW_RELU=below is not None and below.relu, FLAT=flat,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out, partials, config.block_m


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """In how many parts the rows of wgrad go, so that two programs run on every multiprocessor, none with under four steps."""
    programs = 2 * describe(device).sms if device.type == "cuda" else 16
    return max(1, min(programs // tiles, steps // 4))


def _merge(partials: Tensor, m: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in fp32 from ``[tiles, 2, K]``: means and sums of squared deviations of ``block_m`` rows each,
    fewer in the last tile. Chan's formula for all tiles at once, in float64."""
    means, squares = partials.double().unbind(1)
    counts = torch.full((len(partials), 1), block_m, dtype=torch.float64, device=partials.device)
    counts[-1] = m - (len(partials) - 1) * block_m
    mean = (counts * means).sum(0) / m
    var = (squares + counts * (means - mean).square()).sum(0) / m
    return mean.float(), var.float()
