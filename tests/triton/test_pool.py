"""The stem's max pooling in Triton, forward and backward: winners exactly those of stock PyTorch, values against float64."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import Case
from poison import guarded, poison_allocations
from torch.nn import functional as F

from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.triton import bn, pool
from resnet_fused.backends.triton.configs import Config
from resnet_fused.testing import assert_as_accurate

pytestmark = pytest.mark.one_in(10)

stock = AtenKernels()
# Even and odd sizes, one pixel, one line, one column; channels beside and beyond a tile; tiles that end inside a line.
SHAPES = [(1, 3, 1, 1), (2, 8, 5, 8), (1, 17, 6, 7), (1, 35, 9, 5), (1, 64, 4, 4), (2, 5, 1, 6), (1, 3, 7, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
TILE = Config(16, 32, 1, 4, 1)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_allocations(monkeypatch, 99)


def whole_numbers(shape, dtype, generator):
    """Few values, so that windows have several maxima; sums and products of them are exact."""
    return guarded(torch.randint(-2, 4, shape, generator=generator).to(dtype))


def exact_vectors(channels):
    """A scale of either sign and a shift with which whole numbers stay exact in every dtype."""
    scale = torch.tensor([1.0, -1.0, 2.0, 0.5])[torch.arange(channels) % 4]
    return scale, torch.tensor([0.0, 1.0, -0.5])[torch.arange(channels) % 3]


def assert_equal(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@shapes
def test_winners_and_values_with_ties(shape, dtype):
    x = whole_numbers(shape, dtype, torch.Generator().manual_seed(1))
    vectors = exact_vectors(shape[1])
    out, index = pool.bn_relu_maxpool(x, *vectors, config=TILE)
    plain_out, plain_index = stock.bn_relu_maxpool(x, *vectors)
    assert_equal(out, plain_out)
    assert_equal(index, plain_index)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert index.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 19, 11, 13), (1, 8, 8, 9)], ids=str)
def test_winners_with_nan_and_infinities(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = whole_numbers(shape, dtype, generator)
    for value, share in ((math.nan, 0.1), (math.inf, 0.05), (-math.inf, 0.05)):
        x[torch.rand(shape, generator=generator) < share] = value
    ones = torch.ones(shape[1])
    out, index = pool.bn_relu_maxpool(x, ones, ones * 0, config=TILE)
    plain_out, plain_index = stock.bn_relu_maxpool(x, ones, ones * 0)
    assert plain_out.isnan().any()
    assert_equal(out, plain_out)
    assert_equal(index, plain_index)
    frozen = ones, ones * 0, ones * 0
    grad = torch.ones_like(out)
    grad[:, 1] = math.nan
    for coefficients in (frozen, (ones, ones, ones)):
        dx = pool.bn_relu_maxpool_backward(grad, index, x, ones, coefficients, config=TILE)
        assert_equal(dx, stock.bn_relu_maxpool_backward(grad, index, x, ones, coefficients))
    sums = pool.bn_relu_maxpool_backward_reduce(grad, index, x, ones, config=TILE)
    plain = stock.bn_relu_maxpool_backward_reduce(grad, index, x, ones)
    for one, other in zip(sums, plain, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@shapes
def test_values(shape, dtype):
    case = Case(shape, dtype)
    x = guarded(case.x)
    out, index = pool.bn_relu_maxpool(x, case.scale, case.shift, config=TILE)
    # What is pooled is the activation as it would have been stored, bit by bit.
    activation = bn.bn_act(x, case.scale, case.shift, None, True, False, config=TILE)[0]
    assert torch.equal(out, F.max_pool2d(activation, 3, 2, 1))
    ones = torch.ones(shape[1])
    assert torch.equal(index, stock.bn_relu_maxpool(activation, ones, ones * 0)[1])
    gold = stock.bn_relu_maxpool(case.double().x, case.scale.double(), case.shift.double())[0]
    assert_as_accurate(out, stock.bn_relu_maxpool(x, case.scale, case.shift)[0], gold)


@shapes
def test_backward(shape, dtype, monkeypatch):
    case = Case(shape, dtype)
    x = guarded(case.x)
    index = pool.bn_relu_maxpool(x, case.scale, case.shift, config=TILE)[1]
    grad = guarded(torch.randn(index.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    index = guarded(index, 4)
    double = case.double()
    plain = stock.bn_relu_maxpool_backward_reduce(grad, index, x, case.mean)
    gold = stock.bn_relu_maxpool_backward_reduce(grad.double(), index, double.x, double.mean)
    for programs in (512, 1):  # a tile for each program; one program for all tiles
        monkeypatch.setattr(bn, "PROGRAMS", programs)
        sums = pool.bn_relu_maxpool_backward_reduce(grad, index, x, case.mean, config=TILE)
        for i, (one, other, reference) in enumerate(zip(sums, plain, gold, strict=True)):
            assert_as_accurate(one, other, reference, rows=case.rows, name=f"sums[{i}]", scale=1)
    dx = pool.bn_relu_maxpool_backward(grad, index, x, case.mean, case.coefficients, config=TILE)
    plain = stock.bn_relu_maxpool_backward(grad, index, x, case.mean, case.coefficients)
    gold = stock.bn_relu_maxpool_backward(grad.double(), index, double.x, double.mean, double.coefficients)
    assert_as_accurate(dx, plain, gold, name="dx")
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_is_autograd_s():
    """The whole of it, from x to dx, without this package's other code: max pooling of ReLU."""
    x = guarded(torch.randn(2, 8, 7, 10, generator=torch.Generator().manual_seed(3)))
    leaf = x.clone().requires_grad_()
    expected = F.max_pool2d(leaf.relu(), 3, 2, 1)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    expected.backward(grad)
    ones = torch.ones(8)
    out, index = pool.bn_relu_maxpool(x, ones, ones * 0, config=TILE)
    grad = guarded(grad)
    dx = pool.bn_relu_maxpool_backward(grad, index, x, ones, (ones, ones * 0, ones * 0), config=TILE)
    assert torch.equal(out, expected.detach())
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-6, atol=1e-6)


