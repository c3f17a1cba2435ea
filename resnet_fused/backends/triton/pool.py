"""The stem's max pooling (3×3, stride 2, padding 1) behind batch norm and ReLU: the activation is never stored.

Tiles are pixels of one image by channels, so that coordinates take 32-bit divisions by a line's width and no others.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..operands import Conv
from .bn import row_pitch, steps_of, tile_columns, tile_options
from .configs import Config
from .language import affine_in_centred, load_vector
from .merging import merge_sums
from .operands import check_dense

_WINDOW = Conv(stride=(2, 2), padding=(1, 1))


@triton.jit
def image_tile(tile, pixels, BLOCK_M: tl.constexpr):
    """Of tile number ``tile`` of images with ``pixels`` pixels: the image (int64), its pixels ``[BLOCK_M]``, which exist."""
    tiles = tl.cdiv(pixels, BLOCK_M)
    local = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tile // tiles).to(tl.int64), local, local < pixels


@triton.jit
def bn_relu_maxpool_kernel(
    x, scale, shift, out, index, H, W, P, Q, C,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out = maxpool(relu(scale·x + shift))`` and the winners, of a tile of output pixels.

    Values are compared as rounded to the dtype of x: what stock PyTorch would have stored and pooled. A later maximum must
    be greater, a later NaN always wins. The ReLU is where the comparison begins: at 0, with no winner.
    """
    pitch = row_pitch(C, ALIGNED)
    tiles_n = tl.cdiv(C, BLOCK_N)
    image, local, exists = image_tile(tl.program_id(0) // tiles_n, P * Q, BLOCK_M)
    columns, inside_n = tile_columns(tl.program_id(0) % tiles_n, pitch, BLOCK_N)
    scales, shifts = load_vector(scale, columns, pitch), load_vector(shift, columns, pitch)
    p, q = local // Q, local % Q
    dtype: tl.constexpr = x.dtype.element_ty
    best = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_N), 255, tl.int32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            h, w = 2 * p + (r - 1), 2 * q + (s - 1)
            inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            row = image * (H * W) + (h * W + w)
            at = row[:, None] * pitch + columns[None, :]
            tile = tl.load(x + at, mask=inside[:, None] & inside_n[None, :], other=0.0).to(tl.float32)
            z = tl.where(inside[:, None], tile * scales + shifts, 0.0)
            value = z.to(dtype).to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            winner = tl.where(better, 3 * r + s, winner)
    row = image * (P * Q) + local
    at = row[:, None] * pitch + columns[None, :]
    valid = exists[:, None] & inside_n[None, :]
    tl.store(out + at, best.to(dtype), mask=valid)
    tl.store(index + at, winner.to(tl.uint8), mask=valid)


# The backward takes input pixels by fours: (2p, 2q), (2p, 2q + 1), (2p + 1, 2q), (2p + 1, 2q + 1) lie in windows (p, q) to
# (p + 1, q + 1) only, so a tile of output pixels and its neighbours have all gradients that reach four times as many pixels.


@triton.jit
def window(grad, index, image, p, q, columns, valid, P, Q, pitch):
    """Gradients and winners of windows (p, q); where there is no window, no winner."""
    at = (image * (P * Q) + (p * Q + q))[:, None] * pitch + columns[None, :]
    there = valid & ((p < P) & (q < Q))[:, None]
    winner = tl.load(index + at, mask=there, other=255).to(tl.int32)
    return tl.load(grad + at, mask=there, other=0.0).to(tl.float32), winner


@triton.jit
def four_windows(grad, index, image, p, q, columns, valid, P, Q, pitch):
    g00, k00 = window(grad, index, image, p, q, columns, valid, P, Q, pitch)
    g01, k01 = window(grad, index, image, p, q + 1, columns, valid, P, Q, pitch)
    g10, k10 = window(grad, index, image, p + 1, q, columns, valid, P, Q, pitch)
    g11, k11 = window(grad, index, image, p + 1, q + 1, columns, valid, P, Q, pitch)
    return g00, k00, g01, k01, g10, k10, g11, k11


