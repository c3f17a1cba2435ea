"""The contestants of ``bench``: each name is one way of running the same network with the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from . import models, networks
from .inference import optimize_for_inference
from .plans import choice

SLACK = 2.0
FLOOR_ULPS = 16.0
# A ReLU that flips within a rounding of its kink is worth this much of a gradient; ``verify`` is the test without.
GRADIENT_FLOOR = 2e-2
CHECKED_IN_TRAINING = 4


@dataclass(frozen=True)
class Setting:
    """What one table of ``bench`` measures."""

    model: str
    mode: str  # "infer" or "train"
    dtype: str
    device: str
    batch: int
    image_size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return networks.DTYPES[self.dtype]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """In training bf16 and fp16 come from autocast over float32 parameters."""
        if self.mode == "infer" or self.dtype == "fp64":
            return self.torch_dtype
        return torch.float32

    def target(self, count: int) -> Tensor:
        return (torch.arange(count) % 1000).to(self.device)


@dataclass(frozen=True)
class Provider:
    """A network, and one step of it on a batch."""

    network: nn.Module | Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Tensor]


def _compiled(network: nn.Module, setting: Setting) -> nn.Module:
    # As a global setting: dynamo asks it too, and takes weights for inputs where only the compiler's options say it.
    inductor.freezing = setting.mode == "infer"
    return torch.compile(network)  # type: ignore[return-value]


def build(name: str, source: nn.Module, setting: Setting) -> Provider:
    """Make a provider.

    Args:
        name: "stock" (eager, channels_last), "compile" (the same through torch.compile, with freezing in inference),
            "fused" (``optimize_for_inference``, or in training this package's network) or "genstats" (in training: "fused"
            with ``covariance("never")``, so that every convolution's statistics come from its raw output).
        source: stock network in float32 that holds the values; not changed.
    """
    dtype = setting.parameter_dtype
    fused = name in ("fused", "genstats")
    choice_of_plan = "never" if name == "genstats" else choice.current()
    network: nn.Module
    if fused:
        network = models.BUILDERS[setting.model]()
        network.load_state_dict(source.state_dict())
        network = networks.in_layout(network.to(setting.device), torch.channels_last)
    else:
        network = networks.in_layout(copy.deepcopy(source).to(setting.device, dtype), torch.channels_last)
    if setting.mode == "infer":
        network = optimize_for_inference(network.eval(), dtype) if fused else network.eval()
    else:
        network = network.to(dtype).train()
    run = _compiled(network, setting) if name == "compile" else network

    def infer(x: Tensor) -> Tensor:
        # no_grad, because torch.compile freezes weights under it; an inference tensor would cost a copy.
        with torch.no_grad():
            return run(x)

    def train(x: Tensor) -> Tensor:
        with choice.covariance(choice_of_plan):
            return networks.training_step(run, x, setting.target(len(x)), setting.torch_dtype)

    return Provider(network, infer if setting.mode == "infer" else train)


def batch_for(setting: Setting, x: Tensor) -> Tensor:
    """The batch as every provider gets it: its dtype, channels_last."""
    return x.to(setting.device, setting.parameter_dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Gold:
    """The float64 answer: logits, and in training all gradients in one vector."""

    logits: Tensor
    gradients: dict[str, Tensor]


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("_orig_mod."): p.grad.double().cpu()
        for name, p in network.named_parameters()
        if p.grad is not None
    }


def _checked(setting: Setting, x: Tensor) -> Tensor:
    # In inference images do not mix, so the full batch is run and its first answers are compared. In training they do.
    return x[: min(CHECKED_IN_TRAINING, len(x))] if setting.mode == "train" else x


def gold_answer(source: nn.Module, setting: Setting, x: Tensor) -> Gold:
    """Run stock PyTorch in float64 on (the first images of) the batch."""
    network = networks.double_copy(source).to(setting.device)
    few = batch_for(setting, _checked(setting, x)[:CHECKED_IN_TRAINING]).double()
    if setting.mode == "infer":
        with torch.no_grad():
            return Gold(network.eval()(few).cpu(), {})
    out = networks.training_step(network.train(), few, setting.target(len(few)), torch.float64)
    return Gold(out.cpu(), _gradients(network))


def errors(provider: Provider, setting: Setting, x: Tensor, gold: Gold) -> tuple[float, float]:
    """(error of the logits, error of all gradients together) relative to float64; restores the statistics."""
    network = provider.network
    kept = (
        {name: b.clone() for name, b in network.named_buffers()}
        if isinstance(network, nn.Module) and setting.mode == "train"
        else {}
    )
    out = provider.step(batch_for(setting, _checked(setting, x)))[: len(gold.logits)].cpu()
    if setting.mode == "infer":
        return networks.relative_error(out, gold.logits), 0.0
    assert isinstance(network, nn.Module)
    found = _gradients(network)
    if found.keys() != gold.gradients.keys():
        return networks.relative_error(out, gold.logits), float("inf")
    names = sorted(found)
    ours, exact = (torch.cat([side[name].flatten() for name in names]) for side in (found, gold.gradients))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
    return networks.relative_error(out, gold.logits), networks.relative_error(ours, exact)


def is_right(found: tuple[float, float], stock: tuple[float, float], setting: Setting) -> bool:
    """As accurate as stock in the same dtype, up to rounding and flipped ReLUs."""
    floor = FLOOR_ULPS * torch.finfo(setting.torch_dtype).eps
    return found[0] <= SLACK * stock[0] + floor and found[1] <= SLACK * stock[1] + GRADIENT_FLOOR
