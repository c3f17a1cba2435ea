"""Networks with units under the covariance plan, ours and stock with the same weights, in float64."""

from __future__ import annotations

import pytest
import torch
from chain_cases import StockConvBNReLU, norms, tv
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.layers import run_units
from resnet_fused.plans.spec import Conv, Unit


def projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


class BiasedUnits(nn.Module):
    """Two units with biased convolutions, the second one expanding and strided, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(6, 11, 1, (2, 1)), nn.BatchNorm2d(11, momentum=None)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        units = [(self.conv1, self.bn1, F.relu), (self.conv2, self.bn2, None)]
        return run_units(x, units, residual=residual, act=F.relu)


class StockBiasedUnits(BiasedUnits):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + residual)


def block(kind: str, inplanes: int, planes: int, stride: int = 1, project: bool = False, **kwargs):
    """What makes ours, and what makes torchvision's block of that name."""

    def make(source: object) -> nn.Module:
        torch.manual_seed(0)
        cls = getattr(source, kind)
        width = planes * cls.expansion
        downsample = projection(inplanes, width, stride) if project else None
        return cls(inplanes, planes, stride, downsample, **kwargs)

    return lambda: make(resnet_fused), lambda: make(tv)


def conv(*args, **kwargs):
    return lambda: resnet_fused.ConvBNReLU(*args, **kwargs), lambda: StockConvBNReLU(*args, **kwargs)


# name: (ours, stock), shapes of the inputs, units of the chain that follow the covariance plan under "auto"
CASES = {
    "conv": (conv(7, 19, 1), [(2, 7, 5, 6)], 1),
    "conv-no-relu": (conv(8, 24, 1, relu=False), [(2, 8, 5, 6)], 1),
    "conv-strided": (conv(7, 19, 1, (2, 3)), [(2, 7, 5, 6)], 1),
    "conv-residual": (conv(7, 19, 1, 2), [(2, 7, 5, 6), (2, 19, 3, 3)], 1),
    "biased": ((BiasedUnits, StockBiasedUnits), [(2, 5, 5, 4), (2, 11, 3, 4)], 1),
    "bottleneck": (block("Bottleneck", 12, 3), [(2, 12, 5, 6)], 1),
    "bottleneck-projection": (block("Bottleneck", 7, 5, project=True), [(2, 7, 5, 6)], 2),
    "bottleneck-strided": (block("Bottleneck", 9, 4, 2, project=True), [(2, 9, 5, 6)], 2),
    "bottleneck-narrowing-projection": (block("Bottleneck", 20, 4, 2, project=True), [(2, 20, 5, 6)], 1),
    "bottleneck-grouped": (block("Bottleneck", 16, 4, groups=2), [(2, 16, 5, 6)], 1),
    "bottleneck-dilated": (block("Bottleneck", 12, 3, dilation=2), [(2, 12, 5, 6)], 1),
    "bottleneck-wide": (block("Bottleneck", 16, 4, base_width=128), [(2, 16, 5, 6)], 1),
    "basic-projection": (block("BasicBlock", 6, 13, 2, project=True), [(2, 6, 5, 6)], 1),
}
every_case = pytest.mark.parametrize("name", CASES)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and stock in float64 with norms that are not the identity."""
    (make_ours, make_stock), _, _ = CASES[name]
    ours, stock = make_ours().double(), make_stock().double()
    resnet_fused.testing.randomise_norms(stock, torch.Generator().manual_seed(3))
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def inputs_of(name: str) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in CASES[name][1]]


def set_mode(module: nn.Module, mode: str) -> None:
    """ "last" freezes the last norm, "others" all the others, as "first" the first."""
    module.train(mode != "eval")
    found = norms(module)
    for norm in {"last": found[-1:], "others": found[:-1], "first": found[:1]}.get(mode, []):
        norm.eval()


MODES = ["train", "eval", "last", "others", "first"]


def unit(out: int, inside: int, filter_size: int = 1, training: bool = True, **geometry) -> Unit:
    weight = torch.randn(out, inside // geometry.get("groups", 1), filter_size, filter_size)
    gamma, beta, mean, var = (torch.rand(out) + 0.5 for _ in range(4))
    parameters = [t.requires_grad_() for t in (weight, gamma, beta)]
    return Unit(parameters[0], None, *parameters[1:], mean, var, Conv(**geometry), training, True, 1e-5)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
