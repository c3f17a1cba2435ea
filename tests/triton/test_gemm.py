"""Rows × filter: ``fprop``, ``fprop_bn_act``, ``dgrad`` and ``dgrad_bn_act`` of 1×1 convolutions against float64.

Stock PyTorch in the same dtype is the yardstick; at the end, errors planted in the kernels that the checks must see.
"""

from __future__ import annotations

import pytest
import torch
from gemm_cases import (
    ALIGNED,
    ATEN,
    NARROW,
    ODD,
    STRIDE,
    assert_as_accurate,
    assert_moments,
    assert_sums,
    every_shape,
    filters,
    flags,
    formed,
    formed_grad,
    gradient,
    images,
    operand,
    vector,
)
from poison import guarded, poison_allocations
from torch.nn import functional as F
from triton import language as tl

from resnet_fused.backends.aten import pack_mask, rows
from resnet_fused.backends.operands import Below, Conv, Product, filter_matrix
from resnet_fused.backends.triton import gemm, language, products, residual
from resnet_fused.backends.triton.launching import described
from resnet_fused.backends.triton.tuning import Config
from resnet_fused.statistics import coupling_shift

pytestmark = pytest.mark.one_in(10)

SMALL = Config(16, 16, 16, 4, 1)
WIDE = Config(32, 16, 32, 4, 1)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_allocations(monkeypatch, 255)


# Forward


def check_fprop(dtype, kind, widths, conv, stats, config=None, mean=0.0):
    c, k = widths
    size, n = ((5, 9), 1) if conv.stride == (1, 1) else ((5, 7), 2)
    a, w = operand(kind, dtype, c, size=size, n=n, mean=mean), filters(dtype, c, k)
    y, found_mean, found_var = products.fprop(a, w, conv, stats, config)
    x = formed(a)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, F.conv2d(x, w, stride=conv.stride), F.conv2d(x.double(), w.double(), stride=conv.stride))
    if stats:
        assert_moments(found_mean, found_var, y)
    else:
        assert found_mean is None and found_var is None
    return y


@flags("stats, kind, conv", [False, True], ["plain", "relu", "affine"], [Conv(), STRIDE])
def test_fprop(dtype, kind, widths, conv, stats):
    check_fprop(dtype, kind, widths, conv, stats)


def test_fprop_statistics_far_from_zero(dtype):
    check_fprop(dtype, "plain", ALIGNED, Conv(), True, mean=1000.0)


def test_fprop_one_row():
    x, w = images(torch.float32, 3, size=(1, 1)), filters(torch.float32, 3, 17)
    y, mean, var = products.fprop(x, w, Conv(), True)
    assert torch.equal(mean, y.flatten()) and torch.equal(var, torch.zeros(17))


@pytest.mark.parametrize("config", [SMALL, WIDE, Config(64, 32, 16, 4, 1)])
def test_tiles(config):
    """Of any size; the same bits twice."""
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(check_fprop(torch.bfloat16, "relu", ODD, Conv(), True, config))
    assert torch.equal(*outputs)


def check_bn_act(dtype, widths, *, dual, residual, relu, save_mask, kind="relu", config=None):
    c, k = widths
    shift = torch.randn(k) * 0.3
    a = operand(kind, dtype, c)
    terms = [Product(a, filters(dtype, c, k), Conv(), vector(k, -1.5, 1.5))]
    if dual:
        x = images(dtype, c + 5, size=(9, 17))
        terms.append(Product(x, filters(dtype, c + 5, k), STRIDE, vector(k, -1.5, 1.5)))
    shortcut = images(dtype, k) if residual else None
    out, mask = products.fprop_bn_act(terms, shift, shortcut, relu, save_mask, config)

    def reference(to, acc):
        z = shift.to(acc).view(1, -1, 1, 1)
        for p in terms:
            product = F.conv2d(formed(p.a).to(to), p.weight.to(to), stride=p.conv.stride)
            z = z + product.to(acc) * p.scale.to(acc).view(1, -1, 1, 1)
        if residual:
            z = z + shortcut.to(acc)
        return (torch.where(z <= 0, 0.0, z) if relu else z).to(to)

    assert_as_accurate(out, reference(dtype, torch.float32), reference(torch.float64, torch.float64))
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_zeros(0))


