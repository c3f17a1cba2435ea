"""The backend behind whole blocks and a whole network: as accurate as stock PyTorch in the same dtype, against float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from block_cases import BLOCKS, check_block, check_network, check_synchronised, narrow_network
from torch import Tensor
from torch.nn import functional as F

import resnet_fused
from resnet_fused import backends
from resnet_fused.backends.operands import Conv, Pending, PendingGrad
from resnet_fused.backends.triton import bn, conv3x3, pool, products
from resnet_fused.backends.triton.dispatch import takes

pytestmark = pytest.mark.one_in(10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, training: bool, dtype: torch.dtype) -> None:
    check_block(name, training, dtype, "triton")


@pytest.mark.parametrize("name", BLOCKS)
def test_training_with_cudnns_conv3x3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("triton"), "own_conv3x3", False)
    test_blocks(name, True, torch.bfloat16)


@pytest.mark.parametrize("name", BLOCKS)
def test_synchronised_blocks(name: str, dtype: torch.dtype) -> None:
    check_synchronised(name, dtype, "triton")


# The kernels do not tell float16 from bfloat16, and the blocks above run in both.
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_a_whole_network(training: bool, dtype: torch.dtype) -> None:
    check_network(training, dtype, "triton")


@pytest.mark.slow
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


@pytest.mark.slow
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
