"""Fused modules beside the stock modules that they replace, and one way to compare the two with a float64 run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.layers import run_add_act, run_bn_act, run_stem, run_units
from resnet_fused.testing import assert_as_accurate, import_torchvision

tv = import_torchvision().models.resnet


class StockConvBNReLU(nn.Module):
    """What ConvBNReLU replaces."""

    def __init__(self, *args, relu: bool = True, eps: float = 1e-5, momentum: float | None = 0.1, **kwargs) -> None:
        super().__init__()
        kwargs.setdefault("bias", False)
        self.conv = nn.Conv2d(*args, **kwargs)
        self.bn = nn.BatchNorm2d(self.conv.out_channels, eps, momentum)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


class BiasedConvBNReLU(StockConvBNReLU):
    """``run_units`` on a convolution with a bias."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_units(x, [(self.conv, self.bn, F.relu)])


class StockBNReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return F.relu(y if residual is None else y + residual)


class StockAddReLU(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)


class StockStem(nn.Module):
    def __init__(self, channels: int = 17) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class Stem(StockStem):
    def forward(self, x: Tensor) -> Tensor:
        return run_stem(x, self.conv1, self.bn1, self.relu, self.maxpool)


class StockTwoNorms(nn.Module):
    """Batch norm alone in front of a convolution: a pre-activation unit."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(17)
        self.conv = nn.Conv2d(17, 17, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(17)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.bn1(x)))
        return F.relu(F.relu(self.bn2(y)) + x)


class TwoNorms(StockTwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(run_bn_act(x, self.bn1, F.relu))
        return run_add_act(run_bn_act(y, self.bn2, F.relu), x, F.relu)


def _shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def _pooled_shortcut() -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), *_shortcut(8, 16, 1))


@dataclass(frozen=True)
class Case:
    """How to make the fused and the stock module, and the shapes of their inputs."""

    ours: Callable[[], nn.Module]
    stock: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]

    def pair(self, clear: bool = True) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        stock, ours = self.stock(), self.ours()
        if clear:
            hold_clear(stock)
        ours.load_state_dict(stock.state_dict())
        return ours, stock

    def inputs(self, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
        """The first input is noise; a second one has one sign per channel, away from the kink of a sum."""
        torch.manual_seed(1)
        made = []
        for i, shape in enumerate(self.shapes):
            x = torch.randn(shape) * 0.25
            if i or (len(self.shapes) == 2 and self.ours is resnet_fused.AddReLU):
                x = x.clamp(-0.7, 0.7)
                x += torch.where(torch.arange(shape[1]) % 4 == 1, -1.5, 1.5).view(1, -1, 1, 1)
            made.append(x.to(dtype).contiguous(memory_format=memory_format).requires_grad_())
        return made


def _same(name: str, *args, shape: tuple[int, ...], **kwargs) -> Case:
    ours, stock = getattr(resnet_fused, name), getattr(tv, name)
    return Case(lambda: ours(*args, **_made(kwargs)), lambda: stock(*args, **_made(kwargs)), (shape,))


def _made(kwargs: dict) -> dict:
    return {key: value() if callable(value) else value for key, value in kwargs.items()}


def _conv(*args, shape: tuple[int, ...], residual: tuple[int, ...] | None = None, **kwargs) -> Case:
    return Case(
        lambda: resnet_fused.ConvBNReLU(*args, **kwargs),
        lambda: StockConvBNReLU(*args, **kwargs),
        (shape,) if residual is None else (shape, residual),
    )


CASES = {
    "conv": _conv(3, 17, 3, padding=1, shape=(3, 3, 9, 11)),
    "conv-1x1-no-relu": _conv(17, 35, 1, relu=False, eps=1e-3, shape=(3, 17, 7, 9)),
    "conv-strided-uneven": _conv(8, 35, (3, 1), (2, 1), (1, 0), shape=(3, 8, 9, 7)),
    "conv-grouped-dilated": _conv(12, 24, 3, padding=2, dilation=2, groups=4, shape=(2, 12, 9, 9)),
    "conv-depthwise": _conv(17, 17, 3, padding=1, groups=17, shape=(2, 17, 9, 9)),
    "conv-residual": _conv(3, 17, 3, 2, 1, shape=(3, 3, 9, 11), residual=(3, 17, 5, 6)),
    "conv-bias": Case(
        lambda: BiasedConvBNReLU(3, 17, 3, bias=True), lambda: StockConvBNReLU(3, 17, 3, bias=True), ((3, 3, 9, 11),)
    ),
    "bn": Case(lambda: resnet_fused.BNReLU2d(35), lambda: StockBNReLU(35), ((3, 35, 7, 9),)),
    "bn-3-channels": Case(lambda: resnet_fused.BNReLU2d(3), lambda: StockBNReLU(3), ((3, 3, 17, 19),)),
    "bn-add": Case(lambda: resnet_fused.BNAddReLU2d(17), lambda: StockBNReLU(17), ((3, 17, 7, 9),) * 2),
    "add": Case(resnet_fused.AddReLU, StockAddReLU, ((3, 17, 7, 9),) * 2),
    "stem": Case(Stem, StockStem, ((2, 3, 33, 37),)),
    "pre-activation": Case(TwoNorms, StockTwoNorms, ((3, 17, 7, 9),)),
    "basic": _same("BasicBlock", 17, 17, shape=(3, 17, 7, 9)),
    "basic-projection": _same("BasicBlock", 8, 35, 2, downsample=lambda: _shortcut(8, 35, 2), shape=(3, 8, 9, 11)),
    "basic-other-shortcut": _same("BasicBlock", 8, 16, 2, downsample=_pooled_shortcut, shape=(3, 8, 9, 11)),
    "bottleneck": _same("Bottleneck", 12, 3, shape=(3, 12, 7, 9)),
    "bottleneck-projection": _same(
        "Bottleneck", 35, 5, 2, downsample=lambda: _shortcut(35, 20, 2), shape=(3, 35, 9, 11)
    ),
    "bottleneck-grouped": _same("Bottleneck", 32, 8, groups=4, shape=(3, 32, 7, 9)),
    "bottleneck-dilated": _same("Bottleneck", 12, 3, dilation=2, shape=(3, 12, 7, 9)),
}


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def hold_clear(module: nn.Module) -> None:
    """Each channel's ReLU clearly open or shut, so that rounding flips no gradient mask; see ``networks``.

    With a shortcut the last norms carry the larger bias: 2.5 against an input within ±1.1.
    """
    found = norms(module)
    for i, norm in enumerate(found):
        shut = torch.arange(norm.num_features) % 4 == (1 if norm is found[-1] else i % 4)
        norm.weight.uniform_(0.2, 0.3)
        norm.bias.copy_(torch.where(shut, -2.5, 2.5))
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.7, 1.2)
    if hasattr(module, "downsample") and module.downsample is not None:
        main = module.bn3 if hasattr(module, "bn3") else module.bn2
        main.bias.copy_(module.downsample[-1].bias)


def run(module: nn.Module, inputs: Sequence[Tensor], seed: int = 2) -> dict[str, Tensor]:
    """One forward and backward; the output, every gradient and every buffer by name."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
    module.zero_grad(set_to_none=True)
    out = module(*inputs)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    if out.requires_grad:
        out.backward(direction)
    found = {"out": out.detach()}
    found |= {f"input {i} grad": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f"{name} grad": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    found |= {name: b.clone() for name, b in module.named_buffers()}
    return found


def compare(
    ours: nn.Module, stock: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype, slack: float = 2, ulps: float = 4
) -> None:
    """Output, gradients and buffers of ``ours`` are as accurate as ``stock``'s against a float64 run of the same values."""
    ours, stock = ours.to(dtype), stock.to(dtype)
    gold = copy.deepcopy(stock).double()
    exact = run(gold, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    a, b = run(ours, inputs), run(stock, inputs)
    assert a.keys() == b.keys() == exact.keys()
    vectors = [t.abs().max().item() for key, t in exact.items() if key.endswith("grad") and t.dim() == 1]
    for name, reference in exact.items():
        if not reference.is_floating_point():
            assert torch.equal(a[name], b[name]), name
            continue
        # Where every ReLU is open, a norm's gradient sums to zero in front of another norm: the others tell its size.
        scale = max(vectors) if name.endswith("grad") and reference.dim() == 1 else 0
        assert_as_accurate(a[name], b[name], reference, slack, ulps, name=name, scale=scale)
