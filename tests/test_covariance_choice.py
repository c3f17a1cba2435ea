"""Which units follow the covariance plan, and who decides."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from chain_cases import run, tv
from covariance_networks import (
    inputs_of,
    pair,
    unit,
)

import resnet_fused
from resnet_fused import backends, functional
from resnet_fused.plans import choice
from resnet_fused.plans.choice import choose_plans
from resnet_fused.plans.spec import Chain, Shortcut, Tail, Unit


def planned(*units: Unit, shortcut: Shortcut = Shortcut.NONE, tail: Tail = Tail.RELU) -> list[bool]:
    return [u.covariance for u in choose_plans(Chain(units, shortcut, tail)).units]


def test_expanding_pointwise_convolutions_are_chosen() -> None:
    assert planned(unit(32, 8)) == [True]
    assert planned(unit(32, 8, stride=(2, 2))) == [True]
    for other in (unit(8, 8), unit(8, 32), unit(32, 8, 3), unit(32, 8, groups=4), unit(32, 8, padding=(1, 1))):
        assert planned(other) == [False]
    assert planned(unit(1024, 256)) == [True]
    assert planned(unit(1024, 257)) == [False]
    assert planned(unit(32, 8), tail=Tail.RELU_MAXPOOL) == [False]
    # Inside a path an activation would be kept in place of a raw output.
    assert planned(unit(32, 8), unit(64, 32)) == [False, True]
    assert planned(unit(16, 8, 3), unit(16, 8), shortcut=Shortcut.PROJECTION) == [False, True]


def test_the_choice_does_not_depend_on_the_batch() -> None:
    """Neither in the modules nor in what they are asked to run: one exported graph serves every batch."""
    block = resnet_fused.Bottleneck(16, 4)
    specs = []
    with mock.patch.object(torch.ops.resnet_fused, "chain", wraps=torch.ops.resnet_fused.chain) as operator:
        for n, size in ((1, 3), (2, 8), (64, 4)):
            block(torch.randn(n, 16, size, size))
            specs.append(operator.call_args.args[4])
    assert specs[0] == specs[1] == specs[2]


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    with resnet_fused.covariance("never"):
        assert planned(unit(32, 8)) == [False]
        with resnet_fused.covariance("always"):
            assert planned(unit(8, 8)) == planned(unit(8, 32)) == planned(unit(1024, 257)) == [True]
            assert planned(unit(32, 8, groups=4)) == planned(unit(32, 8, 3)) == [False]
        assert planned(unit(32, 8)) == [False]
    assert planned(unit(32, 8)) == [True]
    with pytest.raises(ValueError, match="set_covariance: expected one of auto, always, never, got 'off'"):
        resnet_fused.set_covariance("off")
    monkeypatch.setattr(choice, "_current", None)
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "never")
    assert planned(unit(32, 8)) == [False]
    monkeypatch.setattr(choice, "_current", None)
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "perhaps")
    with pytest.raises(ValueError, match="RESNET_FUSED_COVARIANCE"):
        planned(unit(32, 8))


def test_a_backward_follows_the_plan_of_its_forward(backend: str) -> None:
    ours, stock = pair("bottleneck-projection")
    x, y = inputs_of("bottleneck-projection")[0], inputs_of("bottleneck-projection")[0]
    out = ours(x)
    with resnet_fused.covariance("never"):
        out.sum().backward()
    stock(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_fused_networks_follow_it(source: str, backend: str) -> None:
    if source == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        stock = timm.create_model("resnet26", num_classes=5)
    else:
        stock = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=5)
    stock = stock.double()
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    kernels = type(backends.get(backend))
    with mock.patch.object(kernels, "gram", autospec=True, side_effect=kernels.gram) as gram:
        a = run(ours, [x.clone().requires_grad_()])
    # Bottlenecks of the first three stages, and the projections of the first two; the others have too many channels.
    assert gram.call_count == (3 if source == "torchvision" else 6) + 2
    b = run(stock, [x.clone().requires_grad_()])
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_functional_uses_it(backend: str) -> None:
    kernels = type(backends.get(backend))
    x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(24, 8, 1, 1, requires_grad=True)
    vectors = [torch.ones(24), torch.zeros(24), torch.zeros(24), torch.ones(24)]
    with mock.patch.object(kernels, "fprop_bn_act", autospec=True, side_effect=kernels.fprop_bn_act) as fprop:
        functional.conv_bn_relu(x, weight, *vectors, training=True)
    assert fprop.call_count == 1
