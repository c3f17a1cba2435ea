"""Networks to fuse, and what is compared between them and stock; shared by the tests of ``convert``."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from tutorial_networks import PreActivationNet, TutorialResNet18, TutorialResNet101

from resnet_fused import layers
from resnet_fused.testing import import_torchvision

torchvision = import_torchvision()


def timm_model(name: str, **kwargs: object) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **kwargs)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tutorial18": lambda: TutorialResNet18(10),
    "tutorial101": lambda: TutorialResNet101((1, 2, 1, 1), 10),
    "pre-activation": PreActivationNet,
    "torchvision-resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision-resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "torchvision-densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "timm-resnet18": lambda: timm_model("resnet18", num_classes=10),
    "timm-resnet50": lambda: timm_model("resnet50", num_classes=10),
    "timm-resnet26d": lambda: timm_model("resnet26d", num_classes=10),
    "timm-seresnet18": lambda: timm_model("legacy_seresnet18", num_classes=10),
    "timm-drop-path": lambda: timm_model("resnet18", num_classes=10, drop_path_rate=0.3),
    "timm-blur": lambda: timm_model("resnetblur18", num_classes=10),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters away from their initial values, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(eval output, train output, buffers), and all gradients."""
    model.eval()
    with torch.no_grad():
        evaluated = model(x.clone())
    model.train()
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    model.zero_grad()
    trained = model(x)
    (trained * torch.linspace(0.5, 1.5, trained.numel(), dtype=x.dtype).view_as(trained)).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [evaluated, trained.detach(), *model.buffers()], [x.grad, *gradients]


def assert_same(ours: nn.Module, stock: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    values, gradients = step(ours, x)
    wanted, wanted_gradients = step(stock, x)
    for a, b in zip(values, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)
    # A bias before batch norm has gradient zero: rounding is measured against the largest gradient.
    scale = max(g.abs().max() for g in wanted_gradients)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * scale


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of layers.run_* made by models that are fused after this."""
    counter: Counter[str] = Counter()
    for name in ("run_units", "run_stem", "run_bn_act", "run_add_act"):
        original = getattr(layers, name)

        @functools.wraps(original)
        def counting(*args, _name=name, _original=original, **kwargs):
            counter[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(layers, name, counting)
    return counter
