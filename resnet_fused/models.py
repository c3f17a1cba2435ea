"""ResNet and its ten builders with torchvision's signatures, attributes, initialisation and state_dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, Bottleneck, conv1x1
from .convert.checkpoints import load, resolve
from .layers import run_stem


class ResNet(nn.Module):
    """A residual network of fused blocks.

    Arguments, attributes, initialisation and state_dict are those of torchvision's ResNet, so that seeds, checkpoints and
    code that reaches into the model keep working. The input may have any layout. Filters lie in memory as torchvision's do,
    which safetensors and unstructured pruning require; the operators read them in channels_last, and
    ``.to(memory_format=torch.channels_last)`` spares them the conversion, as it does for stock PyTorch.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier ``fc``.
        zero_init_residual: start each block as the identity (its last norm's weight is 0).
        groups, width_per_group: of the 3×3 convolutions (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for each of the last three stages, dilate instead of striding.
        norm_layer: makes a norm from its number of channels; anything but ``nn.BatchNorm2d`` runs on the plain path.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self._norm_layer = norm_layer
        self.inplanes = 64
        self.dilation = 1
        dilate = replace_stride_with_dilation or [False, False, False]
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)
        if zero_init_residual:
            for module in self.modules():
                last = module.bn3 if isinstance(module, Bottleneck) else getattr(module, "bn2", None)
                if isinstance(module, (BasicBlock, Bottleneck)) and last.weight is not None:
                    nn.init.constant_(last.weight, 0)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(conv1x1(self.inplanes, outplanes, stride), norm_layer(outplanes))
        shared = {"groups": self.groups, "base_width": self.base_width, "norm_layer": norm_layer}
        layers = [block(self.inplanes, planes, stride, downsample, dilation=previous_dilation, **shared)]
        self.inplanes = outplanes
        layers += [block(outplanes, planes, dilation=self.dilation, **shared) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = run_stem(x, self.conv1, self.bn1, self.relu, self.maxpool)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def _resnet(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: Any,
    progress: bool,
    kwargs: dict[str, Any],
) -> ResNet:
    if weights is None:
        return ResNet(block, layers, **kwargs)
    state_dict, num_classes, _ = resolve(weights, name, progress)
    if num_classes is not None:
        asked = kwargs.setdefault("num_classes", num_classes)
        if asked != num_classes:
            raise ValueError(f"The parameter 'num_classes' expected value {num_classes} but got {asked} instead.")
    model = ResNet(block, layers, **kwargs)
    load(model, state_dict)
    return model


_WEIGHTS_DOC = """

    Args:
        weights: a torchvision weights enum member, its name or "DEFAULT" (through torchvision); or the path of a .pth or
            .safetensors file, or a state_dict, in any layout that ``resnet_fused.load`` reads. None: random.
        progress: show the download of torchvision's weights.
        **kwargs: arguments of ``ResNet``.
    """


def _builder(
    name: str, description: str, block: type[BasicBlock | Bottleneck], layers: Sequence[int], **defaults: Any
) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        for key, value in defaults.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"The parameter '{key}' expected value {value} but got {kwargs[key]} instead.")
        return _resnet(name, block, layers, weights, progress, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = description + _WEIGHTS_DOC
    return build


_HE = 'He et al., "Deep Residual Learning for Image Recognition", 2015.'
_XIE = 'Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2016.'
_ZAGORUYKO = 'Zagoruyko and Komodakis, "Wide Residual Networks", 2016.'

resnet18 = _builder("resnet18", f"ResNet-18. Source: {_HE}", BasicBlock, (2, 2, 2, 2))
resnet34 = _builder("resnet34", f"ResNet-34. Source: {_HE}", BasicBlock, (3, 4, 6, 3))
resnet50 = _builder("resnet50", f"ResNet-50 v1.5. Source: {_HE}", Bottleneck, (3, 4, 6, 3))
resnet101 = _builder("resnet101", f"ResNet-101 v1.5. Source: {_HE}", Bottleneck, (3, 4, 23, 3))
resnet152 = _builder("resnet152", f"ResNet-152 v1.5. Source: {_HE}", Bottleneck, (3, 8, 36, 3))
resnext50_32x4d = _builder(
    "resnext50_32x4d", f"ResNeXt-50 32×4d. Source: {_XIE}", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4
)
resnext101_32x8d = _builder(
    "resnext101_32x8d", f"ResNeXt-101 32×8d. Source: {_XIE}", Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8
)
resnext101_64x4d = _builder(
    "resnext101_64x4d", f"ResNeXt-101 64×4d. Source: {_XIE}", Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4
)
wide_resnet50_2 = _builder(
    "wide_resnet50_2", f"Wide ResNet-50-2. Source: {_ZAGORUYKO}", Bottleneck, (3, 4, 6, 3), width_per_group=128
)
wide_resnet101_2 = _builder(
    "wide_resnet101_2", f"Wide ResNet-101-2. Source: {_ZAGORUYKO}", Bottleneck, (3, 4, 23, 3), width_per_group=128
)

BUILDERS: dict[str, Callable[..., ResNet]] = {
    build.__name__: build
    for build in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        wide_resnet50_2,
        wide_resnet101_2,
    )
}
