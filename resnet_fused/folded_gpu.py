"""What a folded convolution runs on a GPU: ``providers``, each a way to ``act(conv(x) + bias [+ residual])``, and the choice.

===================  ============================================================================================
``stock``            PyTorch's convolution, addition and ReLU: a launch each
``cudnn``            cuDNN's convolution with all of it as epilogue, where a ReLU follows
``passes``           the convolution without bias, and one pass over its output for the rest
``cublas``           1×1 without stride as a product of matrices (``backends.recast.MatrixProducts``), and one pass for the rest
``triton``           1×1 by Triton, the rest as epilogue
``cuda``             1×1 and 3×3 in half precision by the CUDA extension, the rest as epilogue
``space_to_depth``   the stem's 7×7 as a 4×4 (``backends.recast.SpaceToDepth``), and one pass for the rest
===================  ============================================================================================

Under ``auto`` the one that was measured to be fastest (``routes``, ``tune_folded``), else ``stock``. Under the backends
``triton`` and ``cuda`` that one, or ``passes`` where it does not apply; under the others ``stock``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, cuda_graphs, routes
from .backends import recast, routed
from .backends.cuda import convolves
from .backends.operands import Conv, Product, acc_dtype, is_pointwise
from .dispatch import transforms_active
from .routes import STOCK

CUDNN, PASSES, CUBLAS, TRITON, CUDA, SPACE_TO_DEPTH = "cudnn", "passes", "cublas", "triton", "cuda", "space_to_depth"
_MOST_CHOICES = 64
_MOST_ELEMENTS = 2**31  # that cuDNN counts


class Layer:
    """A folded convolution as providers read it; what they want in another form is made once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, conv: Conv, relu: bool) -> None:
        self.weight, self.bias, self.conv, self.relu = weight, bias, conv, relu
        self.choices: dict[Any, tuple[str, tuple]] = {}
        self._versions = self._of(weight, bias)
        self._made: dict[str, Tensor] = {}

    @staticmethod
    def _of(weight: Tensor, bias: Tensor | None) -> list[int]:
        return [t._version for t in (weight, bias) if t is not None and not t.is_inference()]

    def is_of(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether it still holds: these tensors are its own, and were not written since."""
        return weight is self.weight and bias is self.bias and self._of(weight, bias) == self._versions

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        found = self._made.get(name)
        if found is None:
            found = make()
            # What a recording makes is empty until the graph runs.
            if not cuda_graphs.is_recording():
                self._made[name] = found
        return found

    @property
    def scale(self) -> Tensor:
        """Ones ``[K]`` in the accumulation dtype."""
        weight = self.weight
        return self._once("scale", lambda: weight.new_ones(weight.shape[0], dtype=acc_dtype(weight.dtype)))

    @property
    def shift(self) -> Tensor:
        """The bias ``[K]``, or zeros, in the accumulation dtype."""
        return self._once(
            "shift",
            lambda: torch.zeros_like(self.scale) if self.bias is None else self.bias.to(acc_dtype(self.weight.dtype)),
        )

    @property
    def deep_weight(self) -> Tensor:
        """The filter for an image whose pixels went to channels."""
        return self._once("deep_weight", lambda: recast.deep_filter(self.weight))

    def describe(self, has_residual: bool) -> str:
        """What it computes, for a key."""
        padding, size = self.conv.padding, tuple(self.weight.shape[2:])
        unusual = "" if padding == (size[0] // 2, size[1] // 2) else f"p{padding[0]},{padding[1]}"
        flags = ("b" if self.bias is not None else "") + ("+" if has_residual else "") + ("r" if self.relu else "")
        return f"{routed.signature(self.weight.shape, self.conv)}{unusual}:{flags}"

    def key(self, shape: torch.Size, has_residual: bool) -> str:
        """Of an entry in a table of routes, for inputs of ``shape``."""
        return routes.key_of("folded", self.describe(has_residual), shape, self.weight.dtype, self.weight.device)


# Providers


@dataclass(frozen=True)
class Provider:
    """A way to run a layer.

    Attributes:
        applies: whether it runs this layer on ``x`` here. x and residual are like stock's: one dtype and device.
        run: ``(x, layer, residual) → y``, x and residual in channels_last.
        spreads: outputs beside those that read an infinity or NaN may be NaN: its filter has zeros around it.
    """

    applies: Callable[[Tensor, Layer], bool]
    run: Callable[[Tensor, Layer, Tensor | None], Tensor]
    spreads: bool = False


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, residual: Tensor | None, relu: bool) -> Tensor:
    """As stock PyTorch runs it, on any device."""
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


def _stock(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return plain(x, layer.weight, layer.bias, layer.conv, residual, layer.relu)


def _epilogue_of_cudnn_applies(x: Tensor, layer: Layer) -> bool:
    size = max(x.numel(), torch.Size(layer.conv.output_shape(x.shape, layer.weight.shape)).numel())
    available = torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return available and layer.relu and x.dtype != torch.float64 and size < _MOST_ELEMENTS


def _epilogue_of_cudnn(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return _stock(x, layer, residual)  # PyTorch tells only its plain convolutions
    conv = layer.conv
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    if residual is None:
        return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, layer.weight, residual, 1.0, layer.bias, *geometry)


def _passed(y: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """What follows the convolution, over its output."""
    if layer.bias is not None or residual is not None or layer.relu:
        backends.providers()[routed.CUDNN].bn_act_(y, layer.scale, layer.shift, residual, layer.relu)
    return y


def _convolved_and_passed(provider: str, x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    y = backends.providers()[provider].fprop(x, layer.weight, layer.conv)
    return _passed(y.contiguous(memory_format=torch.channels_last), layer, residual)


def _passes(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return _convolved_and_passed(routed.CUDNN, x, layer, residual)


def _cublas(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return _convolved_and_passed(routed.CUBLAS, x, layer, residual)


def _cublas_applies(x: Tensor, layer: Layer) -> bool:
    return routed.CUBLAS in backends.providers() and recast.MatrixProducts.applies(x, layer.weight, layer.conv)


def _product(provider: str, x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    product = Product(x, layer.weight, layer.conv)
    return backends.providers()[provider].fprop_bn_act([product], layer.shift, residual, layer.relu, False)[0]


def _triton(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return _product(routed.TRITON, x, layer, residual)


def _triton_applies(x: Tensor, layer: Layer) -> bool:
    return (
        routed.TRITON in backends.providers()
        and is_pointwise(layer.weight, layer.conv)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _cuda(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    if x.data_ptr() % 16 or (residual is not None and residual.data_ptr() % 16):  # which differs from call to call
        return _passes(x, layer, residual)
    return _product(routed.EXTENSION, x, layer, residual)


def _cuda_applies(x: Tensor, layer: Layer) -> bool:
    return routed.EXTENSION in backends.providers() and convolves(x, layer.weight, layer.conv)


def _space_to_depth(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    y = F.conv2d(recast.deep_image(x, layer.weight), layer.deep_weight)
    return _passed(y.contiguous(memory_format=torch.channels_last), layer, residual)


PROVIDERS = {
    STOCK: Provider(lambda x, layer: True, _stock),
    CUDNN: Provider(_epilogue_of_cudnn_applies, _epilogue_of_cudnn),
    PASSES: Provider(lambda x, layer: True, _passes),
    CUBLAS: Provider(_cublas_applies, _cublas),
    TRITON: Provider(_triton_applies, _triton),
    CUDA: Provider(_cuda_applies, _cuda),
    SPACE_TO_DEPTH: Provider(
        lambda x, layer: recast.SpaceToDepth.applies(x, layer.weight, layer.conv), _space_to_depth, spreads=True
    ),
}


# The choice


def is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether anything but ``plain`` may run: a dense input of a GPU that needs no gradient, and nobody watching."""
    return (
        type(x) is Tensor
        and is_on_gpu(x)
        and x.dim() == 4
        and x.dtype == weight.dtype
        and x.device == weight.device
        and not (x.requires_grad and torch.is_grad_enabled())
        and not transforms_active(x)
    )


def _choose(x: Tensor, layer: Layer, has_residual: bool, wish: str) -> tuple[str, tuple]:
    """The provider by name, and the shape of its output."""
    shape = layer.conv.output_shape(x.shape, layer.weight.shape)
    name = STOCK  # which says what is wrong with an input
    if x.shape[1] == layer.weight.shape[1] * layer.conv.groups and 0 not in x.shape and min(shape) > 0:
        if wish == "auto":
            name = routes.measured(layer.key(x.shape, has_residual)) or STOCK
        elif wish in (TRITON, CUDA):
            name = wish
    x = x.contiguous(memory_format=torch.channels_last)
    if name in PROVIDERS and PROVIDERS[name].applies(x, layer):
        return name, shape
    return PASSES if name == wish else STOCK, shape


def of_folded(x: Tensor, layer: Layer, residual: Tensor | None) -> str:
    """The provider, by name, that runs the layer on ``x``, which ``takes`` has let pass."""
    question = x.shape, residual is not None, backends.current(), routes.reloads()
    found = layer.choices.get(question)
    if found is None:
        if len(layer.choices) >= _MOST_CHOICES:
            layer.choices.clear()
        found = layer.choices[question] = _choose(x, layer, *question[1:3])
    name, shape = found
    fits = residual is None or (
        type(residual) is Tensor
        and residual.shape == shape  # stock would broadcast
        and residual.dtype == x.dtype
        and residual.device == x.device
        and not (residual.requires_grad and torch.is_grad_enabled())
    )
    return name if fits else STOCK


def run(name: str, x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """The layer by the provider of that name."""
    if name != STOCK:
        x = x.contiguous(memory_format=torch.channels_last)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    return PROVIDERS[name].run(x, layer, residual)


def forward(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """The layer by the provider that ``of_folded`` chooses."""
    return run(of_folded(x, layer, residual), x, layer, residual)
