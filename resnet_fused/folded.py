"""A convolution with its batch norm folded in and the residual addition and ReLU that follow it: inference only."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, folded_gpu
from .backends.algebra import FrozenNorm
from .backends.operands import Conv

MAX_PACKED_SHAPES = 4

_FAST_DTYPES = (torch.float32, torch.bfloat16)


def fold(conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that computes ``bn(conv(x))`` with running statistics.

    weight·s and (conv.bias − running_mean)·s + bn.bias, s = bn.weight / sqrt(running_var + eps).

    Args:
        conv: its weight and bias are read, never changed.
        bn (optional): ``nn.BatchNorm2d`` with or without affine parameters, or torchvision's ``FrozenBatchNorm2d``.
        dtype: of the result; that of ``conv.weight`` by default.
    Numerics: everything in float64, one rounding at the end.
    """
    device, dtype = conv.weight.device, dtype or conv.weight.dtype
    work = device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(work, torch.float64)

    weight, bias = wide(conv.weight), wide(conv.bias)
    assert weight is not None
    if bn is not None:
        mean, var, gamma, beta = (wide(t) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))  # type: ignore[arg-type]
        scale = torch.rsqrt(var + bn.eps)  # type: ignore[operator]
        scale = scale if gamma is None else scale * gamma
        bias = -mean * scale if bias is None else (bias - mean) * scale  # type: ignore[operator]
        bias = bias if beta is None else bias + beta
        weight = weight * scale.reshape(-1, 1, 1, 1)
    folded = weight.to(device, dtype, memory_format=torch.channels_last)
    return folded, None if bias is None else bias.to(device, dtype)


Folded = tuple[Tensor, Tensor | None]


def fold_all(pairs: Sequence[tuple[nn.Conv2d, nn.Module]], dtype: torch.dtype | None = None) -> list[Folded]:
    """``fold`` of each pair; those of one device and dtype in one launch, where the backend of that device has one."""
    found: list[Folded | None] = [None] * len(pairs)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (conv, _) in enumerate(pairs):
        groups.setdefault((conv.weight.device, conv.weight.dtype), []).append(i)
    for (device, given), members in groups.items():
        layers = [frozen_norm(*pairs[i]) for i in members]
        for i, one in zip(members, backends.get(backends.choose(device)).fold(layers, dtype or given), strict=True):
            found[i] = one
    return [fold(*pair, dtype) if one is None else one for pair, one in zip(pairs, found, strict=True)]


