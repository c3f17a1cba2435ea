"""3×3 convolutions on shifted rows: against float64 with stock PyTorch as yardstick, and each check against planted errors."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from poison import guarded, poison_allocations
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.backends.operands import Below, Conv, Operand, Pending, PendingGrad
from resnet_fused.backends.triton import conv3x3
from resnet_fused.backends.triton.tuning import Config
from resnet_fused.testing import assert_as_accurate

pytestmark = pytest.mark.one_in(10)

SMALL, WIDE, TALL = Config(16, 16, 16, 4, 1), Config(16, 32, 32, 4, 1), Config(64, 16, 16, 4, 1)
# (N, C, H, W, K) and tiles: a ragged last tile of everything; one tile of channels; fewer rows than a tile.
CASES = {
    "ragged": ((2, 17, 3, 5, 19), SMALL),
    "described": ((2, 24, 3, 5, 40), SMALL),  # rows of whole 16 bytes
    "wide": ((1, 17, 5, 6, 19), WIDE),
    "tall": ((2, 8, 4, 7, 5), TALL),
    "line": ((2, 3, 1, 3, 5), SMALL),
    "column": ((2, 3, 5, 1, 5), SMALL),
}
NARROW = (1, 3, 3, 5, 5)  # no rows of whole 16 bytes
ONE = (2, 8, 3, 5, 16)  # one tile of channels, two of rows: the cheapest, for combinations of flags
BORDER = 64  # rows and elements of NaN around each input


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_allocations(monkeypatch, 255)


def guard(t: Tensor) -> Tensor:
    """``t`` between rows of NaN: a tap may reach a line and a pixel beyond."""
    return guarded(t, edge=BORDER * (t.shape[1] if t.dim() == 4 else 1))


def image(dtype: torch.dtype, n: int, c: int, h: int, w: int) -> Tensor:
    return guard((torch.randn(n, c, h, w) + 0.3).to(dtype))


def vector(c: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return guard(torch.empty(c).uniform_(low, high))


def filters(dtype: torch.dtype, k: int, c: int) -> Tensor:
    return guard(torch.randn(k, c, 3, 3).mul_((9 * c) ** -0.5).to(dtype))


def channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def make_operand(mode: str, x: Tensor) -> Operand:
    if mode == "plain":
        return x
    return Pending(x, vector(x.shape[1], 0.5, 1.5), vector(x.shape[1], 0.2, 1), relu=mode == "relu")


def applied(a: Operand, dtype: torch.dtype) -> Tensor:
    """The operand in the arithmetic of ``dtype``, not rounded."""
    if isinstance(a, Tensor):
        return a.to(dtype)
    z = channel(a.scale).to(dtype) * a.y.to(dtype) + channel(a.shift).to(dtype)
    return torch.where(z <= 0, 0.0, z) if a.relu else z


def make_gradient(mode: str, dy: Tensor) -> Tensor | PendingGrad:
    if mode == "plain":
        return dy
    k = dy.shape[1]
    y, slope = image(dy.dtype, *dy.shape), vector(k)
    if mode == "frozen":
        y[0, 0, 0, 0], slope = torch.nan, slope.zero_()
    return PendingGrad(dy, y, vector(k), vector(k, 0.5, 1.5), slope, vector(k, 0.2, 1))


def formed(g: Tensor | PendingGrad, dtype: torch.dtype) -> Tensor:
    if isinstance(g, Tensor):
        return g.to(dtype)
    a, b, c, mean = (channel(v).to(dtype) for v in (g.a, g.b, g.c, g.mean))
    return a * g.dz.to(dtype) + torch.where(b == 0, 0.0, b * (g.y.to(dtype) - mean)) + c


def backward_of(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight of stock PyTorch."""
    geometry = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [True, True, False])[:2]


def check_fprop(t: ModuleType, dtype, shape=ONE, config=SMALL, mode="relu", stats=True) -> None:
    n, c, h, w, k = shape
    a, weight = make_operand(mode, image(dtype, n, c, h, w)), filters(dtype, k, c)
    y, mean, var = t.fprop(a, weight, stats, config)
    assert y.is_contiguous(memory_format=torch.channels_last)
    stock = F.conv2d(applied(a, torch.float32).to(dtype), weight, padding=1)
    assert_as_accurate(y, stock, F.conv2d(applied(a, torch.float64), weight.double(), padding=1))
    if not stats:
        assert mean is None and var is None
        return
    for ours, theirs, gold in zip(
        (var, mean), *(torch.var_mean(y.to(d), (0, 2, 3), unbiased=False) for d in (torch.float32, torch.float64))
    ):
        assert_as_accurate(ours, theirs, gold)


