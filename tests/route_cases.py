"""Routes in force on a processor: it is taken for a GPU, and a test says what was measured there to be fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from block_cases import BLOCKS, block
from chain_cases import tv
from torch import Tensor, nn

from resnet_fused import backends, operators, routes
from resnet_fused.backends import recast, routed
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.kernels import Kernels
from resnet_fused.backends.operands import Below, Conv, Gradient, NormGrad, Operand, Pending, PendingGrad
from resnet_fused.backends.triton import devices

SHARED_METHODS = ("fprop", "fprop_stats", "dgrad", "dgrad_below", "wgrad")  # of a convolution, whichever its plan is


class LazyKernels(AtenKernels):
    """Formulas that leave pending what the kernels on a GPU leave pending."""

    name = "lazy"

    def operand(self, y: Tensor, scale: Tensor, shift: Tensor, relu: bool, keep_y: bool) -> Operand:
        return Pending(y, scale, shift, relu)

    def dgrad_below(self, dy: Gradient, weight: Tensor, conv: Conv, below: Below, want_activation: bool) -> NormGrad:
        found = super().dgrad_below(dy, weight, conv, below, False)
        pending = Pending(below.y, below.scale, below.shift, below.relu) if want_activation else None
        return NormGrad(found.grad, found.mask, found.relu, found.sum_dz, found.sum_dz_centred, pending)

    def gradient(
        self,
        found: NormGrad,
        below: Below,
        coefficients: tuple[Tensor, Tensor, Tensor],
        weight: Tensor | None,
        conv: Conv | None,
        inplace: bool,
    ) -> Gradient:
        if weight is None or (found.mask is None and found.relu):
            return super().gradient(found, below, coefficients, weight, conv, inplace)
        return PendingGrad(found.grad, below.y, below.mean, *coefficients, found.mask)


def with_space_to_depth(found: dict[str, Kernels]) -> dict[str, Kernels]:
    base = type(found[routed.CUDNN])
    return found | {routed.SPACE_TO_DEPTH: type("Deep", (recast.SpaceToDepth, base), {})()}


def formulas() -> dict[str, Kernels]:
    """Providers of formulas only."""
    lazy = {routed.TRITON: LazyKernels(), routed.EXTENSION: LazyKernels()}
    return with_space_to_depth({routed.CUDNN: AtenKernels(), **lazy})


class Pretended:
    """A GPU that is none, and what its table says: ``choice`` for every chain (None: nothing).

    Attributes:
        asked: keys of the table that were asked for.
        ran: choices by which operators ran.
    """

    def __init__(self) -> None:
        self._choice: str | None = None
        self.asked: list[str] = []
        self.ran: list[str] = []

    @property
    def choice(self) -> str | None:
        return self._choice

    @choice.setter
    def choice(self, choice: str | None) -> None:
        self._choice = choice
        routes.reload()


def pretend(monkeypatch: pytest.MonkeyPatch, providers: Mapping[str, Kernels], on: str = "cpu") -> Iterator[Pretended]:
    found = Pretended()

    def measured(key: str) -> str | None:
        found.asked.append(key)
        return found.choice

    def watched(original: Any) -> Any:
        def call(*args: Any) -> Any:
            if not torch.compiler.is_compiling():  # a list that grows would be guarded
                found.ran.append(args[-1].choice)
            return original(*args)

        return call

    monkeypatch.setattr(routes, "applies", lambda device: backends.current() == "auto" and device.type == on)
    monkeypatch.setattr(routes, "measured", measured)
    monkeypatch.setattr(devices, "describe", lambda device: devices.DEVICES["H200"])
    monkeypatch.setattr(backends, "providers", lambda: providers)
    for name in ("chain", "add_relu"):
        monkeypatch.setattr(operators, name, watched(getattr(operators, name)))
    forget()
    yield found
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Nothing that was found with other providers is used any more."""
    routes.reload()
    backends._routed.cache_clear()


def convolutions(module: nn.Module) -> list[str]:
    """The convolutions of a module, as routes name them; each once."""
    found: dict[str, None] = {}
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            geometry = Conv(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
            found[routed.signature(conv.weight.shape, geometry)] = None
    return list(found)


def signatures(name: str) -> list[str]:
    """Those of a case of ``BLOCKS``."""
    return convolutions(block(tv, *BLOCKS[name]))


def mixtures(name: str, providers: list[str]) -> list[str]:
    """Every way of sending the convolutions of a block to these providers, as names of backends."""
    convs = signatures(name)
    ways = itertools.product(providers, repeat=len(convs))
    return [routed.name_of(dict(zip(convs, way, strict=True))) for way in ways]


class Recording(AtenKernels):
    """Notes which convolutions it is asked for."""

    def __init__(self, noted: list[tuple[str, str, str]], name: str) -> None:
        self.name = name
        for method in SHARED_METHODS:
            setattr(self, method, self._noted(noted, method))

    def _noted(self, noted: list[tuple[str, str, str]], method: str) -> Any:
        original = getattr(AtenKernels, method)

        def call(*args: Any) -> Any:
            weight, conv = next(pair for pair in itertools.pairwise(args) if isinstance(pair[1], Conv))
            noted.append((self.name, method, routed.signature(weight.shape, conv)))
            return original(self, *args)

        return call
