"""BasicBlock and Bottleneck: torchvision's modules, each run as one fused unit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from . import dispatch
from .layers import ConvNormAct, run_units


def _conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


def _residual(x: Tensor, units: tuple[ConvNormAct, ...], downsample: nn.Module | None, relu: nn.Module) -> Tensor:
    """``relu(units(x) + shortcut(x))``; the shortcut joins the fused unit where it is the identity or (conv, bn)."""
    if downsample is None:
        return run_units(x, units, residual=x, act=relu)
    is_plain = dispatch.is_plain(downsample, nn.Sequential) and not dispatch.any_global_hooks()
    if is_plain and len(downsample) == 2:  # type: ignore[arg-type]
        return run_units(x, units, projection=(downsample[0], downsample[1]), act=relu)  # type: ignore[index]
    return run_units(x, units, residual=downsample(x), act=relu)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`` with 3×3 convolutions.

    Arguments, attributes, state_dict and errors are those of torchvision's BasicBlock.
    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 left.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        units = ((self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, None))
        return _residual(x, units, self.downsample, self.relu)


class Bottleneck(nn.Module):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``: 1×1, 3×3 (with the stride), 1×1.

    Arguments, attributes and state_dict are those of torchvision's Bottleneck, the variant known as ResNet v1.5.
    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5 right.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        units = ((self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu), (self.conv3, self.bn3, None))
        return _residual(x, units, self.downsample, self.relu)
