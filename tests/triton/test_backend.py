"""The backend behind whole blocks and a whole network: as accurate as stock PyTorch in the same dtype, against float64."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from chain_cases import hold_clear, tv
from covariance_networks import projection
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import backends, networks
from resnet_fused.backends.operands import Conv, Pending, PendingGrad
from resnet_fused.backends.triton import bn, conv3x3, pool, products
from resnet_fused.backends.triton.dispatch import takes


def _block(source, kind: str, inplanes: int, planes: int, stride: int, project: bool, **kwargs) -> nn.Module:
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


def compare(ours: nn.Module, stock: nn.Module, x: Tensor, training: bool, dtype: torch.dtype) -> None:
    """Error of every tensor at most twice that of stock's worse layout, and some units in the last place."""
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    stock, ours = (m.to(dtype).to(memory_format=torch.channels_last).train(training) for m in (stock, ours))
    exact = step(copy.deepcopy(stock).double(), x.double(), training)
    theirs = [step(copy.deepcopy(stock), x, training)]
    theirs.append(step(copy.deepcopy(stock).to(memory_format=torch.contiguous_format), x.contiguous(), training))
    with resnet_fused.backend("triton"):
        found = step(ours, x, training)
    assert found.keys() == exact.keys()
    floor = 4 * torch.finfo(dtype).eps
    size = max(t.norm().item() / t.numel() ** 0.5 for key, t in exact.items() if "weight" in key or key == "out")
    for key, gold in exact.items():
        ours_error, *errors = (networks.relative_error(side[key], gold, 1e-3 * size) for side in (found, *theirs))
        stock_error = max(errors)
        assert ours_error <= 2 * stock_error + floor, (key, ours_error, stock_error)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, training: bool, dtype: torch.dtype) -> None:
    stock, ours = (_block(source, *BLOCKS[name]) for source in (tv, resnet_fused))
    hold_clear(stock)
    ours.load_state_dict(stock.state_dict())
    compare(ours, stock, 0.5 * torch.randn(2, BLOCKS[name][1], 7, 6), training, dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_training_with_cudnns_conv3x3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("triton"), "own_conv3x3", False)
    test_blocks(name, True, torch.bfloat16)


# The kernels do not tell float16 from bfloat16, and the blocks above run in both.
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_whole_network(training: bool, dtype: torch.dtype) -> None:
    stock = narrow_network()
    networks.hold_clear_of_kinks(stock)
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    compare(ours, stock, torch.randn(2, 3, 33, 32), training, dtype)


def test_steps_under_autocast() -> None:
    model = resnet_fused.fuse(narrow_network())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with resnet_fused.backend("triton"):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_kernels_are_the_ones_that_run() -> None:
    """Not their stand-ins of the aten backend."""
    wanted = [
        (products, n) for n in ("fprop", "fprop_bn_act", "dgrad", "dgrad_bn_act", "wgrad", "wgrad_bn_act", "gram")
    ]
    wanted += [(conv3x3, n) for n in ("fprop", "dgrad", "wgrad")]
    wanted += [(bn, n) for n in ("bn_act_backward_reduce", "bn_act_backward")]
    wanted += [(pool, n) for n in ("bn_relu_maxpool", "bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward")]
    model = resnet_fused.fuse(narrow_network()).bfloat16()
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with resnet_fused.backend("triton"):
        spies = [mock.patch.object(module, name, wraps=getattr(module, name)) for module, name in wanted]
        calls = [spy.start() for spy in spies]
        try:
            model(x).sum().backward()
        finally:
            for spy in spies:
                spy.stop()
    assert all(call.called for call in calls), [name for (_, name), call in zip(wanted, calls) if not call.called]
    # Batch norm's backward has passes of its own only where the kernels of cuDNN stand behind or in front.
    for name in ("dgrad", "wgrad"):
        for module in (products, conv3x3):
            found = calls[wanted.index((module, name))].call_args_list
            assert any(isinstance(call.args[0], PendingGrad) for call in found), (module, name)


def test_what_the_kernels_do_not_take_runs_on_aten() -> None:
    kernels = backends.get("triton")
    y = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    scale, shift = torch.rand(2, 8, dtype=torch.float64)
    assert isinstance(kernels.operand(y, scale, shift, True, True), Tensor)  # float64
    narrow = y.bfloat16()
    assert isinstance(kernels.operand(narrow, scale.float(), shift.float(), True, True), Tensor)  # contiguous
    narrow = narrow.contiguous(memory_format=torch.channels_last)
    pending = kernels.operand(narrow, scale.float(), shift.float(), True, True)
    assert isinstance(pending, Pending)
    weight = torch.randn(8, 2, 3, 3, dtype=torch.bfloat16)
    grouped = kernels.fprop(pending, weight, Conv(padding=(1, 1), groups=4))
    applied = kernels.bn_act(narrow, scale.float(), shift.float(), None, True, False)[0]
    torch.testing.assert_close(grouped, F.conv2d(applied, weight, padding=1, groups=4))


def test_what_the_kernels_take() -> None:
    x = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    assert takes(x) and not takes(x.double()) and not takes(torch.empty(2, 3, 4, 5, dtype=torch.bfloat16))
    for height, fits in ((2**15 - 1, True), (2**15, False)):  # 2**31 pixels
        assert takes(torch.empty(1, 1, height, 2**16, dtype=torch.bfloat16, device="meta")) == fits


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = products.wgrad_bn_act
    monkeypatch.setattr(products, "wgrad_bn_act", lambda grad, mask, operands: original(grad, None, operands))
    with pytest.raises(AssertionError):
        test_blocks("bottleneck", True, torch.bfloat16)


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in backends.load_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in backends.load_triton()
