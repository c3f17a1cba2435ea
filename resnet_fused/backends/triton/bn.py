"""Batch norm with its activation: statistics, forward, and the two passes of the backward.

Activations are matrices ``[M, C]``; a program works on tiles ``[BLOCK_M, BLOCK_N]``, so that channel vectors are loaded once a
tile and memory is touched in 16-byte pieces where C is a multiple of 8. A reduction gives each program a fixed range of rows,
which depends on the shape alone: it keeps one sum for each place of its tile, folds them when its rows are done, and stores
partial results, which a second kernel merges in float64 in a fixed order.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from . import tuning
from .configs import Config
from .language import affine_in_centred, load_mask, load_vector, passes, relu, store_mask
from .launching import rows_of
from .merging import merge_moments, merge_sums
from .operands import check_dense
from .residual import new_mask, no_mask, pack_mask

# How dz follows from grad: as it is, where the mask, where the activation formed again from x lets it pass.
OPEN, MASKED, RECOMPUTED = 0, 1, 2

PROGRAMS = 512  # of a reduction: four to a multiprocessor of the largest GPUs, and few enough to merge
_MOST_STEPS = 64  # tiles of one program, whose sums are in float32


@triton.jit
def row_pitch(C, ALIGNED: tl.constexpr):
    """C; the compiler sees that it is a multiple of 8 where it is, so that rows begin on 16-byte boundaries."""
    if ALIGNED:
        return C // 8 * 8
    else:
        return C


@triton.jit
def tile_columns(tile, pitch, BLOCK_N: tl.constexpr):
    """Channels of tile number ``tile``, and which exist."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return columns, columns < pitch


@triton.jit
def tile_of(start, stop, columns, exists, pitch, BLOCK_M: tl.constexpr):
    """Rows (int64) from ``start``; which elements of the tile are in front of row ``stop``, and their offsets."""
    rows = start + tl.arange(0, BLOCK_M)
    return rows, (rows < stop)[:, None] & exists[None, :], rows[:, None] * pitch + columns[None, :]