def frozen_norm(conv: nn.Conv2d, bn: Any) -> FrozenNorm:
    """The parameters of both, as a backend folds them."""

    def data(t: Tensor | None) -> Any:
        return None if t is None else t.detach()

    gamma, beta, mean, var = map(data, (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    return FrozenNorm(data(conv.weight), data(conv.bias), gamma, beta, mean, var, bn.eps)


def is_finite(conv: nn.Conv2d, folded: Folded) -> bool:
    """Whether folding created no infinity or NaN: infinite statistics or a weight that overflows would, and sums of infinite
    products are NaN where the batch norm after the sum gives infinity or, with the ReLU, 0.
    """
    weight, bias = folded
    if weight.device.type == "meta":
        return True
    return bool((weight.isfinite() | ~conv.weight.isfinite()).all() and (bias is None or bias.isfinite().all()))


@dataclass(eq=False)
class Packed:
    """A weight packed by oneDNN for inputs of one shape, and the shape of the output."""

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight: Tensor

    def fits(self, residual: Tensor, dtype: torch.dtype) -> bool:
        """Whether ``residual`` is like the output: only then may it be overwritten, or added without broadcasting."""
        return (
            type(residual) is Tensor
            and residual.dtype is dtype
            and residual.shape == self.output_shape
            and residual.is_contiguous(memory_format=torch.channels_last)
        )


class FoldedConv2d(nn.Module):
    """``y = conv2d(x, weight, bias) [+ residual]``, then ``relu(y)`` where ``relu`` is set.

    Args of ``forward``:
        x (Tensor[N, C, H, W]): any layout; on a processor the output is channels_last.
        residual (Tensor, optional): may be overwritten with the result where ``reuse_residual`` is set, which is for the
            owner of the graph: nothing may read it any more.
    Numerics: convolution + bias (+ residual, where it is overwritten) are rounded once, in oneDNN's epilogue. ReLU is a
        pass of its own, because oneDNN's ReLU epilogue turns NaN into 0 while ``torch.relu`` keeps it.
    Traffic: convolution's, + 1 read of the residual, + 1 read and 1 write of the output for the ReLU.

    On a GPU one of ``folded_gpu.PROVIDERS`` runs it.

    The fast path (float32 and bfloat16 on a processor with oneDNN) keeps weights packed for the last
    ``MAX_PACKED_SHAPES`` input shapes: which blocking oneDNN wants depends on the image and batch size, and a weight in
    another blocking is reordered at every call. Packed weights are not part of the state and are made when needed.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, folded: Folded, relu: bool = False):
        super().__init__()
        self.register_buffer("weight", folded[0])
        self.register_buffer("bias", folded[1])
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding: tuple[int, ...] = conv.padding  # type: ignore[assignment]
        self.groups, self.relu, self.reuse_residual = conv.groups, relu, False
        self._geometry = (self.padding, self.stride, self.dilation, self.groups)
        self._conv = Conv(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        self._layer: folded_gpu.Layer | None = None
        self._forget_packed()
        self.eval()

    def _forget_packed(self) -> None:
        self._packed: OrderedDict[tuple[int, ...], Packed] = OrderedDict()
        self._last: Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": OrderedDict(), "_last": None, "_layer": None}

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv2d:
        self._forget_packed()
        super()._apply(fn, recurse)
        if self._layer is not None and not self._layer.is_of(self.weight, self.bias):
            self._layer = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_packed()
        self._layer = None
        super()._load_from_state_dict(*args, **kwargs)

    def _pack(self, shape: tuple[int, ...]) -> Packed | None:
        """The weight packed for inputs of ``shape``; None where oneDNN must not be asked."""
        packed = self._packed.get(shape)
        if packed is not None:
            self._packed.move_to_end(shape)
        else:
            if not self._is_valid(shape):
                return None
            pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the shape
            weight = pack(self.weight.to_mkldnn(), *self._geometry, list(shape))
            packed = self._packed[shape] = Packed(shape, self._output_shape(shape), weight)
            if len(self._packed) > MAX_PACKED_SHAPES:
                self._packed.popitem(last=False)
        self._last = packed
        return packed

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        geometry = zip(shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        sizes = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry)
        return (shape[0], self.weight.shape[0], *sizes)

    def _is_valid(self, shape: tuple[int, ...]) -> bool:
        """Whether stock PyTorch would accept an input of ``shape`` and give a non-empty result."""
        fits = shape[1] == self.weight.shape[1] * self.groups and 0 not in shape
        return fits and all(size > 0 for size in self._output_shape(shape))

    def _packed_for(self, x: Tensor, weight: Tensor) -> Packed | None:
        """The packed weight when x can take the fast path, else None."""
        dtype = weight.dtype
        if (
            type(x) is not Tensor
            or x.dtype is not dtype
            or dtype not in _FAST_DTYPES
            or x.device.type != "cpu"
            or x.dim() != 4
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
            or not torch._C._get_mkldnn_enabled()
            or not _has_onednn(dtype)
        ):
            return None
        last = self._last
        return last if last is not None and last.shape == x.shape else self._pack(tuple(x.shape))

    def layer(self) -> folded_gpu.Layer:
        """Weight, bias and geometry as they are now."""
        weight, bias = self.weight, self.bias
        if self._layer is None or not self._layer.is_of(weight, bias):
            self._layer = folded_gpu.Layer(weight, bias, self._conv, self.relu)
        return self._layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight: Tensor = self._buffers["weight"]  # type: ignore[assignment]
        bias = self._buffers["bias"]
        packed = self._packed_for(x, weight)
        if packed is None:
            if not torch.compiler.is_compiling() and folded_gpu.takes(x, weight):
                return folded_gpu.forward(x, self.layer(), residual)
            return folded_gpu.plain(x, weight, bias, self._conv, residual, self.relu)

        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and self.reuse_residual and packed.fits(residual, x.dtype):
            in_place = torch.ops.mkldnn._convolution_pointwise_.binary
            y = in_place(residual, x, packed.weight, bias, *self._geometry, "add", 1.0, None, [], None)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.default(x, packed.weight, bias, *self._geometry, "none", [], "")
            if residual is not None:
                y = y.add_(residual) if packed.fits(residual, x.dtype) else y + residual
        return torch.relu_(y) if self.relu else y

    def extra_repr(self) -> str:
        out, width, *kernel = self.weight.shape
        epilogue = " + relu" if self.relu else ""
        size = f"{width * self.groups}, {out}, kernel_size={tuple(kernel)}, stride={self.stride}"
        return f"{size}, {self.weight.dtype}{epilogue}"


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
