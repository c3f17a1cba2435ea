"""Answers of training steps, how they are compared, and a network of channels that kernels do not like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import blocks, layers, networks

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SLACK, ULPS = 2.0, 4.0  # of an error to stock's


class Wrong(Exception):
    """What is wrong."""


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, gradients and buffers."""
    found = {name: t.detach() for name, t in model.state_dict().items()}
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone(memory_format=torch.preserve_format) for name, t in tensors.items()}


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    if found.keys() != expected.keys():
        raise Wrong(f"{what}: other tensors: {', '.join(sorted(found.keys() ^ expected.keys())[:3])}")
    for name, t in expected.items():
        if not torch.equal(found[name], t):
            error = networks.relative_error(found[name], t)
            raise Wrong(f"{what}: other bits in {name}, by {error:.1e}")


def as_accurate(
    found: dict[str, Tensor],
    stock: Sequence[dict[str, Tensor]],
    gold: dict[str, Tensor],
    dtype: torch.dtype,
    what: str,
) -> float:
    """The largest share of what was allowed: twice stock's error in the same dtype, the worse of several, and some roundings.

    Raises:
        Wrong: more than that.
    """
    floating = {name: t for name, t in gold.items() if t.is_floating_point()}
    size = 1e-3 * float(torch.stack([t.double().norm() for t in floating.values()]).square().mean().sqrt())
    worst = 0.0
    for name, exact in floating.items():
        ours, *others = (networks.relative_error(side[name], exact, size) for side in (found, *stock))
        theirs = max(others)
        # In float64 stock is its own reference.
        allowed = 1e-9 if dtype == torch.float64 else SLACK * theirs + ULPS * torch.finfo(dtype).eps
        if not ours <= allowed:
            raise Wrong(f"{what}: {name} is off by {ours:.1e}, stock by {theirs:.1e}")
        worst = max(worst, ours / allowed)
    return worst


def one_step(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The state behind a training step in the dtype of ``x``, and the logits."""
    out = networks.training_step(model, x, target, x.dtype)
    return copied(state(model)) | {"logits": out}


class Odd(nn.Module):
    """A stem, a bottleneck and a basic block of 17 and 35 channels; ``fused`` as this package runs them, or module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 17, 7, 2, 3, bias=False), nn.BatchNorm2d(17)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.first = blocks.Bottleneck(17, 35, 1, nn.Sequential(nn.Conv2d(17, 140, 1, bias=False), nn.BatchNorm2d(140)))
        self.second = blocks.BasicBlock(
            140, 17, 2, nn.Sequential(nn.Conv2d(140, 17, 1, 2, bias=False), nn.BatchNorm2d(17))
        )
        self.fused = True
        with torch.no_grad():
            for norm in self.modules():
                if isinstance(norm, nn.BatchNorm2d):  # every ReLU clear of its kink, also behind an addition
                    shut = torch.arange(norm.num_features) % 4 == 1
                    norm.weight.uniform_(0.2, 0.3)
                    norm.bias.copy_(torch.where(shut, -2.5, 2.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.second(self.first(layers.run_stem(x, self.conv, self.bn, self.relu, self.pool)))
        y = self.pool(F.relu(self.bn(self.conv(x))))
        for block in (self.first, self.second):
            path = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
            path += [(block.conv3, block.bn3)] if hasattr(block, "conv3") else []
            z = y
            for i, (conv, bn) in enumerate(path):
                z = bn(conv(z))
                z = F.relu(z) if i < len(path) - 1 else z
            y = F.relu(z + block.downsample(y))
        return y

    def run(self, x: Tensor, training: bool) -> dict[str, Tensor]:
        self.train(training).zero_grad(set_to_none=True)
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = self(x)
        if training:
            torch.manual_seed(3)
            weight = torch.randn(out.shape) + torch.linspace(-1, 2, out.shape[1]).view(1, -1, 1, 1)
            out.backward(weight.to(out.device, out.dtype))
        found = copied(state(self)) if training else {}
        return found | {"out": out.detach()} | ({"dx": x.grad} if training else {})


def worst_share(device: torch.device, dtypes: Sequence[torch.dtype]) -> float:
    """``as_accurate`` of ``Odd`` beside its modules one by one, in every dtype and layout, in training and eval mode."""
    torch.manual_seed(0)
    model, image = Odd().to(device), torch.randn(3, 3, 27, 21)
    before, worst = copied(model.state_dict()), 0.0

    def answer(dtype: torch.dtype, x: Tensor, layout: torch.memory_format, training: bool, fused: bool) -> dict:
        model.to(dtype).load_state_dict(before)
        model.fused = fused
        return networks.in_layout(model, layout).run(x.to(dtype), training)

    layouts = {layout: image.to(device).contiguous(memory_format=layout) for layout in LAYOUTS}
    for dtype in dtypes:
        for training in (True, False):
            gold = answer(torch.float64, image.to(device), LAYOUTS[0], training, False)
            stock = [answer(dtype, x, layout, training, False) for layout, x in layouts.items()]
            for layout, x in layouts.items():
                ours = answer(dtype, x, layout, training, True)
                what = f"{str(dtype)[6:]}, {str(layout)[6:]}, {'training' if training else 'eval'}"
                worst = max(worst, as_accurate(ours, stock, gold, dtype, what))
    return worst
