"""The stem's max pooling, run by emulation: winners exactly those of stock PyTorch, values and gradients against float64."""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext

import pytest
import torch
from emulated import CUDA, DTYPES, HERE, LAYOUTS, Banded, Kernels, build, image, name_of, vector
from torch import Tensor

from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.operands import acc_dtype
from resnet_fused.testing import assert_as_accurate

ATEN = AtenKernels()
MAIN = HERE / "pool_kernels.cpp"
# Odd and even sizes, one line, one column, one pixel; octets, tails and tiles of channels; windows beyond a split.
SHAPES = [
    (2, 3, 5, 7),
    (1, 17, 6, 5),
    (2, 40, 4, 6),
    (1, 264, 3, 4),
    (2, 1, 9, 8),
    (3, 8, 1, 6),
    (1, 16, 7, 1),
    (2, 40, 1, 1),
]


class Shape(ctypes.Structure):
    _fields_ = [
        ("n", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("channels", "h", "w", "channels_last", "aligned")),
    ]


class Run(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int) for name in ("blocks", "threads", "splits", "lanes")), ("seed", ctypes.c_uint)]


RUN = Run(2, 37, 2, 64, 1)  # few threads, which then stride, by no multiple of anything
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(7)


def whole_numbers(dtype, shape, layout):
    """Few values, so that windows have several maxima."""
    return torch.randint(-2, 4, shape).to(dtype).contiguous(memory_format=layout)


def exact_vectors(dtype, channels):
    """Scales of either sign whose products are exact, so that it does not count whether they are fused with the sum."""
    at = torch.arange(channels)
    scale, shift = torch.tensor([1.0, -1.0, 2.0, 0.5])[at % 4], torch.tensor([0.0, 1.0, -0.5])[at % 3]
    return scale.to(acc_dtype(dtype)), shift.to(acc_dtype(dtype))


def pooled(size: int) -> int:
    return (size - 1) // 2 + 1


