"""torchvision's detection and segmentation networks on this package's backbones, and fused, beside the stock ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from feature_cases import assert_same_steps, step
from stock_pairs import assert_same, images, networks
from torch import Tensor, nn

import resnet_fused
from resnet_fused.testing import import_torchvision

torchvision = import_torchvision()

from torchvision.models import _utils, detection, segmentation  # noqa: E402  (import_torchvision comes first)
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402

BLOCKS = ["PROJECTION"] * 3  # ResNet-18 of one block a stage: after layer1, which is the identity
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch norm": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


def frozen_values(model: nn.Module) -> None:
    """Statistics and affine values of frozen norms away from 1 and 0."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for value, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
            ):
                value.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)


def backbones(norm: str, trainable_layers: int = 5) -> tuple[nn.Module, nn.Module]:
    """(ours, stock): pyramids of 8 channels on a small ResNet, with that many of its layers to be trained."""
    ours, stock = networks(norm_layer=NORMS[norm])
    frozen_values(stock)
    ours.load_state_dict(stock.state_dict())
    made = []
    for network in (ours, stock):
        torch.manual_seed(1)
        _resnet_fpn_extractor(network, trainable_layers)  # freezes; its own pyramid has 256 channels
        taps = {f"layer{i + 1}": str(i) for i in range(4)}
        made.append(BackboneWithFPN(network, taps, [64, 128, 256, 512], 8).double())
    return made[0], made[1]


@pytest.mark.parametrize(("norm", "trainable_layers"), [("batch norm", 3), ("frozen", 5)])
def test_pyramid_on_this_package_s_backbone(norm: str, trainable_layers: int, fused_calls: list[str]) -> None:
    ours, stock = backbones(norm, trainable_layers)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in stock.named_parameters() if p.requires_grad
    ]
    assert_same_steps(ours, stock)
    if norm == "batch norm":  # the stem's children are called one by one
        assert fused_calls == ["IDENTITY", *BLOCKS] * 2


@pytest.mark.parametrize(("whose", "norm"), [("torchvision's", "batch norm"), ("this package's", "frozen")])
def test_fused_pyramid(whose: str, norm: str, fused_calls: list[str]) -> None:
    ours, stock = backbones(norm, 3)
    ours = resnet_fused.fuse(ours if whose == "this package's" else copy.deepcopy(stock))
    assert_same_steps(ours, stock)
    if norm == "batch norm":
        assert fused_calls == ["NONE", "IDENTITY", *BLOCKS] * 2


def test_other_eps_of_frozen_norms() -> None:
    ours, stock = backbones("frozen")
    for model in (ours, stock):
        _utils_overwrite_eps(model)
    assert_same_steps(ours, stock)


def _utils_overwrite_eps(model: nn.Module) -> None:
    from torchvision.models.detection._utils import overwrite_eps  # what its pretrained detectors call

    overwrite_eps(model, 0.0)


def losses(detector: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    targets = [
        {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]], dtype=torch.float64), "labels": torch.tensor([1])}
        for _ in pictures
    ]
    return detector(list(pictures), targets)


@pytest.mark.parametrize(("how", "norm"), [("own backbone", "frozen"), ("fused detector", "batch norm")])
def test_training_a_retina_net(how: str, norm: str) -> None:
    found = []
    ours, stock = backbones(norm, 3)
    for backbone in (ours if how == "own backbone" else copy.deepcopy(stock), stock):
        torch.manual_seed(2)
        sizes = tuple((s,) for s in (8, 16, 32, 64, 128))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((1.0,),) * 5)
        detector = detection.RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors).double()
        if how == "fused detector" and backbone is not stock:
            resnet_fused.fuse(detector)
        parts = losses(detector.train(), images(size=64).sigmoid())
        sum(parts.values()).backward()  # type: ignore[union-attr]
        results = {name: loss.detach() for name, loss in parts.items()}
        results |= {f"{n} grad": p.grad for n, p in detector.named_parameters() if p.grad is not None}
        found.append(results | dict(detector.named_buffers()))
    assert_same(*found)
    assert found[0]["bbox_regression"] > 0


@pytest.mark.slow
def test_a_whole_faster_rcnn_is_fused() -> None:
    with torch.device("meta"):
        detector = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    report = resnet_fused.fuse(detector).fusion_report
    assert (len(report.fused), report.left) == (17, [])  # the stem and 16 blocks


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", ["own backbone", "fused"])
def test_segmentation_with_dilation(how: str, fused_calls: list[str]) -> None:
    options: dict[str, Any] = {"num_classes": 2, "replace_stride_with_dilation": [False, True, True]}
    torch.manual_seed(0)
    stock = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], **options)
    ours = resnet_fused.ResNet(resnet_fused.Bottleneck, (1, 1, 1, 1), **options)
    ours.load_state_dict(stock.state_dict())
    made = []
    for network in (ours if how == "own backbone" else copy.deepcopy(stock), stock):
        torch.manual_seed(1)
        body = _utils.IntermediateLayerGetter(network, {"layer4": "out"})
        made.append(segmentation.FCN(body, nn.Conv2d(2048, 3, 1)).double())
    if how == "fused":
        resnet_fused.fuse(made[0])
    assert_same(step(made[0], images(size=33)), step(made[1], images(size=33)))
    assert fused_calls == ["NONE"] * (how == "fused") + ["PROJECTION"] * 4
