"""timm's BatchNormAct2d, a batch norm with an activation of its own, in fused networks beside the stock ones."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import assert_same_steps, step
from stock_pairs import assert_same, images
from torch import nn

import resnet_fused
from resnet_fused.testing import import_torchvision, randomise_norms

import_torchvision()
timm = pytest.importorskip("timm", reason="timm is not installed")

_NORM_ACT: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnetv2": ("resnetv2_50", {"layers": (1, 1), "channels": (16, 32), "num_classes": 10}, 7),
    "regnet": ("regnetx_002", {"num_classes": 10}, 44),
    "densenet": ("densenet121", {"block_config": (2, 2), "growth_rate": 8, "num_classes": 10}, 3),
}


@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=pytest.mark.slow) if name == "regnet" else name for name in _NORM_ACT]
)
def test_batch_norm_with_activation(network: str, fused_calls: list[str]) -> None:
    name, kwargs, chains = _NORM_ACT[network]
    torch.manual_seed(0)
    stock = randomise_norms(timm.create_model(name, **kwargs)).double()
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    assert_same_steps(ours, stock)
    assert len(fused_calls) == 2 * chains


def conv_norm_act(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    stock = randomise_norms(timm.layers.ConvNormAct(3, 6, 3, 2, **kwargs)).double()
    return resnet_fused.fuse(copy.deepcopy(stock)), stock


@pytest.mark.parametrize(
    ("kwargs", "chains"),
    [
        ({}, 1),
        ({"apply_act": False}, 1),
        ({"act_layer": nn.SiLU}, 0),
        ({"drop_layer": partial(nn.Dropout, 0.5)}, 0),
        ({"norm_kwargs": {"affine": False}}, 0),
        ({"norm_kwargs": {"momentum": None}}, 1),
    ],
)
def test_conv_norm_act(kwargs: dict[str, Any], chains: int, fused_calls: list[str]) -> None:
    if "norm_kwargs" in kwargs and "affine" in kwargs["norm_kwargs"]:
        stock = timm.layers.ConvNormAct(3, 6, 3, 2, **kwargs).double()
        ours = resnet_fused.fuse(copy.deepcopy(stock))
    else:
        ours, stock = conv_norm_act(**kwargs)
    assert_same_steps(ours, stock)
    assert len(fused_calls) == 2 * chains


@pytest.mark.parametrize("path", ["conv", "bn", "bn.act", "bn.drop"])
def test_hooks_inside_a_norm_with_activation_fire(path: str, fused_calls: list[str]) -> None:
    results = []
    for model in conv_norm_act():
        model.get_submodule(path).register_forward_hook(lambda module, args, out: out * 0.5)
        results.append(step(model, images()))
    assert_same(*results)
    assert not fused_calls


def test_an_activation_changed_after_fusing_is_seen() -> None:
    ours, stock = conv_norm_act()
    for model in (ours, stock):
        model.bn.act = nn.GELU()
    assert_same_steps(ours, stock)
