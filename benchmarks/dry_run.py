"""What stands in for a GPU where there is none, so that scripts made for one run to their end: nothing here is measured.

A CUDA graph records the operators of its capture and calls them again. torch.compile gives back what it was given. Networks have
one narrow block a stage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused import models, networks, peak_memory, providers
from resnet_fused.blocks import BasicBlock, Bottleneck

COMPILER_MODES = (None, "max-autotune")


class Graph(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``: results and inputs are the tensors of the capture, as there."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(kept, Tensor) and kept is not new:
                        kept.copy_(new)


@contextmanager
def emulated_graphs() -> Iterator[None]:
    """CUDA graphs of providers on a processor."""
    stream = mock.MagicMock()
    replaced = {
        "CUDAGraph": Graph,
        "graph": lambda graph, pool: graph,
        "graph_pool_handle": lambda: None,
        "device": lambda device: nullcontext(),
        "empty_cache": lambda: None,
        "Stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: stream,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(providers, "has_graphs", lambda device: True))
        yield


def uncompiled(network: nn.Module, *, mode: str | None = None, dynamic: bool | None = None) -> nn.Module:
    if mode not in COMPILER_MODES:
        raise ValueError(f"torch.compile: unexpected mode {mode!r}")
    return network


class _Narrow(models.ResNet):
    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:  # the stem has just been made
            self.conv1, self.bn1, self.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
        return super()._make_layer(block, planes // 8, 1, stride, dilate)


def _narrow(block: type[BasicBlock | Bottleneck], num_classes: int = 1000) -> nn.Module:
    network = _Narrow(block, (1, 1, 1, 1))
    network.fc = nn.Linear(64 * block.expansion, num_classes)
    return network


def _builder(name: str) -> Any:
    return functools.partial(_narrow, BasicBlock if name in ("resnet18", "resnet34") else Bottleneck)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More would only wait for each other, there is so little to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stand_ins() -> Iterator[None]:
    """All of them; memory is measured in this process, and timm's networks are stock."""
    timm = SimpleNamespace(
        is_model=lambda name: True, create_model=lambda name, num_classes: networks.stock_model(name, num_classes)
    )
    with (
        _one_thread(),
        emulated_graphs(),
        mock.patch.dict(models.BUILDERS, {name: _builder(name) for name in models.BUILDERS}),
        mock.patch.object(networks, "_torchvision", lambda: None),
        mock.patch.object(providers, "_timm", lambda: timm),
        mock.patch.object(torch, "compile", uncompiled),
        mock.patch.object(peak_memory, "measure", peak_memory.measure_here),
    ):
        yield
