"""Statistics of a 1×1 convolution from the products themselves, for channels that the covariance of its input cannot tell.

Which channels these are is known on the GPU alone, and the host does not wait for it.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..operands import Conv, Operand, filter_matrix
from .gemm import product_of
from .language import wide_moments
from .launching import matrix, operand, options, output_shape, rows_of, split, strided
from .merging import merge_moments
from .tuning import INTERPRETED, Config

# By bytes of an element. Small tiles: this runs where channels are ill-conditioned, and float64 takes registers.
CONFIGS = {2: Config(64, 32, 32, 8, 3), 4: Config(32, 32, 16, 4, 2)}


@triton.jit
def flagged_moments_kernel(
    x, x_scale, x_shift, w, flagged, partials, M, K, P, Q, C, H, W, stride_h, stride_w, chunks,
    X_RELU: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partials[split, 2, K]``, where ``flagged``: mean and sum of squared deviations of X Wᵀ over ``chunks`` tiles of rows.

    Each program takes a split. It passes over the blocks of channels in which none is flagged: where nothing is, all it does is
    read the K flags. In float64, tiles merged with Chan's formula.
    """
    begin = tl.program_id(0) * chunks
    end = tl.minimum(begin + chunks, tl.cdiv(M, BLOCK_M))
    for first in tl.range(0, K, BLOCK_N):
        out = first + tl.arange(0, BLOCK_N)
        if tl.sum(tl.load(flagged + out, mask=out < K, other=0).to(tl.int32), 0) > 0:
            count = tl.zeros((BLOCK_N,), tl.float64)
            mean = tl.zeros((BLOCK_N,), tl.float64)
            square = tl.zeros((BLOCK_N,), tl.float64)
            for block in tl.range(begin, end):
                row = tl.cast(block * BLOCK_M, tl.int64)
                valid_row = tl.arange(0, BLOCK_M) < M - block * BLOCK_M
                z = product_of(
                    x, x_scale, x_shift, row, valid_row, w, first, C, K, P, Q, H, W, stride_h, stride_w,
                    X_RELU, STRIDED, "ieee", BLOCK_N, BLOCK_K,
                )  # fmt: skip
                tile_count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
                tile_mean, tile_square = wide_moments(z, valid_row[:, None], tile_count)
                both = count + tile_count
                delta = tile_mean - mean
                mean += delta * (tile_count / both)
                square += tile_square + delta * delta * (count * tile_count / both)
                count = both
            tl.store(partials + 2 * tl.program_id(0) * K + out, mean, mask=out < K)
            tl.store(partials + (2 * tl.program_id(0) + 1) * K + out, square, mask=out < K)


def recompute_statistics(
    a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``var``, where ``flagged`` of ``conv(a, weight)`` as accumulated: ``Kernels.recompute_statistics``.

    Args:
        weight (Tensor[K, C, 1, 1]): in the dtype of the activations. flagged (Tensor[K]): booleans. mean, var (Tensor[K]).
    Numerics: products in float32; their moments in two passes inside a tile, merged in float64 in a fixed order.
    Traffic: reads the flags; a once for each block of channels with a flag. The host does not wait.
    """
    x, scale, shift, relu = operand(a)
    k, c = weight.shape[:2]
    shape = output_shape(x, k, conv)
    rows = rows_of(shape)
    if not rows:
        return mean, var
    config = Config(16, 16, 16, 4, 1) if INTERPRETED else CONFIGS[x.dtype.itemsize]
    splits, chunks = split(rows, 1, config.block_m, x.device)
    partials = x.new_empty((splits, 2, k), dtype=torch.float64)
    flagged_moments_kernel[(splits,)](
        x, scale, shift, matrix("weight", filter_matrix(weight), x, (k, c)), flagged.view(torch.uint8), partials,
        rows, k, *shape[2:], *x.shape[1:], *conv.stride, chunks,
        X_RELU=relu, STRIDED=strided(conv),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **options(config),
    )  # fmt: skip
    found = torch.stack(merge_moments(partials, rows, chunks * config.block_m)).to(mean.dtype)
    mean, var = torch.where(flagged, found, torch.stack([mean, var]))
    return mean, var
