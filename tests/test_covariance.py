"""The covariance plan in every mode: gradients and running statistics. Accuracy: test_covariance_accuracy.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from chain_cases import norms, run
from covariance_networks import (
    MODES,
    assert_same,
    block,
    every_case,
    inputs_of,
    pair,
    set_mode,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import backends
from resnet_fused.plans import choice
from resnet_fused.plans.spec import Conv


@every_case
@pytest.mark.parametrize("wish", choice.CHOICES)
@pytest.mark.parametrize("mode", MODES)
def test_float64_equals_stock(backend: str, name: str, mode: str, wish: str) -> None:
    ours, stock = pair(name)
    set_mode(ours, mode), set_mode(stock, mode)
    with resnet_fused.covariance(wish):
        for _ in range(2):  # running statistics over two steps
            a, b = run(ours, inputs_of(name)), run(stock, inputs_of(name))
        assert_same(a, b)


@every_case
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend: str, name: str, mode: str) -> None:
    ours, _ = pair(name)
    set_mode(ours, mode)
    inputs = inputs_of(name)
    count = len(inputs)
    assert gradcheck(lambda *t: ours(*t[:count]), (*inputs, *ours.parameters()), fast_mode=True)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", ["bottleneck-strided", pytest.param("basic-projection", marks=pytest.mark.slow), "conv-residual"]
)
@pytest.mark.parametrize("mode", ["train", "last"])
def test_gradcheck_every_entry_of_the_jacobian(backend: str, name: str, mode: str) -> None:
    ours, _ = pair(name)
    set_mode(ours, mode)
    inputs = [x.detach()[:, :, :3, :4].clone().requires_grad_() for x in inputs_of(name)[:1]]
    residual = [torch.randn(2, 19, 2, 2, dtype=torch.float64)] if name == "conv-residual" else []
    assert gradcheck(lambda x, *_: ours(x, *residual), (*inputs, *ours.parameters()))


@pytest.mark.parametrize("name", ["conv-strided", "bottleneck-projection"])
def test_double_backward(backend: str, name: str) -> None:
    ours, _ = pair(name)
    assert gradgradcheck(lambda *t: ours(t[0]), (*inputs_of(name), *ours.parameters()), fast_mode=True)


@every_case
@pytest.mark.parametrize("mode", ["train", "eval", "last"])
def test_gradients_of_subsets(backend: str, name: str, mode: str) -> None:
    """Each tensor alone, and everything but it: the gradients that are asked for, and no other."""
    ours, stock = pair(name)
    set_mode(ours, mode), set_mode(stock, mode)
    inputs = inputs_of(name)
    everything = run(stock, inputs)
    names = [key for key in everything if key.endswith("grad")]
    for alone in names:
        for wanted in ([alone], [key for key in names if key != alone]):
            for key, parameter in ours.named_parameters():
                parameter.requires_grad_(f"{key} grad" in wanted)
            for i, x in enumerate(inputs):
                x.requires_grad_(f"input {i} grad" in wanted)
            found = run(ours, inputs)
            assert [key for key in found if key.endswith("grad")] == wanted
            for key in wanted:
                torch.testing.assert_close(found[key], everything[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["conv", "bottleneck-strided", "basic-projection"])
def test_norms_of_different_eps_and_momentum(backend: str, name: str) -> None:
    ours, stock = pair(name)
    for i, (a, b) in enumerate(zip(norms(ours), norms(stock), strict=True)):
        a.eps = b.eps = (1e-5, 0.3, 1e-2)[i % 3]
        a.momentum = b.momentum = (None, 0.7, 0.01)[i % 3]
    for _ in range(3):
        a, b = run(ours, inputs_of(name)), run(stock, inputs_of(name))
    assert_same(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_and_nested_blocks(backend: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    make = [block("Bottleneck", 6, 3, 2, project=True), block("Bottleneck", 12, 3)]
    ours = nn.Sequential(make[0][0](), nn.Sequential(make[1][0]())).double()
    stock = nn.Sequential(make[0][1](), nn.Sequential(make[1][1]())).double()
    ours.load_state_dict(stock.state_dict())
    checkpointed = copy.deepcopy(ours)
    checkpointed.forward = lambda x: checkpoint(  # type: ignore[method-assign]
        lambda t: nn.Sequential.forward(checkpointed, t), x, use_reentrant=use_reentrant
    )
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = run(stock, [x])
    assert_same(run(ours, [x]), expected)
    found = run(checkpointed, [x])
    # A checkpoint runs the forward twice, and so does stock's: the running statistics move twice.
    assert_same(
        {k: v for k, v in found.items() if k in expected and ("grad" in k or k == "out")},
        {k: v for k, v in expected.items() if "grad" in k or k == "out"},
    )


def test_one_value_per_channel_is_refused_as_in_stock(backend: str) -> None:
    ours, stock = pair("conv")
    x = torch.randn(1, 7, 1, 1, dtype=torch.float64)
    messages = []
    for module in (ours, stock):
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            module(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# Planted errors


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-strided", "conv-strided", "basic-projection"])
@pytest.mark.parametrize("plant", ["mask", "coupling", "moments", "stride"])
def test_a_planted_error_is_found(backend: str, monkeypatch: pytest.MonkeyPatch, plant: str, name: str) -> None:
    kernels = type(backends.get(backend))
    wgrad, dgrad, gram = kernels.wgrad_bn_act, kernels.dgrad_bn_act, kernels.gram
    planted: dict[str, Callable] = {
        "mask": lambda self, grad, mask, operands: wgrad(self, grad, None, operands),
        "coupling": lambda self, grad, mask, weight, conv, feedback, acc=None: dgrad(
            self, grad, mask, weight, conv, None, acc
        ),
        "moments": lambda self, a, conv: (gram(self, a, conv)[0], gram(self, a, conv)[1] * 1.001),
        "stride": lambda self, a, conv: gram(self, a, Conv()),
    }
    if plant == "stride" and "strided" not in name:
        pytest.skip("nothing strides here")
    if plant == "mask" and name == "basic-projection":
        pytest.skip("both norms of the sum share the mask of the other plan's kernels; covered by the others")
    method = {"mask": "wgrad_bn_act", "coupling": "dgrad_bn_act"}.get(plant, "gram")
    monkeypatch.setattr(kernels, method, planted[plant])
    ours, stock = pair(name)
    with pytest.raises(AssertionError):
        assert_same(run(ours, inputs_of(name)), run(stock, inputs_of(name)))