@triton.jit
def moments_kernel(
    x, partials, M, C, steps, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of ``steps`` tiles of x ``[M, C]``, to ``partials[program, 2, C]`` in float64.

    Sums are taken about k, the mean of the first tile: ``Σ(x − µ)² = Σ(x − k)² − n(k − µ)²``. The first tile is one of the
    ``steps`` summed, so ``Σ(x − µ)²`` is at least ``BLOCK_M·(k − µ)²`` whatever the data: the difference costs at most a factor
    of ``steps`` in the last place, and none where tiles have similar means.
    """
    tiles_n = tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    pitch = row_pitch(C, ALIGNED)
    columns, exists = tile_columns(tl.program_id(0) % tiles_n, pitch, BLOCK_N)
    start = part.to(tl.int64) * BLOCK_M * steps
    stop = tl.minimum(start + BLOCK_M * steps, M)
    _, valid, at = tile_of(start, stop, columns, exists, pitch, BLOCK_M)
    tile = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    k = tl.sum(tile, 0) / tl.minimum(stop - start, BLOCK_M).to(tl.float32)
    centred = tl.where(valid, tile - k[None, :], 0.0)
    total, square = centred, centred * centred
    for i in tl.range(1, tl.cdiv(stop - start, BLOCK_M).to(tl.int32)):
        _, valid, at = tile_of(start + i * BLOCK_M, stop, columns, exists, pitch, BLOCK_M)
        centred = tl.where(valid, tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - k[None, :], 0.0)
        total += centred
        square += centred * centred
    count = (stop - start).to(tl.float64)
    offset = tl.sum(total.to(tl.float64), 0) / count
    deviation = tl.sum(square.to(tl.float64), 0) - offset * offset * count
    to = partials + part.to(tl.int64) * 2 * C + columns
    tl.store(to, k.to(tl.float64) + offset, mask=exists)
    tl.store(to + C, tl.where(deviation < 0, 0.0, deviation), mask=exists)


@triton.jit
def bn_act_kernel(
    x, scale, shift, residual, out, mask, M, C,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, SAVE_MASK: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out = act(scale·x + shift [+ residual])`` of a tile of ``[M, C]``; SAVE_MASK (needs ALIGNED): its bits too.

    ``out`` may be ``x``.
    """
    tiles_n = tl.cdiv(C, BLOCK_N)
    start = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    tile_n = tl.program_id(0) % tiles_n
    pitch = row_pitch(C, ALIGNED)
    columns, exists = tile_columns(tile_n, pitch, BLOCK_N)
    rows, valid, at = tile_of(start, M, columns, exists, pitch, BLOCK_M)
    z = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * load_vector(scale, columns, pitch)
    z = z + load_vector(shift, columns, pitch)
    if HAS_RESIDUAL:
        z = z + tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    # The mask belongs to the value as stored: what rounds to 0 stops the gradient.
    stored = z.to(out.dtype.element_ty)
    if RELU:
        wide = stored.to(tl.float32)
        if SAVE_MASK:
            store_mask(mask, rows, tile_n * BLOCK_N, pitch, passes(wide), rows < M, BLOCK_N)
        stored = relu(wide).to(out.dtype.element_ty)
    elif SAVE_MASK:
        store_mask(mask, rows, tile_n * BLOCK_N, pitch, passes(stored.to(tl.float32)), rows < M, BLOCK_N)
    tl.store(out + at, stored, mask=valid)


@triton.jit
def gate(
    grad, x, mask, scale, shift, rows, first, pitch, valid, dtype: tl.constexpr,
    GATE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz of a tile: ``grad`` where the ReLU let the activation pass. RECOMPUTED forms it as ``bn_act_kernel`` did, from ``x`` and
    the tile's ``scale`` and ``shift`` ``[1, BLOCK_N]``."""
    if GATE == 1:
        return tl.where(load_mask(mask, rows, first, pitch, valid, BLOCK_N, ALIGNED), grad, 0.0)
    elif GATE == 2:
        return tl.where(passes((x * scale + shift).to(dtype).to(tl.float32)), grad, 0.0)
    else:
        return grad


@triton.jit
def bn_act_backward_reduce_kernel(
    grad, x, mask, mean, scale, shift, activation, partials, M, C, steps,
    GATE: tl.constexpr, RELU: tl.constexpr, WANT_ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``Σ dz`` and ``Σ dz·(x − mean)`` over ``steps`` tiles, to ``partials[program, 2, C]`` in float32; WANT_ACTIVATION: the
    activation too."""
    tiles_n = tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    pitch = row_pitch(C, ALIGNED)
    columns, exists = tile_columns(tile_n, pitch, BLOCK_N)
    start = part.to(tl.int64) * BLOCK_M * steps
    stop = tl.minimum(start + BLOCK_M * steps, M)
    means = load_vector(mean, columns, pitch)
    scales = load_vector(scale, columns, pitch)
    shifts = load_vector(shift, columns, pitch)
    dtype: tl.constexpr = x.dtype.element_ty
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz_centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, tl.cdiv(stop - start, BLOCK_M).to(tl.int32)):
        rows, valid, at = tile_of(start + i * BLOCK_M, stop, columns, exists, pitch, BLOCK_M)
        g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        tile = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        dz = gate(g, tile, mask, scales, shifts, rows, tile_n * BLOCK_N, pitch, valid, dtype, GATE, ALIGNED, BLOCK_N)
        sum_dz += dz
        sum_dz_centred += dz * tl.where(valid, tile - means, 0.0)
        if WANT_ACTIVATION:
            z = (tile * scales + shifts).to(dtype).to(tl.float32)
            tl.store(activation + at, (relu(z) if RELU else z).to(dtype), mask=valid)
    to = partials + part.to(tl.int64) * 2 * C + columns
    tl.store(to, tl.sum(sum_dz, 0), mask=exists)
    tl.store(to + C, tl.sum(sum_dz_centred, 0), mask=exists)


@triton.jit
def bn_act_backward_kernel(
    grad, x, mask, mean, scale, shift, a, b, c, dx, M, C,
    GATE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dx = a·dz + b·(x − mean) + c`` of a tile of ``[M, C]``; ``dx`` may be ``grad``."""
    tiles_n = tl.cdiv(C, BLOCK_N)
    start = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    tile_n = tl.program_id(0) % tiles_n
    pitch = row_pitch(C, ALIGNED)
    columns, exists = tile_columns(tile_n, pitch, BLOCK_N)
    rows, valid, at = tile_of(start, M, columns, exists, pitch, BLOCK_M)
    g = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    tile = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    scales, shifts = load_vector(scale, columns, pitch), load_vector(shift, columns, pitch)
    dtype: tl.constexpr = x.dtype.element_ty
    dz = gate(g, tile, mask, scales, shifts, rows, tile_n * BLOCK_N, pitch, valid, dtype, GATE, ALIGNED, BLOCK_N)
    means, a_of = load_vector(mean, columns, pitch), load_vector(a, columns, pitch)
    b_of, c_of = load_vector(b, columns, pitch), load_vector(c, columns, pitch)
    tl.store(dx + at, affine_in_centred(dz, tile, means, a_of, b_of, c_of).to(dtype), mask=valid)


def tile_options(kernel: str, m: int, x: Tensor, config: Config | None, **flags: bool) -> dict:
    """Constants and options of a kernel on tiles of m rows by the channels of ``x``; no tile is much wider than they are."""
    c = x.shape[1]
    shape = {"m": m, "c": c} | {name: int(on) for name, on in flags.items()}
    config = config or tuning.choose(kernel, shape, x.dtype, x.device)
    block_n = min(config.block_n, triton.next_power_of_2(c))
    block_m = config.block_m * (config.block_n // block_n)
    return {"ALIGNED": c % 8 == 0, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": config.warps}


def steps_of(tiles: int, columns: int) -> int:
    """How many of ``tiles`` one program of a reduction takes, where ``columns`` programs share the channels."""
    return min(_MOST_STEPS, triton.cdiv(tiles, max(1, PROGRAMS // columns)))


def bn_stats(x: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` in float32 over N, H and W.

    Args:
        x (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last.
    Raises:
        ValueError: ``x`` is not dense in channels_last.
    Numerics: sums of deviations in float32 over at most 64 tiles for each place of a tile, folded and merged in float64 with
            Chan's formula; the same bits on every run.
    Traffic: reads 1 times x.numel() elements.
    """
    m, c = rows_of(check_dense(x).shape), x.shape[1]
    options = tile_options("bn_stats", m, x, config)
    columns = triton.cdiv(c, options["BLOCK_N"])
    steps = steps_of(triton.cdiv(m, options["BLOCK_M"]), columns)
    rows = steps * options["BLOCK_M"]
    partials = torch.empty((triton.cdiv(m, rows), 2, c), dtype=torch.float64, device=x.device)
    moments_kernel[(partials.shape[0] * columns,)](x, partials, m, c, steps, **options)
    return merge_moments(partials, m, rows)


def _bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, out: Tensor, mask: Tensor | None,
    config: Config | None,
) -> None:  # fmt: skip
    m, c = rows_of(check_dense(x).shape), x.shape[1]
    if residual is not None:
        check_dense(residual)
    options = tile_options("bn_act", m, x, config, residual=residual is not None, mask=mask is not None)
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(c, options["BLOCK_N"]),)
    bn_act_kernel[grid](
        x, scale, shift, x if residual is None else residual, out, out if mask is None else mask, m, c,
        HAS_RESIDUAL=residual is not None, RELU=relu, SAVE_MASK=mask is not None, **options,
    )  # fmt: skip


def bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool,
    *, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``act(scale·x + shift [+ residual])`` and its mask (empty unless ``save_mask``).

    Args:
        x, residual (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last.
        scale, shift (Tensor[C]): fp32.
    Raises:
        ValueError: an activation is not dense in channels_last.
    Numerics: computes in fp32, rounds once at the store; the mask is that of the value as stored.
    Traffic: reads x (and residual), writes 1 times x.numel() elements (and one bit each; where C is not a multiple of 8 a
        second kernel reads the output again for it).
    """
    out = torch.empty_like(x, memory_format=torch.channels_last)
    aligned = x.shape[1] % 8 == 0
    mask = new_mask(x) if save_mask and aligned else None
    _bn_act(x, scale, shift, residual, relu, out, mask, config)
    if save_mask and not aligned:
        mask = pack_mask(out)
    return out, no_mask(x) if mask is None else mask


def bn_act_(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, *, config: Config | None = None
) -> None:
    """``bn_act`` written over ``x``. Traffic: reads x (and residual), writes 1 times x.numel() elements."""
    _bn_act(x, scale, shift, residual, relu, x, None, config)


def _gate(mask: Tensor | None, relu: bool) -> int:
    return MASKED if mask is not None else RECOMPUTED if relu else OPEN


def bn_act_backward_reduce(
    grad: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, relu: bool,
    want_activation: bool, *, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``Σ dz`` and ``Σ dz·(x − mean)`` ``[C]`` in float32, and on demand the activation ``bn_act(x)`` (else empty).

    ``dz`` is ``grad`` where ``mask``; without a mask and with ``relu`` where the activation, formed again from x, lets it pass;
    without ``relu`` everywhere.

    Args:
        grad, x (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last.
        mean, scale, shift (Tensor[C]): fp32.
    Raises:
        ValueError: an activation is not dense in channels_last.
    Numerics: sums in float32 over at most 64 tiles, merged in float64; the same bits on every run.
    Traffic: reads 2 times x.numel() elements (and one bit each with a mask), writes the activation on demand.
    """
    m, c = rows_of(check_dense(x).shape), x.shape[1]
    flags = {"mask": mask is not None, "activation": want_activation}
    options = tile_options("bn_backward_reduce", m, check_dense(grad), config, **flags)
    columns = triton.cdiv(c, options["BLOCK_N"])
    steps = steps_of(triton.cdiv(m, options["BLOCK_M"]), columns)
    partials = torch.empty(
        (triton.cdiv(m, steps * options["BLOCK_M"]), 2, c), dtype=torch.float32, device=x.device
    )  # fmt: skip
    activation = torch.empty_like(x, memory_format=torch.channels_last) if want_activation else x.new_empty(0)
    bn_act_backward_reduce_kernel[(partials.shape[0] * columns,)](
        grad, x, grad if mask is None else mask, mean, scale, shift, activation, partials, m, c, steps,
        GATE=_gate(mask, relu), RELU=relu, WANT_ACTIVATION=want_activation, **options,
    )  # fmt: skip
    sum_dz, sum_dz_centred = merge_sums(partials)
    return sum_dz, sum_dz_centred, activation


def bn_act_backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, relu: bool,
    coefficients: tuple[Tensor, Tensor, Tensor], inplace: bool = False, *, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``dx = a·dz + b·(x − mean) + c``, dz as in ``bn_act_backward_reduce``; ``inplace`` writes it over ``grad``.

    Args:
        grad, x (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last.
        mean, scale, shift, and the coefficients a, b, c (Tensor[C]): fp32.
    Raises:
        ValueError: an activation is not dense in channels_last.
    Numerics: computes in fp32, rounds once at the store. Where b = 0, x does not count (nor does its NaN).
    Traffic: reads 2 (and one bit each with a mask), writes 1 times x.numel() elements.
    """
    m, c = rows_of(check_dense(x).shape), x.shape[1]
    options = tile_options("bn_backward", m, check_dense(grad), config, mask=mask is not None)
    dx = grad if inplace else torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(c, options["BLOCK_N"]),)
    bn_act_backward_kernel[grid](
        grad, x, grad if mask is None else mask, mean, scale, shift, *coefficients, dx, m, c,
        GATE=_gate(mask, relu), **options,
    )  # fmt: skip
    return dx
