"""Launchers of the 1×1 convolutions: the kernels of ``gemm`` and ``cross`` on images ``[N, C, H, W]``.

Activations are dense in channels_last and of one dtype in a call: float32, bfloat16 or float16. Per-channel vectors are in
float32 unless said otherwise. Results have the same bits on every run on one kind of GPU.

``config`` None: what ``tuning.choose`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..operands import Below, Conv, Feedback, Gradient, Operand, PendingGrad, Product, filter_matrix
from . import gemm
from .cross_products import gram, wgrad, wgrad_bn_act
from .launching import (
    check,
    described,
    empty,
    front,
    gradient,
    matrix,
    operand,
    options,
    output_shape,
    partial_dtype,
    product_precision,
    rows_of,
    shape_of,
    strided,
    tiles,
    vector,
)
from .merging import merge_moments, merge_sums
from .residual import new_mask, no_mask, pack_mask
from .tuning import Config, choose

__all__ = ["dgrad", "dgrad_bn_act", "fprop", "fprop_bn_act", "gram", "wgrad", "wgrad_bn_act"]


def _fprop(
    products: Sequence[Product],
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
    stats: bool,
    config: Config | None,
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Output, mask, partial statistics, and the rows of each of those."""
    first, second = (*products, None)[:2]
    x, x_scale, x_shift, x_relu = operand(first.a)
    k, c = first.weight.shape[:2]
    shape = output_shape(x, k, first.conv)
    rows, p, q = rows_of(shape), shape[2], shape[3]
    w = matrix("weight", filter_matrix(first.weight), x, (k, x.shape[1]))
    x2 = x2_scale = x2_shift = w2 = y2_scale = None
    x2_relu, of_second = False, (1, 1, 1, 1, 1)
    if second is not None:
        x2, x2_scale, x2_shift, x2_relu = operand(second.a)
        if output_shape(x2, k, second.conv) != shape or x2.dtype != x.dtype:
            raise ValueError(f"products: expected outputs of one shape and dtype, got {x.shape} and {x2.shape}")
        w2 = matrix("weight", filter_matrix(second.weight), x, (k, x2.shape[1]))
        y2_scale, of_second = vector(second.scale), (*x2.shape[1:], *second.conv.stride)
    if residual is not None:
        check("residual", residual, x, shape)
    # With a scale the statistics of the product came from the covariance of its operand.
    precision = product_precision(x, exact=any(product.scale is not None for product in products))
    if config is None:
        flags = {"pending": x_scale is not None, "residual": residual is not None}
        flags |= {"stats": stats, "mask": save_mask}
        asked = shape_of(rows, c, k, first.conv, precision, **flags) | {"c2": 0 if x2 is None else x2.shape[1]}
        config = choose("fprop1x1", asked, x.dtype, x.device)
    y = empty(x, shape)
    mask = new_mask(y) if save_mask else no_mask(y)
    partials = x.new_empty((triton.cdiv(rows, config.block_m), 2, k), dtype=partial_dtype(x.dtype)) if stats else None
    if rows:
        operand_tile, filter_tile = (config.block_m, config.block_k), (config.block_n, config.block_k)
        out_tile = config.block_m, config.block_n
        is_strided, is_strided2 = strided(first.conv), second is not None and strided(second.conv)
        gemm.fprop_kernel[tiles(rows, k, config)](
            x if is_strided else described(x, *operand_tile),
            x_scale,
            x_shift,
            described(w, *filter_tile),
            vector(first.scale),
            x2 if is_strided2 else described(x2, *operand_tile),
            x2_scale,
            x2_shift,
            described(w2, *filter_tile),
            y2_scale,
            vector(shift),
            described(residual, *out_tile),
            described(y, *out_tile),
            mask if save_mask and k % 8 == 0 else None,
            partials,
            rows,
            k,
            p,
            q,
            *x.shape[1:],
            *first.conv.stride,
            *of_second,
            X_RELU=x_relu,
            X2_RELU=x2_relu,
            STRIDED=is_strided,
            STRIDED2=is_strided2,
            RELU=relu,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            **options(config),
        )
    if rows and save_mask and k % 8:
        mask = pack_mask(y)
    return y, mask, partials, config.block_m


