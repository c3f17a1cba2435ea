"""A backend that is several: each convolution runs on the one that its route names, everything else on one of them.

The name of such a backend says it all, so that a backward, an exported graph and a table of measured choices find it again::

    routed 64x256x1x1/1=triton 64x64x3x3/1=cudnn 256x64x1x1/1=triton

A route is ``KxCxRxS/stride=provider`` (see ``signature``). What is not named runs on ``cudnn``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .aten import AtenKernels
from .kernels import Kernels
from .operands import Conv, Product

PREFIX = "routed"
CUDNN, CUBLAS, TRITON, EXTENSION, SPACE_TO_DEPTH = "cudnn", "cublas", "triton", "cuda", "space_to_depth"
LAZY = (TRITON, EXTENSION)  # whose kernels read pending operands; the first has the covariance plan's products too


def signature(weight_shape: Sequence[int], conv: Conv) -> str:
    """A convolution as routes name it: filter ``KxCxRxS`` (C per group), stride, and what else is unusual about it."""
    size = "x".join(map(str, weight_shape))
    unusual = f"g{conv.groups}" if conv.groups != 1 else ""
    unusual += "" if conv.dilation == (1, 1) else f"d{conv.dilation[0]},{conv.dilation[1]}"
    stride = str(conv.stride[0]) if conv.stride[0] == conv.stride[1] else f"{conv.stride[0]},{conv.stride[1]}"
    return f"{size}/{stride}{unusual}"


def name_of(routes: Mapping[str, str]) -> str:
    """The name of the backend with these routes, signature to provider."""
    return " ".join([PREFIX, *(f"{conv}={provider}" for conv, provider in sorted(routes.items()))])


def parse(name: str) -> dict[str, str]:
    """The routes in a backend's name.

    Raises:
        ValueError: it is no such name.
    """
    prefix, *pairs = name.split()
    routes = dict(pair.partition("=")[::2] for pair in pairs)
    if prefix != PREFIX or not all(routes) or not all(routes.values()):
        raise ValueError(f"expected '{PREFIX} KxCxRxS/stride=provider …', got {name!r}")
    return routes


class RoutedKernels(AtenKernels):
    """Each convolution on the provider of its route.

    Args:
        routes: from ``signature`` to the name of a provider.
        providers: the providers by name; ``cudnn`` is among them.
    Raises:
        ValueError: a route leads to no provider.
    """

    def __init__(self, routes: Mapping[str, str], providers: Mapping[str, Kernels]) -> None:
        for conv, provider in routes.items():
            if provider not in providers:
                raise ValueError(f"{conv}: expected one of {', '.join(providers)}, got {provider!r}")
        self.name = name_of(routes)
        self._routes = {conv: providers[provider] for conv, provider in routes.items()}
        self._base: Any = providers[CUDNN]
        used = [name for name in LAZY if name in routes.values()]
        # Makes what is pending, and has the products of the covariance plan, whose methods do not always name a filter.
        self._lazy: Any = providers[used[0]] if used else self._base
        # Triton's does not make the host wait, whatever else runs.
        self._flagged: Any = providers.get(TRITON, self._lazy)

    def _of(self, weight: Tensor | None, conv: Conv | None) -> Any:
        if weight is None or conv is None:  # a batch norm alone
            return self._base
        return self._routes.get(signature(weight.shape, conv), self._base)

    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        return self._of(products[0].weight, products[0].conv).fprop_bn_act(products, shift, residual, relu, save_mask)


def _on(which: str, name: str) -> Any:
    """The method that calls the same of one of the providers."""

    def method(self: RoutedKernels, *args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(self, which), name)(*args, **kwargs)

    method.__name__ = name
    return method


def _on_its_filter(name: str) -> Any:
    """The method that calls the same of the provider that its arguments ``weight`` and ``conv`` lead to."""
    parameters = inspect.signature(getattr(Kernels, name))

    def method(self: RoutedKernels, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        return getattr(self._of(given["weight"], given["conv"]), name)(*args, **kwargs)

    method.__name__ = name
    return method


_OF_FILTERS = ("fprop", "fprop_stats", "dgrad", "dgrad_below", "wgrad", "gradient")
_OF_COVARIANCE = (
    "operand",
    "gram",
    "gram_unit",
    "operand_eps",
    "dgrad_bn_act",
    "dgrad_bn_act_below",
    "wgrad_bn_act",
)
_OF_FLAGGED = ("recompute_statistics", "reads_back")
_ELSEWHERE = {"fprop_bn_act", *_OF_FILTERS, *_OF_COVARIANCE, *_OF_FLAGGED}
for _name in _OF_FILTERS:
    setattr(RoutedKernels, _name, _on_its_filter(_name))
for _which, _names in (("_lazy", _OF_COVARIANCE), ("_flagged", _OF_FLAGGED)):
    for _name in _names:
        setattr(RoutedKernels, _name, _on(_which, _name))
for _class in Kernels.__mro__[:2]:  # the passes, and the algebra between them
    for _name, _value in vars(_class).items():
        if callable(_value) and not _name.startswith("_") and _name not in _ELSEWHERE:
            setattr(RoutedKernels, _name, _on("_base", _name))
