"""Sums over rows: ``wgrad``, ``wgrad_bn_act`` and ``gram`` of 1×1 convolutions against float64.

Stock PyTorch in the same dtype is the yardstick. Then what holds for every launcher of 1×1 convolutions (no rows, NaN,
infinity); at the end, errors planted in the kernels that the checks must see.
"""

from __future__ import annotations

import pytest
import torch
from gemm_cases import (
    ALIGNED,
    ATEN,
    NAN,
    ODD,
    STRIDE,
    assert_as_accurate,
    assert_sums,
    every_shape,
    filters,
    flags,
    formed,
    formed_grad,
    gradient,
    images,
    operand,
    pending,
    vector,
)
from poison import guarded, poison_allocations
from triton import language as tl

from resnet_fused import backends
from resnet_fused.backends.aten import pack_mask, rows, unpack_mask
from resnet_fused.backends.operands import Below, Conv, Pending, Product, filter_matrix
from resnet_fused.backends.triton import cross, cross_products, gemm, launching, products

pytestmark = pytest.mark.one_in(10)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_allocations(monkeypatch, 255)


@pytest.fixture
def splits(monkeypatch):
    """As many programs as there are chunks of rows."""
    monkeypatch.setattr(launching, "multiprocessors", lambda device: 32)


@flags("pending_kind, kind, conv", ["", "open", "masked"], ["plain", "relu", "affine"], [Conv(), STRIDE])
def test_wgrad(dtype, widths, pending_kind, kind, conv, splits):
    c, k = widths
    dy = gradient(pending_kind, dtype, k)
    a = operand(kind, dtype, c, size=(5, 9) if conv.stride == (1, 1) else (9, 18))
    found = products.wgrad(dy, a, conv)
    assert found.dtype == torch.float32
    dense, x = rows(formed_grad(dy)), rows(formed(a), conv.stride)
    assert_as_accurate(found, dense.float().t() @ x.float(), dense.double().t() @ x.double())


def check_wgrad_bn_act(dtype, widths, masked, centred, dual, kind="relu", mean=0.0, invert=False):
    c, k = widths
    grad = images(dtype, k)
    mask = pack_mask(torch.randn_like(grad) > 0) if masked else None
    operands = [(operand(kind, dtype, c, mean=mean), Conv())]
    if dual:
        operands.append((images(dtype, c + 5, size=(9, 18), mean=mean), STRIDE))
    dz = rows(grad if mask is None else ATEN.mask_grad(grad, mask))
    matrices = [rows(formed(a), conv.stride) for a, conv in operands]
    centres = [m.double().mean(0).float() if centred else None for m in matrices]
    triples = [(a, centre, conv) for (a, conv), centre in zip(operands, centres)]
    found, sum_dz = products.wgrad_bn_act(grad, ~mask if invert else mask, triples)
    for t, matrix, centre in zip(found, matrices, centres):
        assert t.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
        about = 0.0 if centre is None else centre
        gold = dz.double().t() @ (matrix.double() - about)
        stock = dz.float().t() @ (matrix.float() - about if dtype == torch.float32 else matrix.float())
        if dtype != torch.float32 and centre is not None:
            stock = stock - dz.float().sum(0)[:, None] * centre
        assert_as_accurate(t, stock.float(), gold)
    assert_sums(sum_dz, dz.t()[None, :, :, None])


@flags("masked, centred, dual", *[[False, True]] * 3)
def test_wgrad_bn_act(dtype, widths, masked, centred, dual):
    check_wgrad_bn_act(dtype, widths, masked, centred, dual)


@every_shape
def test_wgrad_bn_act_in_many_splits(dtype, widths, splits):
    check_wgrad_bn_act(dtype, widths, True, True, False)


def test_wgrad_bn_act_far_from_zero(dtype, splits):
    check_wgrad_bn_act(dtype, ALIGNED, True, True, False, "plain", 1000.0)


