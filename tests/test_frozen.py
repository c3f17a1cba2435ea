"""torchvision's FrozenBatchNorm2d in fused units: constant statistics and affine values, whatever ``training`` says."""

from __future__ import annotations

import copy

import pytest
import torch
from feature_cases import assert_same_steps
from stock_pairs import blocks, images
from test_detection import BLOCKS, FrozenBatchNorm2d, backbones, frozen_values
from torch import nn

import resnet_fused


def frozen_blocks(project: bool) -> tuple[nn.Module, nn.Module]:
    ours, stock = blocks(FrozenBatchNorm2d, project)
    frozen_values(stock)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.parametrize("trainable_layers", [5, 2])
def test_pyramids_are_fused(trainable_layers: int, fused_calls: list[str]) -> None:
    ours, stock = backbones("frozen", trainable_layers)
    assert_same_steps(ours, stock)
    assert fused_calls == ["IDENTITY", *BLOCKS] * 2
    fused_calls.clear()
    assert_same_steps(resnet_fused.fuse(copy.deepcopy(stock)), stock)
    assert fused_calls == ["NONE", "IDENTITY", *BLOCKS] * 2


def test_nothing_of_a_frozen_norm_changes_in_training(fused_calls: list[str]) -> None:
    ours, _ = frozen_blocks(True)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    ours.train()(x).sum().backward()
    assert fused_calls == ["PROJECTION"]
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name]) and not buffer.requires_grad and buffer.grad is None, name


@pytest.mark.parametrize("project", [True, False])
def test_a_block_of_frozen_and_learning_norms(project: bool, fused_calls: list[str]) -> None:
    ours, stock = frozen_blocks(project)
    channels = stock.bn2.weight.numel()
    for model in (ours, stock):
        model.bn2 = nn.BatchNorm2d(channels).double()
    assert_same_steps(ours, stock, torch.randn(2, 4, 7, 9, dtype=torch.float64))
    assert len(fused_calls) == 2


def test_values_changed_later_are_seen() -> None:
    ours, stock = frozen_blocks(True)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert_same_steps(ours, stock, x)
    for model in (ours, stock):
        model.bn1.running_var.mul_(3)
        model.bn2.eps = 0.5
    assert_same_steps(ours, stock, x)


def test_under_autocast_the_output_is_promoted_as_stock_s_is(fused_calls: list[str]) -> None:
    ours, stock = (model.float() for model in frozen_blocks(True))
    x = torch.randn(2, 4, 7, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), stock(x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected) and not fused_calls


def test_bfloat16_values(fused_calls: list[str]) -> None:
    ours, stock = (model.bfloat16() for model in frozen_blocks(True))
    x = torch.randn(2, 4, 7, 9, dtype=torch.bfloat16)
    assert ours(x).dtype == stock(x).dtype == torch.bfloat16 and len(fused_calls) == 1
    torch.testing.assert_close(ours(x), stock(x), rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    ours, stock = backbones("frozen")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for name, value in stock(images()).items():
        torch.testing.assert_close(compiled(images())[name], value)