@triton.jit
def scattered(g00, k00, g01, k01, g10, k10, g11, k11, dh: tl.constexpr, dw: tl.constexpr):
    """dz at pixels (2p + dh, 2q + dw): the gradients of the windows that they have won."""
    dz = tl.where(k00 == 3 * (1 + dh) + 1 + dw, g00, 0.0)
    if dw == 1:
        dz += tl.where(k01 == 3 * (1 + dh), g01, 0.0)
    if dh == 1:
        dz += tl.where(k10 == 1 + dw, g10, 0.0)
    if dh == 1 and dw == 1:
        dz += tl.where(k11 == 0, g11, 0.0)
    return dz


@triton.jit
def pixel_of_four(image, p, q, columns, valid, H, W, pitch, dh: tl.constexpr, dw: tl.constexpr):
    """Offsets of pixels (2p + dh, 2q + dw), and which elements exist."""
    h, w = 2 * p + dh, 2 * q + dw
    at = (image * (H * W) + (h * W + w))[:, None] * pitch + columns[None, :]
    return at, valid & ((h < H) & (w < W))[:, None]


@triton.jit
def bn_relu_maxpool_backward_reduce_kernel(
    grad, index, x, mean, partials, N, H, W, P, Q, C, steps,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``Σ dz`` and ``Σ dz·(x − mean)`` over ``steps`` tiles, to ``partials[program, 2, C]`` in float32."""
    pitch = row_pitch(C, ALIGNED)
    tiles_n = tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    columns, inside_n = tile_columns(tl.program_id(0) % tiles_n, pitch, BLOCK_N)
    means = load_vector(mean, columns, pitch)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz_centred = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(part * steps, tl.minimum((part + 1) * steps, N * tl.cdiv(P * Q, BLOCK_M))):
        image, local, exists = image_tile(tile, P * Q, BLOCK_M)
        p, q = local // Q, local % Q
        valid = exists[:, None] & inside_n[None, :]
        g00, k00, g01, k01, g10, k10, g11, k11 = four_windows(grad, index, image, p, q, columns, valid, P, Q, pitch)
        for dh in tl.static_range(2):
            for dw in tl.static_range(2):
                at, there = pixel_of_four(image, p, q, columns, valid, H, W, pitch, dh, dw)
                value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
                dz = scattered(g00, k00, g01, k01, g10, k10, g11, k11, dh, dw)
                sum_dz += dz
                sum_dz_centred += dz * tl.where(there, value - means, 0.0)
    to = partials + part.to(tl.int64) * 2 * C + columns
    tl.store(to, tl.sum(sum_dz, 0), mask=inside_n)
    tl.store(to + C, tl.sum(sum_dz_centred, 0), mask=inside_n)


@triton.jit
def bn_relu_maxpool_backward_kernel(
    grad, index, x, mean, a, b, c, dx, H, W, P, Q, C,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dx = a·dz + b·(x − mean) + c`` of the pixels of a tile."""
    pitch = row_pitch(C, ALIGNED)
    tiles_n = tl.cdiv(C, BLOCK_N)
    image, local, exists = image_tile(tl.program_id(0) // tiles_n, P * Q, BLOCK_M)
    p, q = local // Q, local % Q
    columns, inside_n = tile_columns(tl.program_id(0) % tiles_n, pitch, BLOCK_N)
    means, a_of = load_vector(mean, columns, pitch), load_vector(a, columns, pitch)
    b_of, c_of = load_vector(b, columns, pitch), load_vector(c, columns, pitch)
    valid = exists[:, None] & inside_n[None, :]
    g00, k00, g01, k01, g10, k10, g11, k11 = four_windows(grad, index, image, p, q, columns, valid, P, Q, pitch)
    for dh in tl.static_range(2):
        for dw in tl.static_range(2):
            at, there = pixel_of_four(image, p, q, columns, valid, H, W, pitch, dh, dw)
            value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
            dz = scattered(g00, k00, g01, k01, g10, k10, g11, k11, dh, dw)
            tl.store(dx + at, affine_in_centred(dz, value, means, a_of, b_of, c_of).to(dx.dtype.element_ty), mask=there)


def _options(kernel: str, m: int, x: Tensor, config: Config | None) -> dict:
    """As ``tile_options``, with rows of pooled pixels, and at most eight elements of a tile a thread: what nine taps, or four
    windows and four pixels, want in registers is many times that."""
    options = tile_options(kernel, m, x, config)
    return options | {"BLOCK_M": max(1, min(options["BLOCK_M"], 256 * options["num_warps"] // options["BLOCK_N"]))}


def bn_relu_maxpool(x: Tensor, scale: Tensor, shift: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """``maxpool(relu(scale·x + shift))`` ``[N, C, P, Q]`` and the winners (uint8).

    A winner is its position ``3·r + s`` in the window (the first maximum, the last NaN), or 255 where its ReLU stops the
    gradient.

    Args:
        x (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last. scale, shift (Tensor[C]): fp32.
    Raises:
        ValueError: ``x`` is not dense in channels_last.
    Numerics: computes in fp32; compares and stores what is rounded once to the dtype of x.
    Traffic: reads 1 times x.numel() elements, writes a quarter of them and as many bytes of winners.
    """
    n, c, h, w = check_dense(x).shape
    _, _, p, q = shape = _WINDOW.output_shape(x.shape, (c, 1, 3, 3))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    index = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    options = _options("pool", n * p * q, x, config)
    grid = (n * triton.cdiv(p * q, options["BLOCK_M"]) * triton.cdiv(c, options["BLOCK_N"]),)
    bn_relu_maxpool_kernel[grid](x, scale, shift, out, index, h, w, p, q, c, **options)
    return out, index


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """``Σ dz`` and ``Σ dz·(x − mean)`` ``[C]`` in float32, dz being ``grad`` scattered to the winners.

    Args:
        grad, index (Tensor[N, C, P, Q]), x (Tensor[N, C, H, W]): dense in channels_last. mean (Tensor[C]): fp32.
    Raises:
        ValueError: an activation is not dense in channels_last.
    Numerics: sums in float32 over at most 64 tiles, merged in float64; the same bits on every run.
    Traffic: reads grad, index and x once from memory (grad and index three times more from caches).
    """
    check_dense(grad), check_dense(index)
    n, c, h, w = check_dense(x).shape
    p, q = grad.shape[2:]
    options = _options("pool_backward", n * h * w, x, config)
    columns = triton.cdiv(c, options["BLOCK_N"])
    tiles = n * triton.cdiv(p * q, options["BLOCK_M"])
    steps = steps_of(tiles, columns)
    partials = torch.empty((triton.cdiv(tiles, steps), 2, c), dtype=torch.float32, device=x.device)
    bn_relu_maxpool_backward_reduce_kernel[(partials.shape[0] * columns,)](
        grad, index, x, mean, partials, n, h, w, p, q, c, steps, **options
    )
    sum_dz, sum_dz_centred = merge_sums(partials)
    return sum_dz, sum_dz_centred


def bn_relu_maxpool_backward(
    grad: Tensor,
    index: Tensor,
    x: Tensor,
    mean: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    *,
    config: Config | None = None,
) -> Tensor:
    """``dx = a·dz + b·(x − mean) + c``.

    Args:
        grad, index (Tensor[N, C, P, Q]), x (Tensor[N, C, H, W]): dense in channels_last.
        mean, and the coefficients a, b, c (Tensor[C]): fp32.
    Raises:
        ValueError: an activation is not dense in channels_last.
    Numerics: computes in fp32, rounds once at the store. Where b = 0, x does not count (nor does its NaN).
    Traffic: reads grad, index and x, writes 1 times x.numel() elements.
    """
    check_dense(grad), check_dense(index)
    n, c, h, w = check_dense(x).shape
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    p, q = grad.shape[2:]
    options = _options("pool_backward", n * h * w, x, config)
    grid = (n * triton.cdiv(p * q, options["BLOCK_M"]) * triton.cdiv(c, options["BLOCK_N"]),)
    bn_relu_maxpool_backward_kernel[grid](
        grad, index, x, mean, *coefficients, dx, h, w, p, q, c, **options
    )  # fmt: skip
    return dx
