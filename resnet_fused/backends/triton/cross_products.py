"""Launchers of sums over rows: gradients of 1×1 filters, and covariances. What ``products`` says of its arguments holds here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...statistics import merge_products
from ..operands import Conv, Gradient, Operand, PendingGrad
from . import cross
from .launching import (
    described,
    gradient,
    operand,
    options,
    output_shape,
    partial_dtype,
    product_precision,
    rows_of,
    shape_of,
    split,
    strided,
    vector,
)
from .tuning import Config, choose

WgradOperand = tuple[Operand, Tensor | None, Conv]  # A, its centre, and the convolution


def _wgrad(
    dy: Gradient,
    mask: Tensor | None,
    operands: Sequence[WgradOperand],
    want_sums: bool,
    config: Config | None,
) -> tuple[list[Tensor], Tensor | None]:
    """``dYᵀ(A − centre)`` ``[K, C]`` of one operand or two, and on demand ``Σ dY`` ``[K]``, all in float64."""
    dz, pending_mask, *pending = gradient(dy)
    mask = pending_mask if mask is None else mask
    k, rows = dz.shape[1], rows_of(dz.shape)
    loaded = [(*operand(a), vector(centre), conv) for a, centre, conv in operands]
    for x, *_, conv in loaded:
        if output_shape(x, k, conv) != tuple(dz.shape) or x.dtype != dz.dtype:
            raise ValueError(f"expected the gradient of {conv} of {tuple(x.shape)}, got {tuple(dz.shape)}")
    precision = product_precision(dz, exact=any(centre is not None for *_, centre, _ in loaded))
    widths = [x.shape[1] for x, *_ in loaded]
    if config is None:
        _, scale, *_, conv = loaded[0]
        flags = {
            "pending": scale is not None,
            "pending_grad": isinstance(dy, PendingGrad),
            "masked": mask is not None,
        }
        asked = shape_of(rows, widths[0], k, conv, precision, **flags) | {"c2": sum(widths[1:])}
        config = choose("wgrad1x1", asked, dz.dtype, dz.device)
    tiles = triton.cdiv(k, config.block_n) * sum(triton.cdiv(c, config.block_k) for c in widths)
    splits, chunks = split(rows, tiles, config.block_m, dz.device)
    partials = [dz.new_empty((splits, k, c), dtype=partial_dtype(dz.dtype)) for c in widths]
    sums = dz.new_empty((splits, k), dtype=torch.float64) if want_sums else None
    tensors: list[Any] = []
    geometry: list[int] = []
    constants: dict[str, bool] = {}
    for (x, scale, shift, relu, centre, conv), own, suffix in zip(loaded, partials, ("", "2")):
        at = x if strided(conv) else described(x, config.block_m, config.block_k)
        tensors += [at, scale, shift, centre, own]
        geometry += [*x.shape[1:], *conv.stride]
        constants |= {f"A{suffix}_RELU": relu, f"STRIDED{suffix}": strided(conv)}
    if len(operands) == 1:
        tensors, geometry = tensors + [None] * 5, geometry + [1] * 5
        constants |= {"A2_RELU": False, "STRIDED2": False}
    y, *coefficients = pending
    gradient_tile = config.block_m, config.block_n
    cross.wgrad_kernel[(tiles, splits)](
        described(dz, *gradient_tile),
        mask,
        described(y, *gradient_tile),
        *coefficients,
        *tensors,
        sums,
        rows,
        k,
        *dz.shape[2:],
        chunks,
        *geometry,
        **constants,
        K_ALIGNED=k % 8 == 0,
        COMPENSATED=dz.dtype == torch.float32 and precision != "tf32",
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        **options(config),
    )
    return [own.sum(0, dtype=torch.float64) for own in partials], None if sums is None else sums.sum(0)


def wgrad(dy: Gradient, a: Operand, conv: Conv, config: Config | None = None) -> Tensor:
    """``dYᵀA`` ``[K, C]`` in float32.

    Numerics: products of a chunk of rows are summed in float32, chunks in twice that (but for TF32), splits of the rows in
        float64 in a fixed order.
    Traffic: reads dy (dz and y if pending) and a, once for each block of the other's channels; writes and reads splits·K·C.
    """
    (product,), _ = _wgrad(dy, None, [(a, None, conv)], False, config)
    return product.to(torch.float32)


def wgrad_bn_act(
    grad: Tensor,
    mask: Tensor | None,
    operands: Sequence[WgradOperand],
    config: Config | None = None,
) -> tuple[list[Tensor], Tensor]:
    """``T = dzᵀ(A − centre)`` ``[K, C]`` for each ``(a, centre, conv)``, one or two of them, and ``Σ dz`` ``[K]``, dz being
    ``grad`` where ``mask``.

    Returns:
        T in float64, for bfloat16 in float32; Σ dz in float32.
    Numerics: as ``wgrad``. float32 is centred while it is loaded; in half precision that would round it, and
        ``Σ dz·centreᵀ`` is taken away in float64.
    Traffic: reads each operand, and grad once.
    """
    full = grad.dtype == torch.float32
    loaded = [(a, centre if full else None, conv) for a, centre, conv in operands]
    products, sums = _wgrad(grad, mask, loaded, True, config)
    if not full:
        centres = [centre for _, centre, _ in operands]
        for i, centre in enumerate(centres):
            if centre is not None:
                products[i] = torch.addr(products[i], sums, centre.to(torch.float64), alpha=-1)
        if grad.dtype == torch.bfloat16:  # stock's raw output loses more than that
            products = [t.to(torch.float32) for t in products]
    return products, sums.to(torch.float32)


def gram(a: Operand, conv: Conv, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Mean ``[C]`` and biased covariance ``[C, C]`` of A's rows, in float64.

    Splits of the rows are merged all at once (``statistics.merge_products``).

    Numerics: products of a chunk of rows are summed in float32, chunks in twice that. float32 is centred about the mean of each
        split's first chunk while it is loaded; in half precision the centre is 0 and single products are exact.
    Traffic: reads a once for each block of channels; writes and reads splits·C².
    """
    x, scale, shift, relu = operand(a)
    c = x.shape[1]
    shape = output_shape(x, c, conv)
    rows = rows_of(shape)
    if not rows:
        nan = x.new_full((c,), float("nan"), dtype=torch.float64)
        return nan, nan.expand(c, c).contiguous()
    precision = product_precision(x, exact=True)
    if config is None:
        shape_asked = shape_of(rows, c, c, conv, precision, pending=scale is not None)
        config = choose("gram", shape_asked, x.dtype, x.device)
    if config.block_n != config.block_k:
        raise ValueError(f"config: expected square tiles, got {config}")
    side = triton.cdiv(c, config.block_n)
    splits, chunks = split(rows, side * (side + 1) // 2, config.block_m, x.device)
    partials = x.new_empty((splits, c, c), dtype=partial_dtype(x.dtype))
    sums = x.new_empty((splits, c), dtype=torch.float64)
    centres = x.new_empty((splits, c), dtype=torch.float32) if x.dtype == torch.float32 else None
    cross.gram_kernel[(side * side, splits)](
        x if strided(conv) else described(x, config.block_m, config.block_n),
        scale,
        shift,
        partials,
        sums,
        centres,
        rows,
        c,
        *shape[2:],
        *x.shape[2:],
        *conv.stride,
        chunks,
        RELU=relu,
        STRIDED=strided(conv),
        COMPENSATED=x.dtype == torch.float32,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **options(config),
    )
    count = x.new_full((splits, 1), chunks * config.block_m, dtype=torch.float64)
    count[-1] = rows - (splits - 1) * chunks * config.block_m
    mean, cov = merge_products(count, centres, sums, partials.sum(0, dtype=torch.float64))
    # Below the diagonal, tiles were not written.
    cov = cov.triu_() + cov.triu(1).t()
    cov.diagonal().clamp_min_(0)
    return mean, cov
