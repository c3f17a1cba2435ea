"""The contestants of ``bench``: which can run, that a graph is the step it was captured from, and what is checked."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from resnet_fused import blocks, models, networks, providers
from resnet_fused.providers import Setting

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import dry_run

TRAIN = Setting("resnet18", "train", "fp32", "cpu", 2, 64)
INFER = Setting("resnet18", "infer", "fp32", "cpu", 2, 64)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A ResNet of one block a stage, in stock PyTorch; "resnet18" is this package's while it is in use."""
    shallow = functools.partial(models.ResNet, blocks.BasicBlock, (1, 1, 1, 1))
    monkeypatch.setitem(models.BUILDERS, "resnet18", shallow)
    monkeypatch.setattr(networks, "_torchvision", lambda: None)
    network = networks.stock_model("resnet18")
    networks.calibrate(network, torch.randn(4, 3, 64, 64))
    return network


def test_what_cannot_run_says_why(monkeypatch):
    assert providers.missing("stock+graph", TRAIN) == "CUDA graphs need a GPU"
    assert providers.missing("fused", TRAIN) == providers.missing("compile-max", INFER) == ""
    find_spec = providers.importlib.util.find_spec
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec(name))
    assert providers.missing("timm+compile", TRAIN) == "timm is not installed"


def test_a_graph_of_a_training_step_gives_its_gradients(source):
    x = torch.randn(4, 2, 3, 64, 64)
    with dry_run.emulated_graphs():
        captured = providers.build("fused+graph", source, TRAIN)
        plain = providers.build("fused", source, TRAIN)
        # The second batch is another shape; the third replays the first graph, whose gradients are read again.
        for images in (x[0], torch.cat([x[1], x[2]]), x[3]):
            images = providers.batch_for(TRAIN, images)
            out, expected = captured.step(images), plain.step(images)
            torch.testing.assert_close(out, expected)
            for ours, theirs in zip(captured.network.parameters(), plain.network.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_a_graph_of_inference(source):
    with dry_run.emulated_graphs(), torch.no_grad():
        step = providers.build("fused+graph", source, INFER).step
        x, y = torch.randn(2, 2, 3, 64, 64)
        expected = [source.eval()(images) for images in (x, y)]
        for images, logits in zip((x, y), expected):
            torch.testing.assert_close(step(images), logits, rtol=1e-4, atol=1e-4)


def test_timms_network_is_the_same():
    if providers.missing("timm+compile", INFER):
        pytest.skip(providers.missing("timm+compile", INFER))
    source, x = networks.stock_model("resnet18"), torch.randn(2, 3, 64, 64)
    with mock.patch.object(torch, "compile", dry_run.uncompiled):
        out = providers.build("timm+compile", source, INFER).step(x)
    with torch.no_grad():
        torch.testing.assert_close(out, source.eval()(x))


def test_float64_of_a_whole_batch(source):
    """Checkpoints change no gradient."""
    x = torch.randn(2, 3, 64, 64)
    gold = providers.gold_answer(source, TRAIN, x)
    plain = networks.double_copy(source).train()
    networks.training_step(plain, x.double(), TRAIN.target(2), torch.float64)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gold.gradients[name], parameter.grad)