def check_dgrad(t: ModuleType, dtype, shape=ONE, config=SMALL, mode="pending", below="relu") -> None:
    n, c, h, w, k = shape
    g, weight, x = make_gradient(mode, image(dtype, n, k, h, w)), filters(dtype, k, c), image(dtype, n, c, h, w)
    front = None
    if below != "none":
        front = Below(x, vector(c), vector(c, 0.5, 1.5), vector(c), relu=below == "relu")
    dx, sum_dz, sum_dz_centred = t.dgrad(g, weight, front, config)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    stock = backward_of(formed(g, torch.float32).to(dtype), x, weight)[0]
    gold = backward_of(formed(g, torch.float64), x.double(), weight.double())[0]
    if front is None:
        assert sum_dz is None and sum_dz_centred is None
        assert_as_accurate(dx, stock, gold)
        return
    if front.relu:
        z = (x.float() * channel(front.scale) + channel(front.shift)).to(dtype)
        stock, gold = torch.where(z <= 0, 0, stock), torch.where(z <= 0, 0, gold)
    assert_as_accurate(dx, stock, gold)
    for i, ours in enumerate((sum_dz, sum_dz_centred)):
        terms = [dx.to(d) * (x.to(d) - channel(front.mean)) ** i for d in (torch.float32, torch.float64)]
        assert_as_accurate(ours, *(v.sum((0, 2, 3)) for v in terms), scale=terms[1].abs().max().item(), rows=n * h * w)


def check_wgrad(t: ModuleType, dtype, shape=ONE, config=SMALL, gradient="pending", mode="relu") -> None:
    n, c, h, w, k = shape
    g, a = make_gradient(gradient, image(dtype, n, k, h, w)), make_operand(mode, image(dtype, n, c, h, w))
    dweight = t.wgrad(g, a, config)
    assert dweight.is_contiguous(memory_format=torch.channels_last)
    like = torch.zeros(k, c, 3, 3)
    # Stock in float32 on the operands as rounded, which is stricter than stock rounding its result too.
    stock = backward_of(formed(g, torch.float32).to(dtype).float(), applied(a, torch.float32).to(dtype).float(), like)
    gold = backward_of(formed(g, torch.float64), applied(a, torch.float64), like.double())
    assert_as_accurate(dweight, stock[1], gold[1], rows=n * h * w)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", CASES)
def test_shapes(dtype: torch.dtype, case: str) -> None:
    shape, config = CASES[case]
    check_fprop(conv3x3, dtype, shape, config)
    check_dgrad(conv3x3, dtype, shape, config)
    check_wgrad(conv3x3, dtype, shape, config)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("mode", ["plain", "affine", "relu"])
def test_fprop(dtype: torch.dtype, mode: str, stats: bool) -> None:
    check_fprop(conv3x3, dtype, mode=mode, stats=stats)


@pytest.mark.parametrize("below", ["none", "affine", "relu"])
@pytest.mark.parametrize("mode", ["plain", "pending", "frozen"])
def test_dgrad(dtype: torch.dtype, mode: str, below: str) -> None:
    check_dgrad(conv3x3, dtype, mode=mode, below=below)


@pytest.mark.parametrize("mode", ["plain", "affine", "relu"])
@pytest.mark.parametrize("gradient", ["plain", "pending", "frozen"])
def test_wgrad(dtype: torch.dtype, gradient: str, mode: str) -> None:
    check_wgrad(conv3x3, dtype, gradient=gradient, mode=mode)


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_wgrad_in_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    chunks = triton.cdiv(triton.cdiv(2 * 5 * 7, 16), splits)
    monkeypatch.setattr(conv3x3, "split", lambda rows, tiles, block_m, device: (splits, chunks))
    check_wgrad(conv3x3, torch.bfloat16, (2, 3, 5, 7, 5), SMALL)


