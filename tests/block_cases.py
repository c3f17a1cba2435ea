"""Blocks and a narrow network on a backend, against stock PyTorch in the same dtype and float64."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from chain_cases import hold_clear, tv
from covariance_networks import projection
from torch import Tensor, nn

import resnet_fused
from resnet_fused import collectives, dispatch, networks


def block(source, kind: str, inplanes: int, planes: int, stride: int, project: bool, **kwargs) -> nn.Module:
    cls = getattr(source, kind)
    downsample = projection(inplanes, planes * cls.expansion, stride) if project else None
    return cls(inplanes, planes, stride, downsample, **kwargs)


BLOCKS = {
    "bottleneck": ("Bottleneck", 32, 8, 1, False),
    "bottleneck-strided": ("Bottleneck", 24, 8, 2, True),
    "bottleneck-odd": ("Bottleneck", 20, 5, 1, False),
    "bottleneck-narrowing-projection": ("Bottleneck", 40, 8, 1, True),
    "basic": ("BasicBlock", 16, 16, 1, False),
    "basic-strided": ("BasicBlock", 8, 16, 2, True),
}


def narrow_network() -> nn.Module:
    """torchvision's ResNet, of eight channels where there are 64."""
    model = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=3)
    model.inplanes = 8
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    model.layer1 = model._make_layer(tv.Bottleneck, 4, 2)
    for i, planes in ((2, 8), (3, 8), (4, 12)):
        setattr(model, f"layer{i}", model._make_layer(tv.Bottleneck, planes, 1, stride=2))
    model.fc = nn.Linear(48, 3)
    return model


def step(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step in the dtype of ``x``."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(training)
    with torch.set_grad_enabled(training):
        out = model(x)
    found = {"out": out.detach()}
    if training:
        # With a mean in each channel, as behind an average pooling; alone that would vanish in the batch norms.
        generator = torch.Generator().manual_seed(1)
        mean = torch.linspace(-1, 2, out.shape[1]).view(1, -1, *(1,) * (out.dim() - 2))
        out.backward((mean + torch.randn(out.shape, generator=generator)).to(out.dtype))
        found |= {"dx": x.grad} | {key: p.grad for key, p in model.named_parameters()}
        found |= {key: b.clone() for key, b in model.named_buffers() if b.is_floating_point()}
    return found


def compare(ours: nn.Module, stock: nn.Module, x: Tensor, training: bool, dtype: torch.dtype, backend: str) -> None:
    """Error of every tensor at most twice that of stock's worse layout, and some units in the last place."""
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    stock, ours = (m.to(dtype).to(memory_format=torch.channels_last).train(training) for m in (stock, ours))
    exact = step(copy.deepcopy(stock).double(), x.double(), training)
    theirs = [step(copy.deepcopy(stock), x, training)]
    theirs.append(step(copy.deepcopy(stock).to(memory_format=torch.contiguous_format), x.contiguous(), training))
    with resnet_fused.backend(backend):
        found = step(ours, x, training)
    assert found.keys() == exact.keys()
    floor = 4 * torch.finfo(dtype).eps
    size = max(t.norm().item() / t.numel() ** 0.5 for key, t in exact.items() if "weight" in key or key == "out")
    for key, gold in exact.items():
        ours_error, *errors = (networks.relative_error(side[key], gold, 1e-3 * size) for side in (found, *theirs))
        stock_error = max(errors)
        # In float64 stock is its own reference, and no better than ours where large terms cancel in a gradient.
        allowed = 1e-9 if dtype is torch.float64 else 2 * stock_error + floor
        assert ours_error <= allowed, (key, ours_error, stock_error)


def check_block(name: str, training: bool, dtype: torch.dtype, backend: str) -> None:
    stock, ours = (block(source, *BLOCKS[name]) for source in (tv, resnet_fused))
    hold_clear(stock)
    ours.load_state_dict(stock.state_dict())
    compare(ours, stock, 0.5 * torch.randn(2, BLOCKS[name][1], 7, 6), training, dtype, backend)


def check_network(training: bool, dtype: torch.dtype, backend: str) -> None:
    stock = narrow_network()
    networks.hold_clear_of_kinks(stock)
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    compare(ours, stock, torch.randn(2, 3, 33, 32), training, dtype, backend)


def check_synchronised(name: str, dtype: torch.dtype, backend: str) -> None:
    """The arithmetic of synchronised norms, on a process that is alone in its group."""
    with (
        mock.patch.object(dispatch, "group_name", lambda bn: collectives.WORLD),
        mock.patch.object(collectives, "is_active", lambda name: True),
        mock.patch.object(collectives, "gather", wraps=collectives.gather) as gather,
    ):
        check_block(name, True, dtype, backend)
    assert gather.called
