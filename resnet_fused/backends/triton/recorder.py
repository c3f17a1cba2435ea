"""Which launches a plan makes: it runs on the meta device, through the launchers themselves, and each choice is noted.

So there is no second description of what runs when: what the launchers ask of the tuning table is what is recorded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from ..kernels import Kernels
from ..operands import Conv, NormGrad, Operand
from . import configs, devices, tuning
from .dispatch import TritonKernels

_SHAPE_ONLY = {("dgrad", "x"), ("wgrad", "weight")}  # arguments that are not read


def map_tensors(change: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """``value`` with ``change(name, tensor)`` for each tensor in it; ``name`` is the nearest argument's or field's."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item, key) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(change, item, name) for item in value)
    if is_dataclass(value) and not isinstance(value, (type, Conv)):
        return type(value)(*(map_tensors(change, getattr(value, f.name), f.name) for f in fields(value)))
    return value


def tensors_in(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in ``value``, each with its name."""
    found: list[tuple[str, Tensor]] = []
    map_tensors(lambda name, t: found.append((name, t)), value)
    return found


@dataclass(frozen=True)
class Workload:
    """A call of a method of ``Kernels`` that asks the tuning table.

    Attributes:
        kernel: one of ``configs.KERNELS``.
        shape, dtype: as the launcher hands them to ``tuning.choose``.
        method: of ``TritonKernels``.
        description: of the arguments; with it two workloads are the same or not.
        arguments: of the method, by name; tensors are on the meta device.
        result: what the method writes.
    """

    kernel: str
    dtype: torch.dtype
    method: str
    description: str
    shape: Mapping[str, int] = field(compare=False)
    arguments: Mapping[str, Any] = field(compare=False)
    result: Any = field(compare=False)

    def _bytes(self, name: str, t: Tensor) -> int:
        """Of a strided convolution's input, only the pixels that it reads."""
        pixels = t.numel() // t.shape[1] if t.dim() == 4 and name != "weight" else 0
        unread = max(0, pixels - self.shape["m"]) if self.kernel in configs.PRODUCTS else 0
        return (t.numel() - unread * t.shape[1] if unread else t.numel()) * t.itemsize

    @property
    def traffic_bytes(self) -> int:
        """What cannot be avoided: each operand read once, each result written once."""
        read = [pair for pair in tensors_in(self.arguments) if (self.method, pair[0]) not in _SHAPE_ONLY]
        return sum(self._bytes(*pair) for pair in [*read, *tensors_in(self.result)])

    @property
    def flops(self) -> int:
        """Of the products; 0 where there is none. A covariance has half its products for free: it is symmetric."""
        m, c, k = self.shape["m"], self.shape["c"], self.shape.get("k", 0)
        if self.kernel not in configs.PRODUCTS:
            return 0
        if self.kernel == "gram":
            return m * c * (c + 1)
        factors = {"weight": 1, "coupling": 2 if self.dtype.itemsize == 2 else 1}  # half precision has it in two parts
        filters = sum(factors.get(name, 0) * t.numel() for name, t in tensors_in(self.arguments))
        return 2 * m * (filters or k * c)

    def roofline_seconds(self, gpu: devices.Device) -> float:
        """``max(bytes / bandwidth, flops / rate)``: no kernel for this workload is faster."""
        return max(
            self.traffic_bytes / gpu.bandwidth, self.flops / gpu.rate(self.dtype, configs.precision_of(self.shape))
        )


def _describe(value: Any) -> str:
    return repr(map_tensors(lambda name, t: f"{t.dtype}{list(t.shape)}", value))


class Recorder(TritonKernels):
    """Runs on the meta device and counts the workloads that pass, in the order of their first call."""

    def __init__(self, own_conv3x3: bool) -> None:
        super().__init__(own_conv3x3)
        self.counts: dict[Workload, int] = {}

    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """No workload: it has nothing to do but for flagged channels, and which are is told by values."""
        return mean, var


def _recorded(name: str) -> Callable[..., Any]:
    original, parameters = getattr(Recorder, name), inspect.signature(getattr(Kernels, name))

    @functools.wraps(original)
    def method(self: Recorder, *args: Any, **kwargs: Any) -> Any:
        asked: list[tuple[str, Mapping[str, int], torch.dtype]] = []
        with tuning.deciding(lambda *question: asked.append(question)):
            result = original(self, *args, **kwargs)
        bound = parameters.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        written = args[0] if result is None else result
        if isinstance(result, NormGrad):  # its activation is only pending
            written = result.grad, result.sum_dz, result.sum_dz_centred
        for kernel, shape, dtype in asked:
            description = f"{sorted(shape.items())} {_describe(arguments)}"
            workload = Workload(kernel, dtype, name, description, dict(shape), arguments, written)
            self.counts[workload] = self.counts.get(workload, 0) + 1
        return result

    return method


_SILENT = ("operand", "gram_unit", "recompute_statistics")
for _name in [n for n, f in vars(Kernels).items() if inspect.isfunction(f) and n[0] != "_" and n not in _SILENT]:
    setattr(Recorder, _name, _recorded(_name))


@contextmanager
def without_launches() -> Iterator[None]:
    """In this block a kernel that is handed tensors on the meta device does not run: nothing of theirs could be computed."""
    launch = KernelInterface.__getitem__

    def skip(kernel: KernelInterface, grid: Any) -> Any:
        run = launch(kernel, grid)

        def call(*args: Any, **kwargs: Any) -> Any:
            is_meta = any(isinstance(value, Tensor) and value.is_meta for value in args)
            return None if is_meta else run(*args, **kwargs)

        return call

    KernelInterface.__getitem__ = skip  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch  # type: ignore[method-assign]
