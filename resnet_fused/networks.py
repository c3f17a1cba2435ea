"""The networks that ``verify`` and ``bench`` compare: stock, stock in float64, this package's, one set of values."""

from __future__ import annotations

import copy
import math
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks, models, testing

BUILDERS = tuple(models.BUILDERS)
BRANCH_SCALE = 0.25
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _plain_block_forward(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    if hasattr(self, "conv3"):
        y = self.bn3(self.conv3(self.relu(y)))
    return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _plain_network_forward(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return self.fc(torch.flatten(self.avgpool(x), 1))


def _torchvision() -> ModuleType | None:
    try:
        return testing.import_torchvision()
    except ImportError:
        return None


def stock_source() -> str:
    """What "stock" means here: torchvision and its version, or the plain forward below over ``torch.nn`` modules."""
    torchvision = _torchvision()
    if torchvision is None:
        return "plain torch.nn modules (torchvision is not installed)"
    return f"torchvision {torchvision.__version__}"


def stock_model(name: str, num_classes: int = 1000) -> nn.Module:
    """The network in stock PyTorch: torchvision's, or this package's children called one after another."""
    torchvision = _torchvision()
    if torchvision is not None:
        return getattr(torchvision.models, name)(num_classes=num_classes)
    model: Any = models.BUILDERS[name](num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, (blocks.BasicBlock, blocks.Bottleneck)):
            module.forward = MethodType(_plain_block_forward, module)  # type: ignore[method-assign]
    model.forward = MethodType(_plain_network_forward, model)
    return model


def copy_of(name: str, values: dict[str, Tensor], num_classes: int, *, fused: bool) -> nn.Module:
    """The named network holding ``values``, in their dtypes."""
    model = models.BUILDERS[name](num_classes=num_classes) if fused else stock_model(name, num_classes)
    model.load_state_dict(values)
    return model


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _last_norms(model: Any) -> list[Any]:
    """The batch norm in front of each block's addition."""
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    return [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks]


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Give an untrained network the statistics of a trained one: varied affine parameters, running statistics of ``x``.

    With its initial running statistics a deep untrained network doubles the variance in every block, until the answers
    say nothing about rounding and fp16 overflows. Branches are scaled down as in a trained network; at full scale every
    block multiplies a rounding error.
    """
    generator = torch.Generator().manual_seed(seed)
    for norm in _norms(model):
        norm.weight.copy_(torch.empty(norm.num_features).uniform_(0.5, 1.5, generator=generator))
        norm.bias.copy_(torch.empty(norm.num_features).normal_(0, 0.1, generator=generator))
    for norm in _last_norms(model):
        norm.weight.mul_(BRANCH_SCALE)
    momenta = [norm.momentum for norm in _norms(model)]
    for norm in _norms(model):
        norm.momentum = 1.0
    training = model.training
    model.train()(x)
    model.train(training)
    for norm, momentum in zip(_norms(model), momenta, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.zero_()


@torch.no_grad()
def hold_clear_of_kinks(model: Any, seed: int = 0) -> None:
    """Set batch norm so that every channel's ReLU is clearly open or clearly shut.

    A pre-activation within one rounding of zero flips its ReLU, and one flip among 10⁴ elements is worth 1 % of a
    gradient: that is no error of either side, yet it hides all others. Deviation 0.25 around ±1.5 keeps six deviations.
    A channel of the residual stream has one sign in its whole stage: what is added to an open channel keeps it open.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(norm: Any) -> Tensor:
        shut = torch.rand(norm.num_features, generator=generator) < 0.25
        return torch.where(shut, -1.5, 1.5)

    for norm in _norms(model):
        norm.weight.fill_(0.25)
        norm.bias.copy_(signs(norm))
    stream = model.bn1.bias.detach().clone()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        if stage[0].downsample is not None:
            shortcut = _norms(stage[0].downsample)[0]
            stream = signs(shortcut)
            shortcut.bias.copy_(stream)
        for block in stage:
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            last.weight.mul_(BRANCH_SCALE)
            last.bias.copy_(stream)


def training_step(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Forward (under autocast for bf16 and fp16), cross entropy, backward; gradients are left in the parameters.

    fp16's gradients are scaled by 256 and back, as a GradScaler would.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype if half else torch.bfloat16, enabled=half):
        out = model(x)
    loss = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), target)
    if dtype != torch.float16:
        loss.backward()
        return out.detach()
    (loss * 256).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(256)
    return out.detach()


def relative_error(value: Tensor, gold: Tensor, scale: float = 0.0) -> float:
    """``‖value − gold‖ / max(‖gold‖, scale)`` in float64; infinite when it is no number.

    ``scale`` keeps a gradient that is zero but for rounding (a bias in front of a batch norm) from being compared with
    itself.
    """
    difference = float((value.detach().double() - gold.double()).norm())
    size = max(float(gold.double().norm()), scale)
    error = difference / size if size > 0 else difference
    return float("inf") if math.isnan(error) else error


def in_layout(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The same model with its convolution weights in a memory format."""
    return model.to(memory_format=memory_format)  # type: ignore[call-overload]


def double_copy(model: nn.Module) -> nn.Module:
    """The same network in float64, contiguous."""
    return in_layout(copy.deepcopy(model).double(), torch.contiguous_format)
