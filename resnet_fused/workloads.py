"""The workloads of a network: which launches of the ``triton`` backend a training step or an inference makes.

The network runs once on the meta device. Its operators are met on their way to PyTorch's shape functions, and their plans run
with a backend that records instead of computing (``backends.triton.recorder``). It takes no GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .backends.kernels import Kernels
from .backends.triton.recorder import Recorder, Workload, without_launches
from .plans import chain, chain_backward
from .plans.spec import unflatten


class _Plans(TorchDispatchMode):
    """Runs the plan of each of this package's operators with ``kernels``, beside the operator."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        operators = torch.ops.resnet_fused
        self._kernels = kernels
        self._plans = {
            operators.chain.default: self._chain,
            operators.chain_backward.default: self._chain_backward,
            operators.residual_add_relu.default: lambda a, b, save, backend: kernels.add_relu(a, b, save),
            operators.residual_add_relu_backward.default: lambda grad, mask, backend: kernels.mask_grad(grad, mask),
        }

    def _chain(self, x, residual, parameters, running, spec, eps, group, save, backend) -> None:
        chain.forward(self._kernels, unflatten(parameters, running, spec, eps, group), x, residual, save)

    def _chain_backward(self, grad, x, parameters, saved, spec, eps, group, needs, backend) -> None:
        needed = chain_backward.Needs(needs[0], needs[1], tuple(needs[2:]))
        chain_backward.backward(self._kernels, unflatten(parameters, (), spec, eps, group), grad, x, saved, needed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._plans:
            self._plans[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def workloads(
    network: nn.Module, batch: int, image_size: int, dtype: torch.dtype, training: bool, own_conv3x3: bool = True
) -> dict[Workload, int]:
    """The workloads of one step, in the order in which they first occur, and how often each occurs.

    Args:
        network: one of this package's networks, or one from ``fuse``; it is not changed.
        batch, image_size: of the images ``[batch, 3, image_size, image_size]``.
        dtype: of the activations: float32, bfloat16 or float16.
        training: forward in training mode and backward, for all parameters; else forward in eval mode without gradients.
        own_conv3x3: whether 3×3 convolutions without stride are this package's or cuDNN's.
    """
    model = copy.deepcopy(network).to("meta", dtype).train(training)
    x = torch.empty(batch, 3, image_size, image_size, dtype=dtype, device="meta")
    recorder = Recorder(own_conv3x3)
    with _Plans(recorder), without_launches(), torch.set_grad_enabled(training):
        out = model(x)
        if training:
            out.sum().backward()
    return recorder.counts
