"""What stands in for a GPU where there is none, so that scripts made for one run to their end: nothing here is measured.

A CUDA graph records the operators of its capture and calls them again. torch.compile gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused import peak_memory, providers

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
        "graph": lambda graph: graph,
        "device": lambda device: nullcontext(),
        "Stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: stream,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(providers, "has_graphs", lambda device: True))
        yield


def _compile(network: nn.Module, *, mode: str | None = None, dynamic: bool | None = None) -> nn.Module:
    if mode not in COMPILER_MODES:
        raise ValueError(f"torch.compile: unexpected mode {mode!r}")
    return network


@contextmanager
def stand_ins() -> Iterator[None]:
    """All of them; and memory is measured in this process."""
    with (
        emulated_graphs(),
        mock.patch.object(torch, "compile", _compile),
        mock.patch.object(peak_memory, "measure", peak_memory.measure_here),
    ):
        yield