@flags("dual, residual, relu, save_mask", *[[False, True]] * 4)
def test_fprop_bn_act(dtype, widths, dual, residual, relu, save_mask):
    check_bn_act(dtype, widths, dual=dual, residual=residual, relu=relu, save_mask=save_mask)


@every_shape
def test_fprop_bn_act_of_every_shape(dtype, widths):
    check_bn_act(dtype, widths, dual=True, residual=True, relu=True, save_mask=True, kind="affine")


def test_fprop_bn_act_without_scale(dtype):
    c, k = ALIGNED
    x, w, shift = images(dtype, c), filters(dtype, c, k), torch.randn(k)
    out, _ = products.fprop_bn_act([Product(x, w, Conv())], shift, None, False, False)
    gold = F.conv2d(x.double(), w.double(), shift.double())
    assert_as_accurate(out, F.conv2d(x, w, shift.to(dtype)), gold)


def test_mask_is_of_the_value_as_stored():
    """What float16 rounds to zero does not pass."""
    x = guarded(torch.full((1, 16, 2, 8), 2.0**-13, dtype=torch.float16))
    w = torch.zeros(16, 16, 1, 1, dtype=torch.float16)
    w[:8, 0] = 2.0**-13  # a product of 2⁻²⁶, stored as 0
    w[8:, 0] = 1.0
    out, mask = products.fprop_bn_act([Product(x, w, Conv())], torch.zeros(16), None, True, True)
    assert torch.equal(mask, torch.tensor([0, 255] * 16, dtype=torch.uint8))
    assert (out[:, :8] == 0).all()


# Input gradients


def below_of(dtype, channels, relu):
    return Below(images(dtype, channels), torch.randn(channels), vector(channels), torch.randn(channels) * 0.3, relu)


def gate(below, da):
    """dz of what stock has for da."""
    if not below.relu:
        return da
    activation = ATEN.bn_act(below.y, below.scale, below.shift, None, True, False)[0]
    return torch.where(activation <= 0, 0.0, da)


def assert_sums_of(below, dz, sums):
    assert_sums(sums[0], dz)
    assert_sums(sums[1], dz.double() * (below.y.double() - below.mean.double().view(1, -1, 1, 1)))


def check_dgrad(dtype, widths, pending_kind, shortcut, below_kind, config=None, invert=False):
    c, k = widths
    dy, w = gradient(pending_kind, dtype, k), filters(dtype, c, k)
    residual = mask = below = None
    if shortcut:
        residual = images(dtype, c)
    if shortcut == "masked":
        mask = pack_mask(torch.randn_like(residual) > 0)
    if below_kind:
        below = below_of(dtype, c, below_kind == "relu")
    given = mask if not invert else ~mask
    dx, *sums = products.dgrad(dy, w, Conv(), (1, c, 5, 9), residual, given, below, config)
    dense = formed_grad(dy)

    def reference(to):
        da = F.conv_transpose2d(dense.to(to), w.to(to))
        if residual is not None:
            da = da + (residual if mask is None else ATEN.mask_grad(residual, mask)).to(to)
        return da if below is None else gate(below, da)

    assert_as_accurate(dx, reference(dtype), reference(torch.float64))
    if below is None:
        assert sums == [None, None]
    else:
        assert_sums_of(below, dx, sums)


@flags(
    "shortcut, below_kind, pending_kind", ["", "everywhere", "masked"], ["", "relu", "affine"], ["", "open", "masked"]
)
def test_dgrad(dtype, widths, pending_kind, shortcut, below_kind):
    check_dgrad(dtype, widths, pending_kind, shortcut, below_kind)