def test_default_configuration_and_contiguous_filters() -> None:
    x, weight = image(torch.float32, 2, 3, 4, 5), torch.randn(5, 3, 3, 3)
    y = conv3x3.fprop(x, weight, False)[0]
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))
    dx, dweight = backward_of(torch.ones_like(y), x, weight)
    torch.testing.assert_close(conv3x3.dgrad(torch.ones_like(y), weight)[0], dx)
    torch.testing.assert_close(conv3x3.wgrad(torch.ones_like(y), x), dweight)


def test_statistics_with_a_mean_far_above_the_deviation(dtype: torch.dtype) -> None:
    """Sums of squares would lose the variance; and tiles must merge around different means."""
    x = guard((torch.randn(2, 8, 4, 7) + torch.arange(4.0).view(1, 1, 4, 1) * 0.1 + 200).to(dtype))
    weight = torch.zeros(16, 8, 3, 3, dtype=dtype)
    weight[torch.arange(16), torch.arange(16) % 8, 1, 1] = 1
    y, mean, var = conv3x3.fprop(x, weight, True, SMALL)
    torch.testing.assert_close(var.double(), y.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_as_stock(dtype: torch.dtype, bad: float) -> None:
    n, c, h, w, k = 2, 3, 3, 5, 5
    at = (0, 1, 1, 2) if bad == torch.inf else (0, 2, 2, 4)  # inside; and in the last corner of the first image

    def same(ours: Tensor, stock: Tensor) -> None:
        assert torch.equal(ours.isnan(), stock.isnan()) and torch.equal(ours.isinf(), stock.isinf())

    x, dy = image(dtype, n, c, h, w), image(dtype, n, k, h, w)
    x[at] = bad
    weight, (scale, shift) = filters(dtype, k, c), (vector(c, 0.5, 1), vector(c))
    y, mean, var = conv3x3.fprop(Pending(x, scale, shift, True), weight, True, SMALL)
    stock = F.conv2d(applied(Pending(x, scale, shift, True), torch.float32).to(dtype), weight, padding=1)
    same(y, stock)
    same(mean, stock.float().mean((0, 2, 3)))
    assert var.isnan().all()
    stock = torch.where(x.float() * channel(scale) + channel(shift) <= 0, 0, backward_of(dy, x, weight)[0])
    dz, sum_dz, centred = conv3x3.dgrad(dy, weight, Below(x, vector(c), scale, shift, True), SMALL)
    same(dz, stock)
    assert sum_dz.isfinite().all() and not centred[at[1]].isfinite()
    dy[at] = bad
    same(conv3x3.dgrad(dy, weight, None, SMALL)[0], backward_of(dy, x, weight)[0])
    finite = image(dtype, n, c, h, w)
    same(conv3x3.wgrad(dy, finite, SMALL)[at[1], :, 1, 1], backward_of(dy, finite, weight)[1].float()[at[1], :, 1, 1])
    same(conv3x3.wgrad(image(dtype, n, k, h, w), x, SMALL)[:, at[1], 1, 1], torch.full((k,), bad))


def test_no_gradient_passes_an_activation_that_was_rounded_to_zero() -> None:
    """float16 has no positive number below 3e-8."""
    n, c, h, w, k = 1, 4, 5, 6, 7
    y, dy = torch.zeros_like(image(torch.float16, n, c, h, w)), image(torch.float16, n, k, h, w)
    shift = torch.tensor([1e-8, 1e-3, 1e-8, 1e-3])
    front = Below(y, torch.zeros(c), torch.ones(c), shift, True)
    dz, sum_dz, _ = conv3x3.dgrad(dy, filters(torch.float16, k, c), front, SMALL)
    assert not dz[:, ::2].any() and not sum_dz[::2].any()
    assert dz[:, 1::2].any(1).all()


def test_images_do_not_leak_into_each_other(dtype: torch.dtype) -> None:
    n, c, h, w, k = 3, 3, 3, 4, 5
    x, dy, weight = image(dtype, n, c, h, w), image(dtype, n, k, h, w), filters(dtype, k, c)
    for t in (x, dy):
        t[0], t[2] = torch.nan, torch.nan
    a = make_operand("relu", x)
    y = conv3x3.fprop(a, weight, False, SMALL)[0]
    assert y[1].isfinite().all()
    dx = conv3x3.dgrad(make_gradient("pending", dy), weight, None, SMALL)[0]
    assert dx[1].isfinite().all()


def test_same_bits_twice(dtype: torch.dtype) -> None:
    n, c, h, w, k = ONE
    weight, x = filters(dtype, k, c), image(dtype, n, c, h, w)
    a, g = make_operand("relu", x), make_gradient("pending", image(dtype, n, k, h, w))
    front = Below(x, *(vector(c) for _ in range(3)), relu=True)

    def run() -> list[Tensor]:
        return [
            *conv3x3.fprop(a, weight, True, SMALL),
            *conv3x3.dgrad(g, weight, front, SMALL),
            conv3x3.wgrad(g, a, SMALL),
        ]

    assert all(torch.equal(*pair) for pair in zip(run(), run()))


def test_supports() -> None:
    conv = Conv((1, 1), (1, 1))
    x, weight = image(torch.float32, 2, 3, 4, 5), torch.randn(5, 3, 3, 3)
    assert conv3x3.supports(x, weight, conv)
    assert conv3x3.supports(x.half(), weight.half(), conv)
    assert not conv3x3.supports(x, weight.half(), conv)
    assert not conv3x3.supports(x, torch.randn(5, 3, 1, 1), conv)
    assert not conv3x3.supports(x[:0], weight, conv)
    for other in (
        Conv((2, 2), (1, 1)),
        Conv((1, 1), (0, 0)),
        Conv((1, 1), (1, 1), (2, 2)),
        Conv((1, 1), (1, 1), groups=3),
    ):
        assert not conv3x3.supports(x, weight, other)


# Planted errors: a copy of the module with one change must fail the check that passes without it.

FAULTS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "wrong tap": ("(tap % 3 - 1)\n", "(1 - tap % 3)\n", check_fprop),
    "wrong filter tap": ("[n0, tap, c0]", "[n0, 8 - tap, c0]", check_fprop),
    "wrong filter tap by pointers": ("(tap * C + c)", "((8 - tap) * C + c)", partial(check_fprop, shape=NARROW)),
    "filter not flipped": ("[c0, 8 - tap, n0]", "[c0, tap, n0]", check_dgrad),
    "filter not flipped by pointers": ("(8 - tap) * K", "tap * K", partial(check_dgrad, shape=NARROW)),
    "wrong tap in wgrad": ("right = tap % 3 - 1", "right = 1 - tap % 3", check_wgrad),
    "no left border": (" & (pixel + right >= 0)", "", check_fprop),
    "no right border": (" & (pixel + right < W)", "", check_fprop),
    "no upper border": (" & (line + down >= 0)", "", check_dgrad),
    "no lower border": (" & (line + down < H)", "", check_dgrad),
    "no border in wgrad": (" & (pixel + right >= 0)", "", check_wgrad),
    "border before the activation": ("tl.where(inside[:, None], tile, 0.0)", "tile", check_fprop),
    "border before the gradient": ("tl.where(inside[:, None], tile, 0.0)", "tile", check_dgrad),
    "last tile dropped": ("(tiles * triton.cdiv(k", "((m // config.block_m) * triton.cdiv(k", check_fprop),
    "last tile dropped in wgrad": ("(begin + ROWS, M)", "(begin + ROWS, M // BLOCK_M * BLOCK_M)", check_wgrad),
    "statistics before rounding": ("values = rounded(acc, out).to(tl.float32)", "values = acc", check_fprop),
    "sums before rounding": ("values = rounded(acc, out).to(tl.float32)", "values = acc", check_dgrad),
    "statistics without a mask": ("tile_moments(values, valid,", "tile_moments(values, values == values,", check_fprop),
    "full count in the last tile": ("tl.minimum(M - first, BLOCK_M)", "tl.cast(BLOCK_M, tl.int32)", check_fprop),
    "relu without its gradient": ("acc = tl.where(passes(", "acc = tl.where(passes(1 + 0 * ", check_dgrad),
    "lines not counted": ("line += step_lines + (pixel >= W).to(tl.int32)", "line += step_lines", check_wgrad),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_errors_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = FAULTS[fault]
    text = Path(conv3x3.__file__).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "faulty.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("resnet_fused.backends.triton._faulty", path)
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, faulty)
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec.loader.exec_module(faulty)
    with pytest.raises(AssertionError):
        check(faulty, torch.bfloat16)
