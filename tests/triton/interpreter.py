"""Triton's interpreter made faithful: bfloat16, which it truncates where it should round and multiplies as integers, and products
in TF32, which it does not round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_original = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op", "create_fma")
}


def narrow(values: numpy.ndarray) -> numpy.ndarray:
    """float32 to the bits of bfloat16, to nearest even; NaN stays NaN."""
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    quiet_nan = numpy.uint16(0x7FC0) | ((bits >> 16) & 0x8000).astype(numpy.uint16)
    return numpy.where(numpy.isnan(values), quiet_nan, rounded)


def widen(bits: numpy.ndarray) -> numpy.ndarray:
    return (numpy.ascontiguousarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _float(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _cast(self, source, target):
    wanted = target.scalar
    if _is_bf16(source) and wanted != tl.bfloat16:
        return _float(source) if wanted == tl.float32 else _original["cast_impl"](self, _float(source), target)
    if wanted == tl.bfloat16 and not _is_bf16(source):
        return TensorHandle(narrow(source.data.astype(numpy.float32)), tl.bfloat16)
    return _original["cast_impl"](self, source, target)


def _fp_to_fp(self, source, target, rounding):
    kinds = (source.dtype.scalar, target.scalar)
    if tl.bfloat16 in kinds and not any(kind.is_fp8() for kind in kinds):
        return _cast(self, source, target)
    return _original["create_fp_to_fp"](self, source, target, rounding)


def round_to_tf32(values: numpy.ndarray) -> numpy.ndarray:
    """float32 without its last 13 bits, to nearest; Inf and NaN stay."""
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(numpy.uint32).view(numpy.float32)
    return numpy.where(numpy.isfinite(values), rounded, values)


def _dot(self, a, b, acc, precision, *rest):
    a, b = _float(a), _float(b)
    if a.data.dtype != numpy.float32 or precision not in (INPUT_PRECISION.TF32, INPUT_PRECISION.TF32x3):
        return _original["create_dot"](self, a, b, acc, precision, *rest)
    high = [TensorHandle(round_to_tf32(x.data), x.dtype) for x in (a, b)]
    if precision == INPUT_PRECISION.TF32x3:
        low = [TensorHandle(round_to_tf32(x.data - big.data), x.dtype) for x, big in zip((a, b), high)]
        for one, other in ((low[0], high[1]), (high[0], low[1])):
            acc = _original["create_dot"](self, one, other, acc, precision, *rest)
    return _original["create_dot"](self, *high, acc, precision, *rest)


def _binary(self, a, b, op):
    if _is_bf16(a) and _is_bf16(b):
        result = op(widen(a.data), widen(b.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(narrow(result), tl.bfloat16)
    return _original["binary_op"](self, a, b, op)


def _unary(self, a, op):
    return TensorHandle(narrow(op(widen(a.data))), tl.bfloat16) if _is_bf16(a) else _original["unary_op"](self, a, op)


def _fma(self, a, b, c):
    if _is_bf16(c):
        return TensorHandle(narrow(widen(a.data) * widen(b.data) + widen(c.data)), tl.bfloat16)
    return _original["create_fma"](self, a, b, c)


_REPAIRED = {
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "create_dot": _dot,
    "binary_op": _binary,
    "unary_op": _unary,
    "create_fma": _fma,
}


def repair() -> None:
    for name, function in _REPAIRED.items():
        setattr(InterpreterBuilder, name, function)


def undo() -> None:
    for name, function in _original.items():
        setattr(InterpreterBuilder, name, function)


@contextmanager
def repaired() -> Iterator[None]:
    """For the duration of a ``with`` block, which may stand inside another."""
    before = {name: getattr(InterpreterBuilder, name) for name in _REPAIRED}
    repair()
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)
