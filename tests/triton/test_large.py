"""Tensors of more than 2³¹ elements: the last program of a launch reads and writes at the end of the tensor.

Pages that nobody touches take no memory, so the tensors cost little.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from triton.runtime import interpreter

from resnet_fused.backends.aten import AtenKernels, pack_mask, rows
from resnet_fused.backends.operands import Conv, Pending
from resnet_fused.backends.triton import bn, conv3x3, cross_products, launching, pool, products, residual
from resnet_fused.backends.triton.tuning import Config

ATEN = AtenKernels()
DTYPE, C, SIDE = torch.bfloat16, 16, 128
N = 2**31 // (C * SIDE * SIDE) + 1  # the last image lies beyond 2³¹ elements
TILE = Config(16, 16, 16, 4, 1)
LAST = SIDE * SIDE  # rows of the last image
PAGES = Config(LAST, 16, 16, 4, 1)  # for sums over rows: one chunk an image


@pytest.fixture(autouse=True)
def _only_the_last_program(monkeypatch):
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    place, size = type(builder).set_grid_idx, type(builder).set_grid_dim

    def run_last(self, *args, **kwargs):
        grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
        monkeypatch.setattr(builder, "set_grid_dim", lambda *dims: size(builder, *grid), raising=False)
        monkeypatch.setattr(builder, "set_grid_idx", lambda *at: place(builder, *(n - 1 for n in grid)), raising=False)
        self.grid = (1,)
        run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last)
    # It would copy every argument onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(launching, "multiprocessors", lambda device: 2**30)  # a tile, or a chunk, for each program


@pytest.fixture
def merged(monkeypatch):
    """Partial results of the last program stand for all."""
    monkeypatch.setattr(bn, "merge_sums", lambda partials: partials[-1])
    monkeypatch.setattr(bn, "merge_moments", lambda partials, m, of: partials[-1].unbind())
    monkeypatch.setattr(pool, "merge_sums", lambda partials: partials[-1])


def large(n: int = N, side: int = SIDE) -> torch.Tensor:
    """Random in its last image."""
    x = torch.empty((n, C, side, side), dtype=DTYPE, memory_format=torch.channels_last)
    x[-1] = torch.randn(C, side, side)
    return x


def vectors(count: int) -> list[torch.Tensor]:
    return [0.5 + torch.rand(C) for _ in range(count)]


def assert_end(found: torch.Tensor, expected: torch.Tensor, count: int) -> None:
    """The last ``count`` rows of an image; one rounding may differ."""
    torch.testing.assert_close(rows(found[-1:])[-count:], rows(expected)[-count:], rtol=2**-7, atol=2**-7)


def test_it_is_large():
    assert large().numel() - large()[-1].numel() == 2**31


def test_bn_act():
    x, (scale, shift) = large(), vectors(2)
    assert_end(
        bn.bn_act(x, scale, shift, None, True, False, config=TILE)[0],
        ATEN.bn_act(x[-1:], scale, shift, None, True, False)[0],
        16,
    )


def test_bn_act_backward():
    x, grad, (mean, scale, shift, *abc) = large(), large(), vectors(6)
    found = bn.bn_act_backward(grad, x, None, mean, scale, shift, True, abc, config=TILE)
    assert_end(found, ATEN.bn_act_backward(grad[-1:], x[-1:], None, mean, scale, shift, True, abc), 16)


@pytest.mark.parametrize("name", ["bn_stats", "bn_act_backward_reduce"])
def test_sums(name, merged):
    x, grad, (mean, scale, shift) = large(), large(), vectors(3)
    count = 64 * TILE.block_m  # rows of the last program
    end = rows(x[-1:])[-count:].t().reshape(1, C, 1, -1)
    end_grad = rows(grad[-1:])[-count:].t().reshape(1, C, 1, -1)
    if name == "bn_stats":
        found_mean, found_square = bn.bn_stats(x, config=TILE)
        var, exact = torch.var_mean(end.double(), (0, 2, 3), unbiased=False)
        torch.testing.assert_close(found_mean, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_square, var * count, rtol=1e-6, atol=0)
    else:
        found = bn.bn_act_backward_reduce(grad, x, None, mean, scale, shift, False, False, config=TILE)[:2]
        expected = ATEN.bn_act_backward_reduce(end_grad, end, None, mean, scale, shift, False, False)[:2]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_add_relu():
    a, b = large(), large()
    assert_end(residual.add_relu(a, b, True)[0], torch.relu(a[-1:] + b[-1:]), 16)


def test_products():
    x, grad, weight = large(), large(), torch.randn(C, C, 1, 1).to(DTYPE)
    a = Pending(x, *vectors(2), True)
    applied = ATEN.bn_act(x[-1:], a.scale, a.shift, None, True, False)[0]
    assert_end(products.fprop(a, weight, Conv(), False, TILE)[0], F.conv2d(applied, weight), 16)
    found = products.dgrad(grad, weight, Conv(), x.shape, residual=x, config=TILE)[0]
    assert_end(found, F.conv_transpose2d(grad[-1:], weight) + x[-1:], 16)


def test_a_mask_beyond_its_two_gigabits():
    grad, weight = large(), torch.randn(C, C, 1, 1).to(DTYPE)
    bits = torch.rand(1, C, SIDE, SIDE).contiguous(memory_format=torch.channels_last) > 0.5
    mask = torch.empty(N * C * LAST // 8, dtype=torch.uint8)
    mask[-C * LAST // 8 :] = pack_mask(bits)
    found = products.dgrad_bn_act(grad, mask, weight[:, :, 0, 0], Conv(), None, config=TILE)[0]
    assert_end(found, F.conv_transpose2d(torch.where(bits, grad[-1:], 0), weight), 16)


def test_products_over_rows(monkeypatch):
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: plain(*args, **kwargs).zero_())
    x, grad = large(), large()
    end, end_grad = rows(x[-1:]).double(), rows(grad[-1:]).double()
    found = cross_products.wgrad(grad, x, Conv(), PAGES)
    torch.testing.assert_close(found.double(), end_grad.t() @ end, rtol=1e-4, atol=1e-2)
    mean, cov = cross_products.gram(x, Conv(), PAGES)
    second = (cov + torch.outer(mean, mean)) * N * LAST  # the last image's part of it
    torch.testing.assert_close(second, end.t() @ end, rtol=1e-4, atol=1e-2)


def test_conv3x3(monkeypatch):
    x, grad, weight = large(), large(), torch.randn(C, C, 3, 3).to(DTYPE)
    assert_end(conv3x3.fprop(x, weight, False, TILE)[0], F.conv2d(x[-1:], weight, padding=1), 16)
    assert_end(conv3x3.dgrad(grad, weight, None, TILE)[0], F.conv_transpose2d(grad[-1:], weight, padding=1), 16)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: plain(*args, **kwargs).zero_())
    found = conv3x3.wgrad(grad, x, PAGES)
    expected = ATEN.wgrad(grad[-1:].float(), x[-1:].float(), weight.float(), Conv(padding=(1, 1)))
    torch.testing.assert_close(found[:, :, 2, 2], expected[:, :, 2, 2], rtol=1e-4, atol=1e-2)


def test_pool(merged):
    x, (scale, shift, mean, *abc) = large(), vectors(6)
    out, index = pool.bn_relu_maxpool(x, scale, shift, config=TILE)
    expected, expected_index = ATEN.bn_relu_maxpool(x[-1:], scale, shift)
    assert_end(out, expected, 16)
    assert torch.equal(rows(index[-1:])[-16:], rows(expected_index)[-16:])
    grad = torch.empty((N, C, SIDE // 2, SIDE // 2), dtype=DTYPE, memory_format=torch.channels_last)
    grad[-1] = torch.randn(C, SIDE // 2, SIDE // 2)
    index[-1] = expected_index[0]
    found = pool.bn_relu_maxpool_backward(grad, index, x, mean, abc, config=TILE)
    assert_end(found, ATEN.bn_relu_maxpool_backward(grad[-1:], expected_index, x[-1:], mean, abc), 16)