class Call:
    """Calls for tensors like x, ``offset`` elements from where they are aligned; ``layout`` also decides what is ambiguous."""

    def __init__(
        self, kernels: Kernels, x: Tensor, layout: torch.memory_format, run: Run = RUN, offset: int = 0
    ) -> None:
        n, c, h, w = x.shape
        self._kernels, self._x, self._run, self._offset = kernels, x, run, offset
        self._shape = Shape(n, c, h, w, int(layout == torch.channels_last), int(not offset))
        self._small = (n, c, pooled(h), pooled(w))

    def _banded(self, t: Tensor) -> Banded:
        if t.dim() == 4 and self._shape.channels_last:
            t = t.permute(0, 2, 3, 1)
        return Banded(t.numel(), t.dtype, self._offset).holding(t.reshape(-1))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Banded:
        return Banded(math.prod(shape), dtype, self._offset)

    def _image(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        n, c, h, w = shape
        if self._shape.channels_last:
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)

    def _run_it(self, name: str, *arguments: Tensor | Banded) -> None:
        converted = [self._banded(a) if isinstance(a, Tensor) else a for a in arguments]
        self._kernels(name, self._x.dtype, self._shape, self._run, *converted)

    def forward(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        out, index = self._empty(self._small, self._x.dtype), self._empty(self._small, torch.uint8)
        self._run_it("bn_relu_maxpool", self._x, scale, shift, out, index)
        return self._image(out.check(), self._small), self._image(index.check(), self._small)

    def backward(self, grad: Tensor, index: Tensor, mean: Tensor, coefficients: list[Tensor]) -> Tensor:
        dx = self._empty(self._x.shape, self._x.dtype)
        self._run_it("bn_relu_maxpool_backward", grad, index, self._x, mean, *coefficients, dx)
        return self._image(dx.check(), self._x.shape)

    def backward_reduce(self, grad: Tensor, index: Tensor, mean: Tensor) -> list[Tensor]:
        c, dtype = self._x.shape[1], mean.dtype
        partials = self._empty((self._run.splits, 2, c), dtype)
        sums = [self._empty((c,), dtype) for _ in range(2)]
        self._run_it("bn_relu_maxpool_backward_reduce", grad, index, self._x, mean, partials, *sums)
        partials.check()
        return [s.check() for s in sums]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def check_winners(kernels, dtype, shape, layout, run=RUN, offset=0):
    """Values and winners of few values and of many, exactly."""
    for numbers in (whole_numbers, image):
        x = numbers(dtype, shape, layout)
        vectors = exact_vectors(dtype, shape[1])
        for ours, theirs in zip(
            Call(kernels, x, layout, run, offset).forward(*vectors), ATEN.bn_relu_maxpool(x, *vectors), strict=True
        ):
            assert_equal(ours, theirs)


def check_values(kernels, dtype, shape, layout, offset=0):
    x, scale, shift = image(dtype, shape, layout), vector(dtype, shape[1]), vector(dtype, shape[1])
    out, _ = Call(kernels, x, layout, offset=offset).forward(scale, shift)
    gold, _ = ATEN.bn_relu_maxpool(x.double(), scale.double(), shift.double())
    assert_as_accurate(out, ATEN.bn_relu_maxpool(x, scale, shift)[0], gold)


def check_gradients(kernels, dtype, shape, layout, run=RUN, offset=0):
    x, mean = image(dtype, shape, layout, 0.5), vector(dtype, shape[1]) + 0.5
    coefficients = [vector(dtype, shape[1]) for _ in range(3)]
    coefficients[1][::3] = 0
    index = ATEN.bn_relu_maxpool(x, *exact_vectors(dtype, shape[1]))[1]
    grad = torch.randn(index.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    call = Call(kernels, x, layout, run, offset)
    dx, sums = call.backward(grad, index, mean, coefficients), call.backward_reduce(grad, index, mean)
    wide = grad.double(), index, x.double(), mean.double()
    stock = ATEN.bn_relu_maxpool_backward(grad, index, x, mean, coefficients)
    assert_as_accurate(dx, stock, ATEN.bn_relu_maxpool_backward(*wide, [c.double() for c in coefficients]), name="dx")
    plain, gold = (
        ATEN.bn_relu_maxpool_backward_reduce(grad, index, x, mean),
        ATEN.bn_relu_maxpool_backward_reduce(*wide),
    )
    for one, other, reference in zip(sums, plain, gold, strict=True):
        assert_as_accurate(one, other, reference, rows=x.numel() // shape[1], scale=1.0)
    return [dx.clone(), *(s.clone() for s in sums)]


@every_dtype
@every_layout
@every_shape
def test_forward(kernels, dtype, layout, shape):
    check_winners(kernels, dtype, shape, layout)
    check_values(kernels, dtype, shape, layout)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=lambda shape: "x".join(map(str, shape)))
def test_gradients(kernels, dtype, layout, shape):
    check_gradients(kernels, dtype, shape, layout)


@every_dtype
def test_tensors_that_are_not_aligned(kernels, dtype):
    for layout, offset in zip(LAYOUTS, (1, 3)):
        check_winners(kernels, dtype, (2, 40, 4, 6), layout, offset=offset)
        check_gradients(kernels, dtype, (2, 40, 4, 6), layout, offset=offset)


def special_image(dtype, shape, layout):
    """NaN and infinities all over, and at the corners, where padding is next to them."""
    x = whole_numbers(dtype, shape, layout)
    for value, share in ((math.nan, 0.1), (math.inf, 0.05), (-math.inf, 0.05)):
        x[torch.rand(shape) < share] = value
    x[0, 0, 0, 0] = x[0, 1, -1, -1] = x[0, 2, 0, -1] = x[0, 3, -1, 0] = math.nan
    # Channels without NaN, in which an infinity loses against another, or against everything.
    x[:, 4:6] = 1
    x[0, 4, 0, 0] = x[0, 4, 0, 1] = math.inf
    x[0, 5, 0, 0] = -math.inf
    return x


def check_nan_and_infinities(kernels, dtype, shape, layout):
    x, ones = special_image(dtype, shape, layout), torch.ones(shape[1], dtype=acc_dtype(dtype))
    call = Call(kernels, x, layout)
    out, index = call.forward(ones, ones * 0)
    plain_out, plain_index = ATEN.bn_relu_maxpool(x, ones, ones * 0)
    assert plain_out.isnan().any() and plain_out.isinf().any()
    assert_equal(out, plain_out)
    assert_equal(index, plain_index)
    grad = torch.ones_like(plain_out)
    grad[:, 1] = math.nan
    for coefficients in ([ones, ones * 0, ones * 0], [ones, ones, ones]):
        theirs = ATEN.bn_relu_maxpool_backward(grad, plain_index, x, ones, coefficients)
        assert_equal(call.backward(grad, plain_index, ones, coefficients), theirs)
    plain = ATEN.bn_relu_maxpool_backward_reduce(grad, plain_index, x, ones)
    for ours, theirs in zip(call.backward_reduce(grad, plain_index, ones), plain, strict=True):
        assert_equal(ours, theirs)


@every_dtype
def test_nan_and_infinities(kernels, dtype):
    for layout in LAYOUTS:
        for shape in ((1, 19, 5, 6), (2, 8, 4, 7)):
            check_nan_and_infinities(kernels, dtype, shape, layout)


@every_layout
def test_the_gradient_is_autograd_s(kernels, layout):
    """The whole of it, from x to dx, without this package's other code: max pooling of ReLU."""
    x = image(torch.float64, (2, 8, 7, 10), layout)
    leaf = x.clone().requires_grad_()
    expected = torch.nn.functional.max_pool2d(leaf.relu(), 3, 2, 1)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(grad)
    ones = torch.ones(8, dtype=torch.float64)
    call = Call(kernels, x, layout)
    out, index = call.forward(ones, ones * 0)
    assert_equal(out, expected.detach())
    dx = call.backward(grad, index, ones, [ones, ones * 0, ones * 0])
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-14, atol=1e-14)


@every_layout
@pytest.mark.parametrize("shape", [(2, 40, 8, 9), (1, 17, 12, 5)], ids=str)
def test_the_order_of_blocks_and_threads_does_not_count(kernels, layout, shape):
    found = []
    for seed in range(3):
        torch.manual_seed(0)
        found.append(check_gradients(kernels, torch.float32, shape, layout, Run(3, 64, 5, 2, seed)))
        check_winners(kernels, torch.float32, shape, layout, Run(3, 64, 5, 2, seed))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "run", [Run(1, 32, 1, 1, 0), Run(1, 256, 40, 32, 0), Run(7, 64, 2, 256, 0)], ids=["one", "empty splits", "wide"]
)
def test_how_the_work_is_divided_does_not_count(kernels, run):
    for layout in LAYOUTS:
        check_winners(kernels, torch.bfloat16, (2, 24, 5, 6), layout, run)
        check_gradients(kernels, torch.bfloat16, (2, 24, 5, 6), layout, run)


