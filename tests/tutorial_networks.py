"""Networks as people write them by hand: what ``fuse`` and ``convert.load`` meet in the wild."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BiasedBlock(nn.Module):
    """Two biased 3×3 convolutions with functional ReLU; ``extra`` is the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra = None
        if stride != 1:
            self.extra = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.extra is None else self.extra(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(shortcut + y)


class TutorialResNet18(nn.Module):
    """The tutorial ResNet-18: torchvision's network, with a bias in every convolution of a block."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BiasedBlock(64, 64), BiasedBlock(64, 64))
        self.layer2 = nn.Sequential(BiasedBlock(64, 128, 2), BiasedBlock(128, 128))
        self.layer3 = nn.Sequential(BiasedBlock(128, 256, 2), BiasedBlock(256, 256))
        self.layer4 = nn.Sequential(BiasedBlock(256, 512, 2), BiasedBlock(512, 512))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SequentialBottleneck(nn.Module):
    """A bottleneck whose three convolutions are one Sequential; the stride is in the 3×3."""

    def __init__(self, inputs: int, width: int, stride: int, has_shortcut: bool) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.has_shortcut = has_shortcut
        if has_shortcut:
            self.downSample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        y = self.bottleneck(x)
        if self.has_shortcut:
            residual = self.downSample(x)
        y += residual
        return self.relu(y)


class TutorialResNet101(nn.Module):
    """The tutorial ResNet-101, with ``blocks`` per stage to make other depths."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 23, 3), num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        inputs = 64
        for stage, depth in enumerate(blocks):
            width = 64 << stage
            layers = []
            for i in range(depth):
                layers.append(SequentialBottleneck(inputs, width, 2 if stage and not i else 1, i == 0))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        x = self.avgpool(x)
        return self.fc(x.view(x.shape[0], -1))


class PreActivationBlock(nn.Module):
    """bn1 → relu → conv1 → bn2 → relu → conv2, + x: the names pair up, the data flow does not."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.relu(self.bn2(y)))
        return y + shortcut


class PreActivationNet(nn.Module):
    """A small network of pre-activation blocks."""

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            PreActivationBlock(width, width),
            PreActivationBlock(width, 2 * width, 2),
            PreActivationBlock(2 * width, 2 * width),
        )
        self.bn = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(x.mean((2, 3)))