def check_gram(dtype, channels, kind, conv, mean=0.0, size=(7, 11), config=None):
    a = operand(kind, dtype, channels, size=size, mean=mean)
    found_mean, found_cov = products.gram(a, conv, config)
    gold_mean, gold_cov = ATEN.gram(formed(a).double(), conv)
    assert found_mean.dtype == found_cov.dtype == torch.float64
    assert torch.equal(found_cov, found_cov.t())
    assert (found_cov.diagonal() >= 0).all()
    second = gold_cov.diagonal() + gold_mean**2 * (dtype != torch.float32)  # what float32 is rounded against
    size_of = second.sqrt().outer(second.sqrt())
    unit = 2.0**-22 if dtype == torch.float32 else backends.get("triton").gram_unit(found_mean.to(dtype))
    assert ((found_cov - gold_cov).abs() <= 2 * unit * size_of).all()
    assert ((found_mean - gold_mean).abs() <= 2.0**-22 * (gold_mean.abs() + second.sqrt())).all()


@flags("kind, conv", ["plain", "relu", "affine"], [Conv(), STRIDE])
def test_gram(dtype, widths, kind, conv):
    check_gram(dtype, widths[0], kind, conv)


@every_shape
def test_gram_in_many_splits(dtype, widths, splits):
    check_gram(dtype, widths[0], "relu", Conv())


@pytest.mark.parametrize("mean", [60.0, 1000.0])
def test_gram_far_from_zero(dtype, mean, splits):
    check_gram(dtype, 20, "plain", Conv(), mean)


def test_gram_of_constant_channels(dtype, splits):
    x = guarded(torch.full((1, 16, 5, 9), 3.0, dtype=dtype))
    mean, cov = products.gram(x, Conv())
    assert torch.equal(mean, torch.full((16,), 3.0, dtype=torch.float64))
    assert torch.equal(cov, torch.zeros(16, 16, dtype=torch.float64))


def test_gram_of_rows_that_drift(splits):
    """Splits whose means lie far apart."""
    x = torch.randn(1, 16, 16, 8) + 500.0 * torch.arange(16.0).view(1, 1, 16, 1)
    x = guarded(x)
    _, cov = products.gram(x, Conv())
    gold = ATEN.gram(x.double(), Conv())[1]
    assert (cov - gold).abs().max() <= 1e-6 * gold.abs().max()


def test_chunks_keep_what_float32_loses():
    """One large product, then many small ones that it would swallow."""
    x = torch.zeros(1, 16, 1, 512)
    x[..., 0] = 4096.0
    x[..., 16:] = 0.25
    x, grad = guarded(x), guarded(x)
    (t,), _ = products.wgrad_bn_act(grad, None, [(x, None, Conv())])
    gold = rows(grad).double().t() @ rows(x).double()
    assert ((t - gold).abs() <= 1e-12 * gold).all()
    assert (rows(grad).float()[:1].square() + torch.zeros(1)).sum() < gold.sum()


# No rows, NaN and infinity, through every launcher


def test_no_rows(dtype):
    x, w = images(dtype, 16, n=0), filters(dtype, 16, 32)
    y, mask = products.fprop_bn_act([Product(x, w, Conv())], vector(32), None, True, True)
    assert y.shape == (0, 32, 5, 9) and mask.numel() == 0
    assert products.dgrad(y, w, Conv(), x.shape)[0].shape == x.shape
    assert torch.equal(products.wgrad(y, x, Conv()), torch.zeros(32, 16))
    mean, cov = products.gram(x, Conv())
    assert mean.isnan().all() and cov.isnan().all()