# The tests must see mistakes.


PLANTED = {
    "none": None,
    "a window border at the top": ("h >= 0 && h < g.h", "h < g.h"),
    "a window border at the bottom": ("h >= 0 && h < g.h", "h >= 0 && h <= g.h"),
    "a window border on the right": ("w >= 0 && w < g.w", "w >= 0 && w <= g.w"),
    "a dropped last row": ("h >= 0 && h < g.h", "h >= 0 && h < g.h - 1"),
    "a dropped last row of windows": ("(h - 1) / 2 + 1", "h / 2"),
    "the last maximum": ("value > best.at[j]", "value >= best.at[j]"),
    "the first NaN": ("value != value", "value != value && best.at[j] == best.at[j]"),
    "compared before rounding": (
        "rounded<T>(multiply_add(row[s].at[j], scales.at[j], shifts.at[j]))",
        "multiply_add(row[s].at[j], scales.at[j], shifts.at[j])",
    ),
    "windows outside": ("last_p || last_q", "last_p && last_q"),
    "pixels outside": ("!(outside_h || outside_w)", "true"),
    "channels outside": ("left < kWidth<kTaking> ? left : kWidth<kTaking>", "kWidth<kTaking>"),
    "transposed places": ("3 * (1 + dh - 2 * dp) + 1 + dw - 2 * dq", "3 * (1 + dw - 2 * dq) + 1 + dh - 2 * dp"),
    "a lost half of the tree": ("half >= lanes", "half > lanes"),
    "a lost carry": ("q -= q_count, ++p", "q -= q_count"),
}


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Kernels with every planted error, and which of them counts: one build for all."""
    text = (CUDA / "pool.cuh").read_text(encoding="utf-8")
    choices: dict[str, str] = {}
    for number, change in enumerate(PLANTED.values()):
        if change is not None:
            right, wrong = change
            assert text.count(right) == 1, right
            choices[right] = f"(planted == {number} ? ({wrong}) : ({choices.get(right, right)}))"
    for right, chosen in choices.items():
        text = text.replace(right, chosen)
    text = text.replace("#pragma once", "#pragma once\ninline int planted;")
    library = build(tmp_path_factory.mktemp("planted"), {"pool.cuh": text}, MAIN, only=torch.bfloat16)
    return Kernels(library), ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "planted")


@pytest.mark.parametrize("change", PLANTED)
def test_planted_errors_are_seen(planted, change):
    kernels, number = planted
    number.value = list(PLANTED).index(change)
    with pytest.raises(AssertionError) if number.value else nullcontext():
        for layout in LAYOUTS:
            check_winners(kernels, torch.bfloat16, (2, 17, 6, 7), layout)
            check_gradients(kernels, torch.bfloat16, (2, 17, 6, 5), layout)
            check_nan_and_infinities(kernels, torch.bfloat16, (1, 19, 5, 5), layout)