def test_the_same_bits_twice_and_through_the_default_configuration(dtype):
    case = Case((1, 17, 7, 9), dtype)

    def everything(**options):
        out, index = pool.bn_relu_maxpool(case.x, case.scale, case.shift, **options)
        dx = pool.bn_relu_maxpool_backward(out, index, case.x, case.mean, case.coefficients, **options)
        return out, index, dx, *pool.bn_relu_maxpool_backward_reduce(out, index, case.x, case.mean, **options)

    first = everything(config=TILE)
    for one, other in zip(first, everything(config=TILE), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first[:3], everything()[:3], strict=True):
        assert torch.equal(one, other)


def test_other_layouts_are_refused():
    case = Case((2, 8, 6, 6), torch.float32, torch.contiguous_format)
    good = case.x.contiguous(memory_format=torch.channels_last)
    out, index = pool.bn_relu_maxpool(good, case.scale, case.shift, config=TILE)
    for call in (
        lambda: pool.bn_relu_maxpool(case.x, case.scale, case.shift),
        lambda: pool.bn_relu_maxpool_backward_reduce(out.contiguous(), index, good, case.mean),
        lambda: pool.bn_relu_maxpool_backward(out, index.contiguous(), good, case.mean, case.coefficients),
    ):
        with pytest.raises(ValueError, match="channels_last"):
            call()


# The tests must see mistakes.


def _last_maximum(x, scale, shift, **options):
    """Ties to the last: what ``>=`` in place of ``>`` gives."""
    n, c = x.shape[:2]
    out, _ = pool_forward(x, scale, shift, **options)
    taps = F.unfold(
        F.pad(stock.bn_act(x, scale, shift, None, True, False)[0].float(), (1, 1, 1, 1), value=-1), 3, stride=2
    )
    last = 8 - taps.view(n, c, 9, -1).flip(2).argmax(2)
    index = torch.where(out <= 0, 255, last.view(out.shape)).to(torch.uint8)
    return out, index.contiguous(memory_format=torch.channels_last)


pool_forward = pool.bn_relu_maxpool


def test_ties_to_the_last_maximum_are_seen(monkeypatch):
    monkeypatch.setattr(pool, "bn_relu_maxpool", _last_maximum)
    with pytest.raises(AssertionError):
        test_winners_and_values_with_ties((1, 17, 6, 7), torch.float32)


@pytest.mark.parametrize("change", ["a dead winner alive", "transposed positions", "a lost row of windows"])
def test_planted_errors_in_the_backward_are_seen(change, monkeypatch):
    originals = {name: getattr(pool, name) for name in ("bn_relu_maxpool_backward", "bn_relu_maxpool_backward_reduce")}

    def wrong(index):
        if change == "a dead winner alive":
            return torch.where(index == 255, 4, index)
        if change == "transposed positions":
            return torch.where(index == 255, index, index % 3 * 3 + index // 3)
        index = index.clone()
        index[:, :, -1] = 255
        return index

    for name, original in originals.items():
        monkeypatch.setattr(pool, name, lambda grad, index, *r, _f=original, **k: _f(grad, wrong(index), *r, **k))
    with pytest.raises(AssertionError):
        test_backward((1, 17, 6, 7), torch.float32, monkeypatch)