def test_no_gradient_passes_an_activation_that_was_rounded_to_zero():
    """float16 has no positive number below 3e-8."""
    grad, y = images(torch.float16, 32), torch.zeros_like(images(torch.float16, 16))
    shift = torch.tensor([1e-8, 1e-3]).repeat(8)
    below = Below(y, torch.zeros(16), torch.ones(16), shift, True)
    dz, sum_dz, _ = products.dgrad(grad, filters(torch.float16, 16, 32), Conv(), (1, 16, 5, 9), below=below)
    assert not dz[:, ::2].any() and not sum_dz[::2].any()
    assert dz[:, 1::2].any(1).all()


def check_dgrad_bn_act(dtype, widths, masked, feedback_kind, conv, below_kind="", gradient_mean=0.0, config=None):
    c, k = widths
    size = (5, 9) if conv.stride == (1, 1) else (9, 18)
    grad = images(dtype, k, mean=gradient_mean)
    mask = pack_mask(torch.randn_like(grad) > 0) if masked else None
    dz = grad if mask is None else ATEN.mask_grad(grad, mask)
    w = filter_matrix(filters(dtype, c, k))
    feedback = None
    if feedback_kind:
        a = operand(feedback_kind, dtype, c, size=size)
        mean_a, mean_dz = rows(formed(a), conv.stride).double().mean(0), rows(dz).double().mean(0)
        coupling = torch.randn(c, c) * 0.1
        feedback = ATEN.feedback_of(a, mean_a.float(), coupling, w, mean_dz.float())
    acc = None if conv.stride == (1, 1) else images(dtype, c, size=size)
    before = None if acc is None else acc.clone()
    below = below_of(dtype, c, below_kind == "relu") if below_kind else None
    da, *sums = products.dgrad_bn_act(grad, mask, w, conv, feedback, acc, below, config)

    def reference(to):
        da = rows(dz).to(to) @ w.to(to)
        if feedback is not None:
            da = da + rows(formed(feedback.a), conv.stride).to(to) @ coupling.to(to)
            shift = coupling_shift(w.double(), mean_dz, coupling.double(), mean_a)
            da = da + shift.to(to)
        da = da.view(1, 5, 9, c).permute(0, 3, 1, 2)
        if before is not None:
            whole = before.to(to)
            whole[:, :, :: conv.stride[0], :: conv.stride[1]] += da
            return whole
        return da if below is None else gate(below, da)

    assert_as_accurate(da, reference(dtype), reference(torch.float64))
    if acc is not None:
        assert da is acc
        untouched = torch.ones_like(acc, dtype=torch.bool)
        untouched[:, :, :: conv.stride[0], :: conv.stride[1]] = False
        assert torch.equal(acc[untouched], before[untouched])
    if below is None:
        assert sums == [None, None]
    else:
        assert_sums_of(below, da, sums)


@flags("feedback_kind, conv, masked", ["", "plain", "relu", "affine"], [Conv(), STRIDE], [False, True])
def test_dgrad_bn_act(dtype, widths, masked, feedback_kind, conv):
    check_dgrad_bn_act(dtype, widths, masked, feedback_kind, conv)


@every_shape
def test_dgrad_bn_act_below(dtype, widths):
    check_dgrad_bn_act(dtype, widths, True, "relu", Conv(), "affine" if widths == NARROW else "relu")


def test_dgrad_bn_act_of_a_gradient_with_a_mean(dtype):
    check_dgrad_bn_act(dtype, ALIGNED, False, "relu", Conv(), gradient_mean=30.0)