def fprop(
    a: Operand, weight: Tensor, conv: Conv, stats: bool, config: Config | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw output and, if ``stats``, its mean and biased variance over N, H and W.

    Args:
        weight (Tensor[K, C, 1, 1]): in the dtype of the activations.
    Returns:
        y ``[N, K, P, Q]``; mean, var (Tensor[K]) or None.
    Numerics: accumulates in float32, rounds once at the store; statistics are of y as stored, exact in two passes inside a
        tile, tiles merged in float64 with Chan's formula in a fixed order.
    Traffic: reads a, writes y, and for each tile of rows 2·K float32 (float64 for float32).
    """
    y, _, partials, tile_rows = _fprop([Product(a, weight, conv)], None, None, False, False, stats, config)
    if partials is None:
        return y, None, None
    return y, *merge_moments(partials, rows_of(y.shape), tile_rows)


def fprop_bn_act(
    products: Sequence[Product],
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``act(Σ products + shift [+ residual])`` of one product or two, and its mask (empty unless ``save_mask``).

    Numerics: accumulates in float32, each product by itself, rounds once at the store.
    Traffic: reads each operand (and residual), writes 1 times the output (and one bit per element; where K % 8 != 0 the output
        is read again for it).
    """
    return _fprop(products, shift, residual, relu, save_mask, False, config)[:2]


# Input gradients


def _dgrad(
    dy: Gradient,
    mask: Tensor | None,
    weight: Tensor,
    conv: Conv,
    dx: Tensor,
    feedback: Feedback | None = None,
    residual: Tensor | None = None,
    residual_mask: Tensor | None = None,
    below: Below | None = None,
    accumulate: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Into ``dx``; weight ``[K, C]``."""
    dz, pending_mask, *pending = gradient(dy)
    mask = pending_mask if mask is None else mask
    k, c = weight.shape
    shape, rows = dz.shape, rows_of(dz.shape)
    check("dx", dx, dz, dx.shape)
    if output_shape(dx, k, conv) != tuple(shape) or dx.shape[1] != c:
        raise ValueError(f"expected the gradient of {conv} of {tuple(dx.shape)} by [{k}, {c}], got {tuple(shape)}")
    w = matrix("weight", weight, dz, (k, c))
    a = a_scale = a_shift = mean_a = coupling = low = mean_dz = constant = None
    a_relu = False
    if feedback is not None:
        a, a_scale, a_shift, a_relu = operand(feedback.a)
        check("a", a, dz, dx.shape)
        coupling = matrix("coupling", feedback.coupling, dz, (c, c))
        if feedback.low is None:
            mean_dz, mean_a = vector(feedback.mean_dz), vector(feedback.mean_a)
        else:
            low, constant = matrix("low", feedback.low, dz, (c, c)), vector(feedback.shift)
    if residual is not None:
        check("residual", residual, dz, dx.shape)
    precision = product_precision(dz, exact=feedback is not None)
    if config is None:
        flags = {
            "pending_grad": isinstance(dy, PendingGrad),
            "masked": mask is not None,
            "feedback": feedback is not None,
        }
        flags |= {"residual": residual is not None, "below": below is not None, "accumulate": accumulate}
        config = choose("dgrad1x1", shape_of(rows, c, k, conv, precision, **flags), dz.dtype, dz.device)
    partials = None
    if below is not None:
        partials = dz.new_empty((triton.cdiv(rows, config.block_m), 2, c), dtype=torch.float32)
    if rows:
        operand_tile, filter_tile = (config.block_m, config.block_k), (config.block_k, config.block_n)
        out_tile, is_strided = (config.block_m, config.block_n), strided(conv)
        y, *coefficients = pending
        below_y, *below_vectors = front(below, dz, dx.shape)
        gemm.dgrad_kernel[tiles(rows, c, config)](
            described(dz, *operand_tile),
            mask,
            mean_dz,
            described(y, *operand_tile),
            *coefficients,
            described(w, *filter_tile),
            a if is_strided else described(a, *operand_tile),
            a_scale,
            a_shift,
            mean_a,
            described(coupling, *filter_tile),
            described(low, *filter_tile),
            constant,
            residual if is_strided else described(residual, *out_tile),
            residual_mask,
            below_y if is_strided else described(below_y, *out_tile),
            *below_vectors,
            dx if is_strided else described(dx, *out_tile),
            partials,
            rows,
            k,
            c,
            *shape[2:],
            *dx.shape[2:],
            *conv.stride,
            A_RELU=a_relu,
            BELOW_RELU=below is not None and below.relu,
            STRIDED=is_strided,
            ACCUMULATE=accumulate,
            K_ALIGNED=k % 8 == 0,
            C_ALIGNED=c % 8 == 0,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            **options(config),
        )
    if partials is None:
        return dx, None, None
    sum_dz, sum_dz_centred = merge_sums(partials).unbind()
    return dx, sum_dz, sum_dz_centred


def dgrad(
    dy: Gradient,
    weight: Tensor,
    conv: Conv,
    like_shape: Sequence[int],
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    below: Below | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient ``[N, C, H, W]`` of a convolution without stride at its input, plus ``residual`` where ``mask`` (everywhere
    without one); with ``below`` carried on through the ReLU in front, with the two sums that its batch norm needs.

    Args:
        weight (Tensor[K, C, 1, 1]): in the dtype of the activations.
        like_shape: the input's.
    Returns:
        dx or dz ``[N, C, H, W]``; with ``below`` ``Σ dz`` and ``Σ dz·(y − mean)`` (Tensor[C]), else None.
    Raises:
        ValueError: the convolution strides: other pixels would have to be zeroed.
    Numerics: accumulates in float32, rounds once at the store. Sums are of dz as stored, in float32 inside a tile, of tiles in
        float64 in a fixed order.
    Traffic: reads dy (dz and y if pending), residual or below, writes dx.
    """
    if strided(conv):
        raise ValueError(f"expected a convolution without stride, got {conv}")
    dx = empty(dy.dz if isinstance(dy, PendingGrad) else dy, like_shape)
    return _dgrad(
        dy,
        None,
        filter_matrix(weight),
        conv,
        dx,
        residual=residual,
        residual_mask=mask,
        below=below,
        config=config,
    )


def dgrad_bn_act(
    grad: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    conv: Conv,
    feedback: Feedback | None,
    acc: Tensor | None = None,
    below: Below | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dA = (dz − mean_dz)·weight + (A − mean_a)·coupling``, dz being ``grad`` where ``mask``: ``Kernels.dgrad_bn_act``.

    Args:
        weight (Tensor[K, C]): ``diag(a) W``, in the dtype of ``grad``.
        acc: see there; its other pixels stay as they are.
        below: carries dA on through the ReLU in front of A; not together with ``acc``.
    Returns:
        dA ``[N, C, H, W]`` or ``acc``, with ``below`` dz; with ``below`` ``Σ dz`` and ``Σ dz·(y − mean)`` (Tensor[C]), else None.
    Raises:
        ValueError: the convolution strides and there is no ``acc``; or both ``acc`` and ``below``.
    Numerics: accumulates in float32, rounds once at the store; float32 is centred while it is loaded, in half precision the
        means leave through a constant. Sums as in ``dgrad``.
    Traffic: reads grad, a, and acc or below, writes dA.
    """
    if acc is not None and below is not None:
        raise ValueError("below: expected None beside acc: the sum, not this part of it, passes the ReLU")
    if acc is None and strided(conv):
        raise ValueError(f"acc: expected a tensor to add to, as the convolution strides: {conv}")
    dx = acc if acc is not None else empty(grad, (grad.shape[0], weight.shape[1], *grad.shape[2:]))
    return _dgrad(grad, mask, weight, conv, dx, feedback, below=below, accumulate=acc is not None, config=config)
