"""The covariance plan as an operator of PyTorch: the traps of autograd, and what is saved."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from chain_cases import norms
from covariance_networks import (
    assert_same,
    inputs_of,
    pair,
    projection,
    set_mode,
    unit,
)
from torch import Tensor, nn

import resnet_fused
from resnet_fused import backends
from resnet_fused.plans.choice import choose_plans
from resnet_fused.plans.spec import Chain, Shortcut, Tail

# The traps of autograd


@pytest.mark.one_in(3)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(project: bool, training: bool, backend: str) -> None:
    x = torch.randn(2, 6, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    units = [unit(4, 6, training=training), unit(9, 4, training=training)]
    if project:
        units.append(unit(9, 6, training=training))
    shortcut = Shortcut.PROJECTION if project else Shortcut.NONE
    chain = choose_plans(Chain(tuple(units), shortcut, Tail.RELU))
    assert [u.covariance for u in chain.units[1:]] == [True] * (1 + project)
    parameters, running, spec, eps = chain.flatten()
    args = (x, None, parameters, running, spec, eps, "", True, backend)
    torch.library.opcheck(torch.ops.resnet_fused.chain.default, args)
    with torch.no_grad():
        out, *saved = torch.ops.resnet_fused.chain(*args)
    for need in (True, False):
        needs = [need, False, *[True] * len(parameters)]
        detached = [t.detach() for t in parameters]
        args = (torch.ones_like(out), x.detach(), detached, saved, spec, eps, "", needs, backend)
        torch.library.opcheck(torch.ops.resnet_fused.chain_backward.default, args)


def test_transforms_take_the_plain_path(backend: str) -> None:
    """torch.func.grad, jvp and fx: an operator with an autograd formula fails, is silently wrong, or loses its backward."""
    ours, stock = (module.eval() for module in pair("bottleneck-projection"))
    x = inputs_of("bottleneck-projection")[0].detach()
    results = []
    for module in (ours, stock):
        gradient = torch.func.grad(lambda t, m=module: m(t).square().sum())(x)
        tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
        results.append({"grad": gradient, "jvp": tangent})
    assert_same(*results)
    traced = torch.fx.symbolic_trace(ours)
    y = x.clone().requires_grad_()
    traced(y).sum().backward()
    z = x.clone().requires_grad_()
    stock(z).sum().backward()
    torch.testing.assert_close(y.grad, z.grad)


def test_no_zero_filled_gradients_for_what_is_saved(backend: str) -> None:
    ours, _ = pair("bottleneck-projection")
    out = ours(inputs_of("bottleneck-projection")[0])
    with torch.profiler.profile(record_shapes=True) as profile:
        out.sum().backward()
    filled = [e for e in profile.events() if e.name == "aten::zeros" and len(e.input_shapes[0]) == 4]
    assert not filled


def test_autocast_casts_the_input_and_the_filters_alone(backend: str) -> None:
    """Batch norm's parameters and running statistics stay float32, and so do all gradients."""
    ours = resnet_fused.Bottleneck(8, 4, 1, projection(8, 16, 1))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    kernels = type(backends.get(backend))
    patch = mock.patch.object(kernels, "fprop_bn_act", autospec=True, side_effect=kernels.fprop_bn_act)
    with patch as fprop, torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    _, products, shift, *_ = fprop.call_args.args
    for product in products:
        assert (out.dtype, product.a.dtype, product.weight.dtype) == (torch.bfloat16,) * 3
        assert (product.scale.dtype, shift.dtype) == (torch.float32,) * 2
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in [x, *ours.parameters()])


def test_buffers_may_change_before_the_backward(backend: str) -> None:
    """Training moves the running statistics at once; frozen ones may be edited, and the saved copies count."""
    for mode in ("train", "eval"):
        ours, stock = pair("bottleneck-projection")
        set_mode(ours, mode), set_mode(stock, mode)
        x, y = (inputs_of("bottleneck-projection")[0] for _ in range(2))
        stock(y).sum().backward()
        out = ours(x)
        with torch.no_grad():
            for norm in norms(ours):
                norm.running_mean.add_(1)
                norm.running_var.mul_(2)
        out.sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


def test_an_edit_through_data_is_seen_at_once(backend: str) -> None:
    """``p.data`` edits leave no version: nothing derived from a filter or a statistic may be kept between calls."""
    ours, stock = (module.eval() for module in pair("bottleneck-projection"))
    x = inputs_of("bottleneck-projection")[0].detach()
    ours(x)
    for module in (ours, stock):
        module.conv3.weight.data.mul_(1.5)
        module.bn3.running_var.data.add_(0.7)
        module.downsample[1].weight.data.neg_()
    torch.testing.assert_close(ours(x), stock(x))


# What is saved


def saved_by(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Every tensor that the forward hands to autograd, parameters left out."""
    own = {p.data_ptr() for p in module.parameters()}
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(*inputs)
    return [t for t in found if t.data_ptr() not in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_bottleneck_saves_its_input_two_raw_outputs_bits_and_moments(backend: str, dtype: torch.dtype) -> None:
    ours = resnet_fused.Bottleneck(32, 8).to(dtype)
    x = torch.randn(2, 32, 6, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    moments = torch.float64 if dtype == torch.float32 else torch.float32
    expected = [
        ("x", (2, 32, 6, 5), dtype),
        ("statistics", (2, 8 + 8 + 32), torch.float32),
        ("y1", (2, 8, 6, 5), dtype),
        ("y2", (2, 8, 6, 5), dtype),
        ("moments", (8 + 36,), moments),
        ("mask", (2 * 32 * 30 // 8,), torch.uint8),
    ]
    found = [(tuple(t.shape), t.dtype) for t in saved_by(ours, [x])]
    assert found == [(shape, kind) for _, shape, kind in expected]


def test_a_projection_adds_only_its_moments(backend: str) -> None:
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    block = resnet_fused.Bottleneck(16, 8, 2, projection(16, 32, 2))
    shapes = [tuple(t.shape) for t in saved_by(block, [x])]
    assert shapes == [(2, 16, 6, 6), (2, 80), (2, 8, 6, 6), (2, 8, 3, 3), (8 + 36,), (16 + 136,), (2 * 32 * 9 // 8,)]


def test_nothing_is_saved_beside_autograd(backend: str) -> None:
    """The context of the block's node holds no tensor but the saved ones."""
    out = resnet_fused.Bottleneck(32, 8)(torch.randn(2, 32, 4, 4, requires_grad=True))
    node = out.grad_fn
    kept = [value for key, value in vars(node).items() if key != "saved_tensors"]
    assert not any(isinstance(t, Tensor) for value in kept for t in (value if isinstance(value, list) else [value]))


def test_frozen_statistics_save_no_moments(backend: str) -> None:
    block = resnet_fused.Bottleneck(32, 8).eval()
    shapes = [tuple(t.shape) for t in saved_by(block, [torch.randn(2, 32, 4, 4, requires_grad=True)])]
    assert (8 + 36,) not in shapes and len(shapes) == 5
