"""Residual additions and masks. They know no channels: elements are taken in memory order, eight to a byte of the mask.

Any number of elements, also where rows of the ``[M, C]`` matrix do not end on a byte; the bits behind the last element are 0.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from . import tuning
from .configs import Config
from .language import passes, relu
from .operands import check_dense


@triton.jit
def _eights(count, BLOCK: tl.constexpr):
    """Of this program's BLOCK elements: offsets ``[BLOCK / 8, 8]``, which exist, the bytes of their mask, which exist."""
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return at, at < count, byte, byte * 8 < count


@triton.jit
def _store_bits(mask, byte, exists, bits):
    """Elements that do not exist are loaded as 0, and 0 does not pass."""
    powers = tl.where(bits, 1, 0) << tl.arange(0, 8)[None, :]
    # Disjoint bits: their sum is their union.
    tl.store(mask + byte, tl.sum(powers, 1).to(tl.uint8), mask=exists)


@triton.jit
def _load_bits(mask, byte, exists):
    bits = tl.load(mask + byte, mask=exists, other=0).to(tl.int32)
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def add_relu_kernel(a, b, out, mask, count, SAVE_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """``out = relu(a + b)`` of ``count`` elements; SAVE_MASK: one bit each, where the sum as stored lets the gradient pass."""
    at, valid, byte, exists = _eights(count, BLOCK)
    dtype = out.dtype.element_ty
    total = tl.load(a + at, mask=valid, other=0.0).to(tl.float32) + tl.load(b + at, mask=valid, other=0.0).to(
        tl.float32
    )
    stored = total.to(dtype).to(tl.float32)
    tl.store(out + at, relu(stored).to(dtype), mask=valid)
    if SAVE_MASK:
        _store_bits(mask, byte, exists, passes(stored))


@triton.jit
def mask_grad_kernel(acc, grad, out, mask, count, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """``out = grad where mask, else 0``; ADD: plus ``acc``. ``out`` may be ``acc``."""
    at, valid, byte, exists = _eights(count, BLOCK)
    dz = tl.where(_load_bits(mask, byte, exists), tl.load(grad + at, mask=valid, other=0.0).to(tl.float32), 0.0)
    if ADD:
        dz += tl.load(acc + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, dz.to(out.dtype.element_ty), mask=valid)


@triton.jit
def pack_mask_kernel(out, mask, count, BLOCK: tl.constexpr):
    """One bit for each of ``count`` elements: ``!(out <= 0)``."""
    at, valid, byte, exists = _eights(count, BLOCK)
    _store_bits(mask, byte, exists, passes(tl.load(out + at, mask=valid, other=0.0).to(tl.float32)))


def new_mask(x: Tensor) -> Tensor:
    """Room for one bit per element of ``x``."""
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def no_mask(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def _geometry(x: Tensor, config: Config | None, residual: bool, mask: bool) -> tuple[tuple[int], int, int]:
    """Grid, elements of a program, warps. A thread has eight elements: their byte of the mask never leaves it."""
    m, c = x.numel() // max(x.shape[1], 1), x.shape[1]
    shape = {"m": m, "c": c, "residual": int(residual), "mask": int(mask)}
    config = config or tuning.choose("add_relu", shape, x.dtype, x.device)
    block = 8 * 32 * config.warps
    return (triton.cdiv(x.numel(), block),), block, config.warps


def add_relu(a: Tensor, b: Tensor, save_mask: bool, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """``relu(a + b)`` and its mask (empty unless ``save_mask``).

    Args:
        a, b (Tensor[N, C, H, W]): fp32, bf16 or fp16, dense in channels_last.
    Raises:
        ValueError: an operand is not dense in channels_last.
    Numerics: adds in fp32, rounds once at the store; the mask is that of the value as stored.
    Traffic: reads 2, writes 1 times a.numel() elements (and one bit each).
    """
    check_dense(a), check_dense(b)
    out = torch.empty_like(a, memory_format=torch.channels_last)
    mask = new_mask(a) if save_mask else no_mask(a)
    grid, block, warps = _geometry(a, config, residual=True, mask=save_mask)
    add_relu_kernel[grid](a, b, out, mask, a.numel(), SAVE_MASK=save_mask, BLOCK=block, num_warps=warps)
    return out, mask


def mask_grad(grad: Tensor, mask: Tensor, *, config: Config | None = None) -> Tensor:
    """``grad`` where ``mask``, else 0: exact.

    Args:
        grad (Tensor[N, C, H, W]): dense in channels_last. mask (Tensor[ceil(numel / 8)]): uint8.
    Raises:
        ValueError: ``grad`` is not dense in channels_last.
    Traffic: reads 1 (and one bit each), writes 1 times grad.numel() elements.
    """
    out = torch.empty_like(check_dense(grad), memory_format=torch.channels_last)
    grid, block, warps = _geometry(grad, config, residual=False, mask=True)
    mask_grad_kernel[grid](grad, grad, out, mask, grad.numel(), ADD=False, BLOCK=block, num_warps=warps)
    return out


def mask_grad_add_(acc: Tensor, grad: Tensor, mask: Tensor, *, config: Config | None = None) -> None:
    """``acc += grad where mask``.

    Args:
        acc, grad (Tensor[N, C, H, W]): dense in channels_last. mask (Tensor[ceil(numel / 8)]): uint8.
    Raises:
        ValueError: an operand is not dense in channels_last.
    Numerics: adds in fp32, rounds once at the store.
    Traffic: reads 2 (and one bit each), writes 1 times acc.numel() elements.
    """
    check_dense(acc), check_dense(grad)
    grid, block, warps = _geometry(acc, config, residual=True, mask=True)
    mask_grad_kernel[grid](acc, grad, acc, mask, acc.numel(), ADD=True, BLOCK=block, num_warps=warps)


def pack_mask(out: Tensor, *, config: Config | None = None) -> Tensor:
    """The mask of an output that is stored already: for rows that do not end on bytes, which no tile of rows can pack.

    Args:
        out (Tensor[N, C, H, W]): dense in channels_last.
    Raises:
        ValueError: ``out`` is not dense in channels_last.
    Traffic: reads 1 times out.numel() elements, writes one bit each.
    """
    mask = new_mask(check_dense(out))
    grid, block, warps = _geometry(out, config, residual=False, mask=True)
    pack_mask_kernel[grid](out, mask, out.numel(), BLOCK=block, num_warps=warps)
    return mask
