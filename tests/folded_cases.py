"""Folded convolutions as on a GPU, which here is the processor."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from block_cases import narrow_network
from torch import Tensor
from torch.nn import functional as F

import resnet_fused
from resnet_fused import backends, folded_gpu, networks, routes
from resnet_fused.backends.kernels import Kernels
from resnet_fused.backends.operands import Conv
from resnet_fused.backends.triton import devices
from resnet_fused.folded_gpu import PROVIDERS, Layer
from resnet_fused.testing import assert_as_accurate
from resnet_fused.tune_folded import Question, Trial

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Filter, geometry and the shape of the input.
GEOMETRIES = {
    "pointwise": ((24, 16, 1, 1), Conv(), (2, 16, 5, 7)),
    "pointwise-strided": ((16, 8, 1, 1), Conv((2, 2)), (2, 8, 7, 5)),
    "pointwise-odd": ((5, 17, 1, 1), Conv(), (1, 17, 4, 3)),
    "3x3": ((16, 8, 3, 3), Conv(padding=(1, 1)), (2, 8, 6, 5)),
    "3x3-strided": ((8, 16, 3, 3), Conv((2, 2), (1, 1)), (1, 16, 9, 8)),
    "3x3-grouped": ((8, 2, 3, 3), Conv(padding=(1, 1), groups=4), (1, 8, 5, 5)),
    "stem": ((8, 3, 7, 7), Conv((2, 2), (3, 3)), (2, 3, 20, 22)),
}
EPILOGUES = {  # bias, residual, ReLU
    "all": (True, True, True),
    "bias": (True, False, False),
    "relu": (False, False, True),
    "residual": (False, True, False),
    "nothing": (False, False, False),
}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, providers: Mapping[str, Kernels]) -> None:
    """Tensors of the processor run what a GPU's would, with these providers; cuDNN's functions do what they say."""

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(backends, "providers", lambda: dict(providers))
    monkeypatch.setattr(devices, "describe", lambda device: devices.DEVICES["H200"])
    monkeypatch.setattr(folded_gpu, "is_on_gpu", lambda x: x.device.type == "cpu")
    monkeypatch.setattr("resnet_fused.folded._FAST_DTYPES", ())  # oneDNN's
    routes.reload()


def question(geometry: str, epilogue: str, dtype: torch.dtype) -> Question:
    size, conv, shape = GEOMETRIES[geometry]
    has_bias, has_residual, relu = EPILOGUES[epilogue]
    weight = torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.empty(size[0], dtype=dtype) if has_bias else None
    return Question(Layer(weight, bias, conv, relu), torch.Size(shape), has_residual)


def check(geometry: str, epilogue: str, dtype: torch.dtype, expected: set[str]) -> None:
    """Exactly these providers apply beside stock and passes, and none is wrong."""
    trial = Trial(question(geometry, epilogue, dtype))
    names = trial.names()
    assert set(names) == {"stock", "passes"} | expected
    assert trial.wrong(names) == {}


def check_network(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, runs: int) -> None:
    """A network with every folded convolution on that provider where it applies: it ran ``runs`` of them."""
    calls = []
    provider = PROVIDERS[name]

    def run(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        calls.append(layer)
        return provider.run(x, layer, residual)

    counted = folded_gpu.Provider(provider.applies, run, provider.spreads)
    monkeypatch.setitem(PROVIDERS, name, counted)
    monkeypatch.setattr(routes, "measured", lambda key: name)
    source = narrow_network().eval()
    networks.hold_clear_of_kinks(source)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        stock = networks.double_copy(source).to(dtype)(x.to(dtype))
        gold = networks.double_copy(source)(x.to(dtype).double())
    ours = resnet_fused.optimize_for_inference(source, dtype)(x)
    assert_as_accurate(ours, stock, gold, ulps=64 if dtype == torch.float64 else 4)
    assert len(calls) == runs