def check_nan(dtype):
    c, k = ALIGNED
    x, w = images(dtype, c), filters(dtype, c, k)
    x[0, 3, 2, 4] = NAN
    out, mask = products.fprop_bn_act([Product(x, w, Conv())], torch.randn(k), None, True, True)
    expected = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    expected[0, 0, 2, 4] = True
    assert torch.equal(out.isnan(), expected.expand_as(out))
    assert unpack_mask(mask, out)[out.isnan()].all()

    a = Pending(x, vector(c), torch.randn(c), True)
    y, mean, var = products.fprop(a, w, Conv(), True)
    assert torch.equal(y.isnan(), expected.expand_as(y)) and mean.isnan().all() and var.isnan().all()

    # Its gradient passes; nothing else changes.
    below = Below(x, torch.zeros(c), vector(c), torch.randn(c), True)
    grad = images(dtype, k)
    dz, sum_dz, sum_centred = products.dgrad(grad, w, Conv(), x.shape, below=below)
    assert dz.isfinite().all() and dz[0, 3, 2, 4] != 0
    assert sum_dz.isfinite().all() and torch.equal(sum_centred.isnan(), torch.arange(c) == 3)

    t = products.wgrad(grad, a, Conv())
    assert torch.equal(t.isnan(), (torch.arange(c) == 3).expand(k, c))
    mean, cov = products.gram(x, Conv())
    row = torch.arange(c) == 3
    assert torch.equal(mean.isnan(), row) and torch.equal(cov.isnan(), row[:, None] | row)

    # A masked gradient keeps it out.
    grad[0, 5] = NAN
    mask = pack_mask(~grad.isnan())
    assert products.dgrad_bn_act(grad, mask, filter_matrix(w), Conv(), None)[0].isfinite().all()
    (t,), sum_dz = products.wgrad_bn_act(grad, mask, [(images(dtype, c), None, Conv())])
    assert t.isfinite().all() and sum_dz.isfinite().all()


def test_nan(dtype):
    check_nan(dtype)


def test_infinity_stays_infinity(dtype):
    x, grad = images(dtype, 16), images(dtype, 32)
    grad[0, 0] = grad[0, 0].abs() + 1
    x[0, 0] = x[0, 0].abs() + 1
    x[0, 0, 0, 0] = float("inf")
    t = products.wgrad(grad, x, Conv())
    assert t[0, 0] == float("inf") and t[:, 1:].isfinite().all()


@pytest.mark.parametrize("conv", [Conv(), STRIDE], ids=["dense", "strided"])
def test_shift_that_is_not_finite_stays_in_its_channel(conv):
    """Rows and channels of a tile that lie outside the matrix form no NaN from it."""
    a = pending(torch.float32, 35, size=(5, 9))
    a.shift[4] = float("inf")
    w = filters(torch.float32, 35, 40)
    w[:, 4] = 0
    w[0, 4] = 1
    y, mean, _ = products.fprop(a, w, conv, True)
    assert y[:, 0].isinf().all() and mean[0].isinf() and y[:, 1:].isnan().all()  # Inf·0, as in stock
    t = products.wgrad(images(torch.float32, 40, size=y.shape[2:]), a, conv)
    assert torch.equal(t.isfinite().all(0), torch.arange(35) != 4)


# Planted errors: the checks above must see each of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sees_dropped_rows_in_sums(monkeypatch, dtype):
    real = launching.rows_of
    monkeypatch.setattr(cross_products, "rows_of", lambda shape: real(shape) - 1)
    with pytest.raises(AssertionError):
        check_wgrad_bn_act(dtype, ODD, False, False, False)
    with pytest.raises(AssertionError):
        check_gram(dtype, 16, "plain", Conv())


def test_sees_a_wrong_mask():
    for widths in (ODD, ALIGNED):
        with pytest.raises(AssertionError):
            check_wgrad_bn_act(torch.bfloat16, widths, True, False, False, invert=True)


def test_sees_a_relu_that_loses_nan(monkeypatch):
    monkeypatch.setattr(gemm, "relu", lambda z: tl.where(z > 0, z, 0.0))
    with pytest.raises(AssertionError):
        check_nan(torch.float32)


def test_sees_a_gradient_that_stops_at_nan(monkeypatch):
    monkeypatch.setattr(gemm, "passes", lambda z: z > 0)
    with pytest.raises(AssertionError):
        check_nan(torch.float32)


def test_sees_a_plain_sum_of_chunks(monkeypatch):
    monkeypatch.setattr(cross, "add_exactly", lambda high, low, x: (high + x, low))
    with pytest.raises(AssertionError):
        test_chunks_keep_what_float32_loses()


def test_sees_a_covariance_that_is_not_centred(monkeypatch):
    monkeypatch.setattr(cross, "_first_mean", lambda x, scale, shift, chunk, column, *rest: column.to(tl.float32) * 0)
    with pytest.raises(AssertionError):
        check_gram(torch.float32, 20, "plain", Conv(), 1000.0)
