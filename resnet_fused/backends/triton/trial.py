"""A workload with inputs: launched with any configuration, compared with float64, timed.

A result is right if it is as accurate as stock PyTorch calls in the same dtype (``AtenKernels``, which also gives the float64
reference), and the same bits twice. What a kernel leaves unwritten holds NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..aten import AtenKernels, pack_mask
from ..operands import Below, NormGrad
from . import configs, tuning
from .configs import Config
from .dispatch import TritonKernels
from .launching import TF32_EPS
from .recorder import Workload, map_tensors, tensors_in

_ATEN = AtenKernels()
_SLACK, _ULPS = 2.0, 2.0
_SUM_FLOOR = 2.0**-19  # sums are formed in float32 also where they are stored in float64: sixteen of its units


# Inputs


class _Inputs:
    """Random tensors for the names and shapes of a workload's arguments.

    Activations are multiples of 1/16, scales powers of two and shifts odd multiples of 1/64, so that ``scale·y + shift`` is exact
    and never 0: the ReLU and its mask are the same on every side, in every dtype.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def _normal(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self._generator, device=self._device)

    def _integers(self, t: Tensor, low: int, high: int) -> Tensor:
        return torch.randint(low, high, t.shape, generator=self._generator, device=self._device)

    def __call__(self, name: str, t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            return self._integers(t, 0, 256).to(torch.uint8)
        if name in ("weight", "coupling"):
            value = self._normal(t) / t[0].numel() ** 0.5
        elif t.dim() == 4:
            value = (self._normal(t) * 16).round_().clamp_(-128, 128) / 16
        elif name == "scale":
            value = 2.0 ** self._integers(t, -1, 2) * (2 * self._integers(t, 0, 2) - 1)
        elif name == "shift":
            value = (2 * self._integers(t, -32, 32) + 1) / 64
        else:
            value = self._normal(t)
        value = value.to(t.dtype)
        return value.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else value

    def arguments(self, workload: Workload) -> dict[str, Any]:
        made = map_tensors(self, workload.arguments)
        if "index" in made:  # winners that lie inside their windows
            scale, shift = (self(name, made["mean"]) for name in ("scale", "shift"))
            made["index"] = _ATEN.bn_relu_maxpool(made["x"], scale, shift)[1]
        return made


def _passed(found: NormGrad, below: Below) -> tuple[Tensor, ...]:
    """dz and its sums. Whether a ReLU has stopped part of ``found.grad`` yet, or will, differs between backends."""
    dz = _ATEN._dz(found.grad, below.y, found.mask, below.scale, below.shift, found.relu)[0]
    return dz.to(found.grad.dtype), found.sum_dz, found.sum_dz_centred


def _double(_: str, t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _copy(_: str, t: Tensor) -> Tensor:
    return t.clone()


# Answers


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory holds NaN, and the largest number where there is none: a service of PyTorch's deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(found: Tensor, gold: Tensor) -> float:
    return (found.double() - gold).abs().max().item()


@dataclass(frozen=True)
class Accuracy:
    """Errors of a workload's results: the largest of each, relative to the largest element of the reference."""

    ours: float
    stock: float
    is_right: bool


class Trial:
    """A workload with random inputs on ``device``."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.arguments = _Inputs(device).arguments(workload)
        self._kernels = TritonKernels(own_conv3x3=True)
        self._scratch: dict[str, Any] | None = None
        self._references: list[tuple[Tensor, Tensor]] | None = None

    def call(self, config: Config | None = None) -> Any:
        """What the method returns, launched with ``config``, else with what the tuning table says.

        Methods that work in place have inputs of their own for it, which they change from call to call.
        """
        if self._scratch is None:
            self._scratch = map_tensors(_copy, self.arguments)
        return self._call(self._kernels, self._scratch, config)

    def _call(self, kernels: AtenKernels, arguments: dict[str, Any], config: Config | None = None) -> Any:
        own = self.workload.kernel, self.workload.shape

        def decide(kernel: str, shape: Any, dtype: torch.dtype) -> Config | None:
            return config if (kernel, shape) == own else None

        with tuning.deciding(decide), torch.no_grad():
            return getattr(kernels, self.workload.method)(*arguments.values())

    def _answers(self, kernels: AtenKernels, arguments: dict[str, Any], config: Config | None = None) -> list[Tensor]:
        """The results, or what the method wrote over; empty tensors stand for what nobody asked."""
        arguments = map_tensors(_copy, arguments)
        result = self._call(kernels, arguments, config)
        if isinstance(result, NormGrad):
            result = _passed(result, arguments["below"])
        return [t for _, t in tensors_in(next(iter(arguments.values())) if result is None else result) if t.numel()]

    def _gold_and_stock(self) -> list[tuple[Tensor, Tensor]]:
        if self._references is None:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
                stock = self._answers(_ATEN, self.arguments)
                gold = self._answers(_ATEN, map_tensors(_double, self.arguments))
            self._references = list(zip(gold, stock, strict=True))
        return self._references

    def accuracy(self, config: Config | None = None) -> Accuracy:
        """Whether the launch is as accurate as stock, against float64, and has the same bits twice."""
        with _poisoned():
            found = self._answers(self._kernels, self.arguments, config)
            again = self._answers(self._kernels, self.arguments, config)
        operands = TF32_EPS if configs.precision_of(self.workload.shape) == "tf32" else 0.0
        right, ours, theirs = all(map(torch.equal, found, again)), 0.0, 0.0
        for t, (gold, stock) in zip(found, self._gold_and_stock(), strict=True):
            if t.dtype == torch.uint8:
                right = right and torch.equal(t, self._expected_bytes(found[0], stock))
                continue
            size = gold.abs().max().item() or 1.0
            error, allowed = _error(t, gold) / size, _error(stock, gold) / size
            floor = max(_ULPS * max(torch.finfo(t.dtype).eps, operands), _SUM_FLOOR)
            right = right and t.shape == gold.shape and error <= _SLACK * allowed + floor  # not if either is NaN
            ours, theirs = max(ours, error), max(theirs, allowed)
        return Accuracy(ours, theirs, right)

    def _expected_bytes(self, out: Tensor, stock: Tensor) -> Tensor:
        """Of a pooling, its winners; else the mask of the output at hand, which may differ from stock's by a rounding."""
        return stock if self.workload.kernel == "pool" else pack_mask(~(out <= 0))