def test_dgrad_refuses():
    grad, w = images(torch.float32, 32), filters(torch.float32, 16, 32)
    with pytest.raises(ValueError, match="without stride"):
        products.dgrad(grad, w, STRIDE, (1, 16, 9, 18))
    with pytest.raises(ValueError, match="acc"):
        products.dgrad_bn_act(grad, None, filter_matrix(w), STRIDE, None)
    with pytest.raises(ValueError, match="below"):
        below = below_of(torch.float32, 16, True)
        products.dgrad_bn_act(grad, None, filter_matrix(w), Conv(), None, images(torch.float32, 16), below)
    with pytest.raises(ValueError, match="float16"):
        products.dgrad(grad.half(), w, Conv(), (1, 16, 5, 9))
    with pytest.raises(ValueError, match="channels_last"):
        products.fprop(torch.randn(1, 16, 5, 9), w, Conv(), False)


# Planted errors: the checks above must see each of them


def test_sees_a_dropped_last_tile(monkeypatch):
    real = products.rows_of
    monkeypatch.setattr(products, "rows_of", lambda shape: real(shape) - 13)
    with pytest.raises(AssertionError):
        check_fprop(torch.float32, "plain", ODD, Conv(), False)
    with pytest.raises(AssertionError):
        check_dgrad(torch.float32, ODD, False, "", "")


def test_sees_unmasked_statistics(monkeypatch, dtype):
    def moments(x, valid, count):
        mean = tl.sum(x, 0) / count
        return mean, tl.sum((x - mean[None, :]) * (x - mean[None, :]), 0)

    for module in (gemm, language):  # half precision, float32
        monkeypatch.setattr(module, "tile_moments", moments)
    with pytest.raises(AssertionError):
        check_fprop(dtype, "affine", ODD, Conv(), True)


def test_sees_statistics_of_unrounded_values(dtype):
    if dtype == torch.float32:
        pytest.skip("nothing is rounded")
    x, w = images(dtype, 35), filters(dtype, 35, 40)
    y = products.fprop(x, w, Conv(), False)[0]
    unrounded = F.conv2d(x.double(), w.double())
    var, mean = torch.var_mean(unrounded, (0, 2, 3), unbiased=False)
    with pytest.raises(AssertionError):
        assert_moments(mean.float(), var.float(), y)


def test_sees_a_second_rounding():
    """A sum rounded before the shortcut is added."""
    torch.manual_seed(0)
    dx, residual = torch.randn(1, 16, 5, 9) * 100, torch.randn(1, 16, 5, 9)
    residual -= dx.bfloat16().float()
    gold = (dx + residual).double()
    once, twice = (dx + residual).bfloat16(), (dx.bfloat16() + residual.bfloat16()).bfloat16()
    with pytest.raises(AssertionError):
        assert_as_accurate(twice, once, gold)


def test_sees_a_wrong_mask():
    for widths in (ODD, ALIGNED):
        with pytest.raises(AssertionError):
            check_dgrad(torch.bfloat16, widths, False, "masked", "", invert=True)


def test_sees_a_mask_of_other_bits(monkeypatch):
    for module in (gemm, residual):  # rows that end on bytes, and others
        monkeypatch.setattr(module, "passes", lambda z: z < 0)
    for widths in (ODD, NARROW):
        with pytest.raises(AssertionError):
            check_bn_act(torch.float32, widths, dual=False, residual=True, relu=True, save_mask=True)
    with pytest.raises(AssertionError):
        check_dgrad(torch.float32, ODD, False, "", "relu")


def test_which_matrices_are_described():
    """Rows of whole 16 bytes that start at one; the others, and what is not launched, stay as they are."""
    x = images(torch.bfloat16, 16)
    assert described(x, 64, 32).block_shape == [64, 32] and described(x, 64, 32).shape == [45, 16]
    memory = torch.zeros(16 * 45 + 1, dtype=torch.bfloat16)
    shifted = memory[1:].view(1, 5, 9, 16).permute(0, 3, 1, 2)
    for plain in (images(torch.bfloat16, 12), shifted, x[:0], torch.empty_like(x, device="meta"), None):
        assert described(plain, 64, 32) is plain
