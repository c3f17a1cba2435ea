"""The compiled products of matrices against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from resnet_fused import native
from resnet_fused.backends.aten import pack_mask, unpack_mask
from resnet_fused.backends.operands import acc_dtype

pytestmark = [
    pytest.mark.skipif(not native.is_loaded(), reason=f"no compiled kernels: {native.status()}"),
    pytest.mark.one_in(3),
]

ops = torch.ops.resnet_fused
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NONE = (1, 1)
# (N, H, W), n_in, n_out: fewer, as many and more than a register tile, a strip and a row tile hold.
SHAPES = [
    ((1, 1, 1), 1, 1),
    ((1, 5, 1), 3, 17),
    ((3, 7, 3), 17, 35),
    ((2, 10, 10), 64, 64),
    ((2, 10, 10), 35, 72),
    ((1, 9, 7), 72, 130),
    ((1, 9, 7), 130, 3),
    ((2, 10, 10), 1, 64),
    ((2, 10, 10), 600, 40),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Numbers:
    """Random tensors of one dtype."""

    def __init__(self, dtype, seed=0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def activation(self, n, c, h, w) -> Tensor:
        x = torch.randn((n, c, h, w), generator=self.generator).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def weight(self, n_out, n_in, transposed=False) -> Tensor:
        if transposed:
            return self.weight(n_in, n_out).T
        return torch.randn((n_out, n_in), generator=self.generator).to(self.dtype)

    def vector(self, n) -> Tensor:
        return torch.randn(n, generator=self.generator).to(acc_dtype(self.dtype))

    def mask(self, like) -> Tensor:
        return pack_mask(
            (torch.rand(like.shape, generator=self.generator) < 0.6)
            .to(like.device)
            .contiguous(memory_format=torch.channels_last)
        )


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """In float64."""
    return x.double() if mask is None else torch.where(unpack_mask(mask, x), x.double(), 0.0)


def product(x: Tensor, weight: Tensor, stride=NONE) -> Tensor:
    return torch.einsum("nchw,kc->nkhw", x[:, :, :: stride[0], :: stride[1]], weight.double())


def column(v: Tensor | None, otherwise: float) -> Tensor | float:
    return otherwise if v is None else v.double().view(1, -1, 1, 1)


def assert_within(out: Tensor, gold: Tensor, size: Tensor, terms: int) -> None:
    """One rounding of the result, and those of a sum of `terms` terms, the absolute values of which add up to size."""
    half_ulp = torch.finfo(out.dtype).eps * 0.501 if out.dtype.itemsize == 2 else 0.0
    acc = torch.finfo(acc_dtype(out.dtype)).eps * (4 + terms**0.5)
    bound = half_ulp * gold.abs() + acc * size + torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    error = (out.double() - gold).abs()
    worst = (error - bound).max().item() if out.numel() else 0.0
    assert worst <= 0.0, f"error exceeds the bound by {worst}: {(error / bound).max().item()} times"


def check_pointwise(
    numbers,
    nhw,
    n_in,
    n_out,
    *,
    stride=NONE,
    mask=False,
    scale=False,
    dual=None,
    stride2=NONE,
    scale2=False,
    low=False,
    shift=False,
    residual=False,
    residual_mask=False,
    relu=False,
    save_mask=False,
    transposed=False,
):
    n, h, w = nhw
    x = numbers.activation(n, n_in, h, w)
    p, q = (h - 1) // stride[0] + 1, (w - 1) // stride[1] + 1
    weight = numbers.weight(n_out, n_in, transposed)
    bits = numbers.mask(x) if mask else None
    vector = [numbers.vector(n_out) if wanted else None for wanted in (scale, scale2, shift)]
    x2 = weight2 = weight2_low = None
    if dual:
        x2 = numbers.activation(n, dual, (p - 1) * stride2[0] + 1, (q - 1) * stride2[1] + 1)
        weight2 = numbers.weight(n_out, dual, not transposed)
        weight2_low = numbers.weight(n_out, dual) if low else None
    other = numbers.activation(n, n_out, p, q) if residual else None
    other_bits = numbers.mask(other) if residual_mask else None
    arguments = (x, bits, weight, stride, vector[0], x2, weight2, stride2, vector[1], vector[2], other, other_bits)
    out, out_bits = ops.pointwise(*arguments, relu, save_mask, weight2_low=weight2_low)

    def formula(absolute):
        f = torch.abs if absolute else lambda t: t
        total = product(f(masked(x, bits)), f(weight), stride) * f(torch.as_tensor(column(vector[0], 1.0)))
        if dual:
            total = total + product(f(x2.double()), f(weight2), stride2) * f(torch.as_tensor(column(vector[1], 1.0)))
        if low:
            total = total + product(f(x2.double()), f(weight2_low), stride2)
        total = total + f(torch.as_tensor(column(vector[2], 0.0)))
        return total + f(masked(other, other_bits)) if residual else total

    gold = formula(False)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_within(out, gold.relu() if relu else gold, formula(True), n_in + (1 + low) * (dual or 0))
    expected = pack_mask(~(out <= 0)) if save_mask else out_bits.new_empty(0)
    assert torch.equal(out_bits, expected)


OPTIONS = {
    "plain": {},
    "scale_shift_relu": {"scale": True, "shift": True, "relu": True, "save_mask": True},
    "masked": {"mask": True, "transposed": True},
    "all": {"mask": True, "scale": True, "dual": 33, "scale2": True, "shift": True, "residual": True,
            "residual_mask": True, "relu": True, "save_mask": True},
    "in_two_parts": {"dual": 40, "low": True, "mask": True, "shift": True},
    "dual_one_sum": {"dual": 40, "stride2": (2, 2), "shift": True, "transposed": True},
    "strided": {"stride": (2, 2), "residual": True, "save_mask": True},
    "strided_one_scale": {"stride": (2, 1), "dual": 5, "scale2": True, "relu": True},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@every_shape
@every_dtype
def test_pointwise(dtype, shape, options):
    check_pointwise(Numbers(dtype), *shape, **options)


@pytest.mark.parametrize(
    "options", [{}, {"mask": True}, {"dual": 40}, {"mask": True, "dual": 7, "low": True, "shift": True}]
)
@pytest.mark.parametrize("stride", [NONE, (2, 2), (2, 1)], ids=str)
@every_shape
@every_dtype
def test_pointwise_add(dtype, shape, stride, options):
    (n, h, w), n_in, n_out = shape
    numbers = Numbers(dtype)
    acc = numbers.activation(n, n_out, h, w)
    inside = acc[:, :, :: stride[0], :: stride[1]]
    x = numbers.activation(n, n_in, *inside.shape[2:])
    weight = numbers.weight(n_out, n_in, transposed=True)
    mask = numbers.mask(x) if options.get("mask") else None
    x2 = weight2 = low = None
    if "dual" in options:
        x2, weight2 = numbers.activation(n, options["dual"], h, w), numbers.weight(n_out, options["dual"])
    if "low" in options:
        low = numbers.weight(n_out, options["dual"])
    shift = numbers.vector(n_out) if "shift" in options else None
    gold = acc.double()
    size = gold.abs()
    term = product(masked(x, mask), weight) + column(shift, 0.0)
    term_size = product(masked(x, mask).abs(), weight.abs()) + (column(shift.abs(), 0.0) if shift is not None else 0.0)
    if x2 is not None:
        term = term + product(x2.double(), weight2, stride)
        term_size = term_size + product(x2.double().abs(), weight2.abs(), stride)
    if low is not None:
        term = term + product(x2.double(), low, stride)
        term_size = term_size + product(x2.double().abs(), low.abs(), stride)
    gold[:, :, :: stride[0], :: stride[1]] += term
    size[:, :, :: stride[0], :: stride[1]] += term_size
    before = acc.clone()
    ops.pointwise_add_(acc, x, mask, weight, x2, weight2, stride, shift, weight2_low=low)
    assert_within(acc, gold, size, n_in + 2 * options.get("dual", 0))
    untouched = torch.ones(acc.shape, dtype=torch.bool)
    untouched[:, :, :: stride[0], :: stride[1]] = False
    assert torch.equal(acc[untouched], before[untouched])


# The last ones have several tiles of the result, or several splits of the rows.
@pytest.mark.parametrize("shape", [*SHAPES, ((1, 20, 15), 300, 310), ((2, 50, 61), 20, 24)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": True, "centre": True}, {"stride": (2, 2)}, {"stride": (2, 1), "mask": True, "centre": True}],
)
@every_dtype
def test_wgrad(dtype, shape, options):
    (n, h, w), n_in, n_out = shape
    stride = options.get("stride", NONE)
    numbers = Numbers(dtype)
    x = numbers.activation(n, n_in, h, w)
    read = x[:, :, :: stride[0], :: stride[1]]
    dy = numbers.activation(n, n_out, *read.shape[2:])
    mask = numbers.mask(dy) if options.get("mask") else None
    centre = numbers.vector(n_in) if options.get("centre") else None
    dweight, sum_dy = ops.pointwise_wgrad(dy, mask, x, centre, stride)
    left = masked(dy, mask).permute(1, 0, 2, 3).flatten(1)
    right = (read.double() - column(centre, 0.0)).permute(1, 0, 2, 3).flatten(1)
    terms = read.double().abs() + (0.0 if centre is None else column(centre.abs(), 0.0))
    size = left.abs() @ terms.permute(1, 0, 2, 3).flatten(1).T
    eps = torch.finfo(acc_dtype(dtype)).eps
    assert dweight.dtype is (torch.float32 if dtype.itemsize == 2 else torch.float64)
    assert sum_dy.dtype is acc_dtype(dtype)
    assert ((dweight.double() - left @ right.T).abs() <= eps * 12 * size + 1e-300).all()
    assert ((sum_dy.double() - left.sum(1)).abs() <= eps * 12 * left.abs().sum(1) + 1e-300).all()


@pytest.mark.parametrize("shape", [*SHAPES, ((1, 20, 15), 300, 0), ((2, 50, 61), 20, 0)], ids=str)
@pytest.mark.parametrize("stride", [NONE, (2, 2), (2, 1)], ids=str)
@every_dtype
def test_gram(dtype, shape, stride):
    (n, h, w), c, _ = shape
    x = Numbers(dtype).activation(n, c, h, w)
    mean, cov = ops.gram(x, stride)
    rows = x[:, :, :: stride[0], :: stride[1]].permute(1, 0, 2, 3).flatten(1).double()
    assert mean.dtype is torch.float64
    tolerance = 1e-5 if dtype.itemsize == 2 else 1e-13
    torch.testing.assert_close(mean, rows.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cov, torch.cov(rows, correction=0).view(c, c), rtol=tolerance, atol=tolerance)
    assert torch.equal(cov, cov.T)
    assert (cov.diagonal() >= 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-12)], ids=str)
def test_gram_when_the_mean_is_ten_thousand_deviations(dtype, tolerance):
    x = Numbers(dtype).activation(4, 35, 29, 31) + 1e4
    mean, cov = ops.gram(x, NONE)
    rows = x.permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(cov, torch.cov(rows, correction=0), rtol=tolerance, atol=tolerance)


@every_dtype
def test_what_the_mask_stops_does_not_leak_and_nan_passes(dtype):
    numbers = Numbers(dtype)
    x, weight = numbers.activation(2, 35, 6, 5), numbers.weight(40, 35)
    mask = numbers.mask(x)
    live = unpack_mask(mask, x)
    poisoned = torch.where(live, x, torch.where(x > 0, float("nan"), float("inf")).to(dtype))
    poisoned = poisoned.contiguous(memory_format=torch.channels_last)
    rest = ((1, 1), None, None, None, (1, 1), None, None)

    def run(x, relu=False):
        other = x.new_zeros(2, 40, 6, 5).contiguous(memory_format=torch.channels_last)
        other[:, :35] = x
        other_live = torch.ones_like(other, dtype=torch.bool)
        other_live[:, :35] = live
        total = numbers.activation(2, 40, 6, 5) * 0
        ops.pointwise_add_(total, x, mask, weight, None, None, (1, 1), None)
        return [
            ops.pointwise(x, mask, weight, *rest, other, pack_mask(other_live), relu, False)[0],
            total,
            *ops.pointwise_wgrad(x, mask, torch.ones_like(other), None, (1, 1)),
        ]

    for one, other in zip(run(poisoned), run(x), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()

    x = x.clone(memory_format=torch.preserve_format)
    x[1, 3, 2, 2] = float("nan")
    out, bits = ops.pointwise(x, None, weight, *rest, None, None, True, True)
    assert out[1, :, 2, 2].isnan().all()
    assert out.isnan().sum() == 40
    assert torch.equal(bits, pack_mask(~(out <= 0)))
    dweight, sum_dy = ops.pointwise_wgrad(x, None, torch.ones_like(x), None, (1, 1))
    assert torch.equal(dweight.isnan().any(1), torch.arange(35) == 3)
    assert torch.equal(sum_dy.isnan(), torch.arange(35) == 3)
    mean, cov = ops.gram(x, (1, 1))
    assert torch.equal(mean.isnan(), torch.arange(35) == 3)
    assert cov[3].isnan().all()
    assert cov.isnan().sum() == 69
    for scale in (0.0, float("nan"), 1e-30):
        vector = torch.full((40,), scale, dtype=acc_dtype(dtype))
        out, _ = ops.pointwise(
            numbers.activation(2, 35, 6, 5), None, weight, (1, 1), vector, *rest[2:], None, None, False, False
        )
        assert out.isnan().all() if scale != scale else (out.double().abs() < 1e-20).all()


def everything(dtype) -> list[Tensor]:
    """Every operator's results."""
    numbers = Numbers(dtype)
    x, x2, dy = (numbers.activation(3, c, 23, 21) for c in (72, 65, 130))
    weight, weight2, vector = numbers.weight(130, 72), numbers.weight(130, 65), numbers.vector(130)
    mask, dy_mask = numbers.mask(x), numbers.mask(dy)
    results = [
        *ops.pointwise(x, mask, weight, NONE, vector, x2, weight2, NONE, None, vector, dy, dy_mask, True, True),
        *ops.pointwise(
            x, None, weight[:129], (2, 2), None, None, None, NONE, None, vector[:129], None, None, True, True
        ),
        *ops.pointwise_wgrad(dy, dy_mask, x, numbers.vector(72), NONE),
        *ops.pointwise_wgrad(dy[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last), None, x, None, (2, 2)),
        *ops.gram(x, NONE),
        *ops.gram(dy, (2, 1)),
    ]
    total = x.clone()
    ops.pointwise_add_(total, dy, dy_mask, weight.T, x2, weight2[:72], NONE, numbers.vector(72))
    return [*results, total]


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


@every_dtype
def test_every_element_is_written(dtype):
    clean = everything(dtype)
    # Fresh memory comes filled with NaN, or 255.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = everything(dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)


@every_dtype
def test_nothing_outside_the_tensors_is_read_or_written(dtype):
    """Tensors inside larger ones full of NaN: what is read beside them would show, and what is written too."""

    def fenced(t: Tensor) -> tuple[Tensor, Tensor]:
        margin = 64
        whole = torch.full((t.numel() + 2 * margin,), float("nan"), dtype=t.dtype)
        inside = torch.as_strided(whole, t.shape, t.stride(), margin)
        inside.copy_(t)
        return inside, whole

    for nhw, n_in, n_out in SHAPES:
        numbers = Numbers(dtype)
        n, h, w = nhw
        x, dy = numbers.activation(n, n_in, h, w), numbers.activation(n, n_out, h, w)
        weight, vector = numbers.weight(n_out, n_in), numbers.vector(n_out)
        inside = [fenced(t)[0] for t in (x, dy, weight, vector)]
        total, whole = fenced(x)
        results = []
        for a, b, c, d, acc in ((x, dy, weight, vector, x.clone()), (*inside, total)):
            ops.pointwise_add_(acc, b, None, c.T, None, None, NONE, None)
            results.append([
                acc,
                *ops.pointwise(a, None, c, NONE, d, None, None, NONE, None, d, b, None, False, False),
                *ops.pointwise_wgrad(b, None, a, None, NONE),
                *ops.gram(a, NONE),
            ])  # fmt: skip
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        assert whole.isnan().sum() == 128


def test_empty_tensors():
    numbers = Numbers(torch.float32)
    weight = numbers.weight(4, 8)
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        x = numbers.activation(*shape)
        out, bits = ops.pointwise(x, None, weight, NONE, None, None, None, NONE, None, None, None, None, True, True)
        assert out.shape == (shape[0], 4, *shape[2:])
        assert bits.shape == (0,)
        dweight, sum_dy = ops.pointwise_wgrad(out, None, x, None, NONE)
        assert dweight.shape == (4, 8)
        assert not dweight.any()
        assert not sum_dy.any()
        assert all(t.isnan().all() for t in ops.gram(x, NONE))
    x, shift = numbers.activation(2, 0, 3, 3), numbers.vector(4)
    out, _ = ops.pointwise(x, None, weight[:, :0], NONE, None, None, None, NONE, None, shift, None, None, False, False)
    assert torch.equal(out, shift.view(1, 4, 1, 1).expand(2, 4, 3, 3))


def test_opcheck():
    numbers = Numbers(torch.float32)
    x, dy, weight, vector = (numbers.activation(2, 5, 7, 6), numbers.activation(2, 9, 7, 6), numbers.weight(9, 5),
                             numbers.vector(9))  # fmt: skip
    strided = dy[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    mask = numbers.mask(x)
    calls = [
        (ops.pointwise, (x, mask, weight, NONE, vector, x, weight, NONE, vector, vector, dy, None, True, True)),
        (ops.pointwise, (x, None, weight, (2, 2), None, None, None, NONE, None, None, None, None, False, False)),
        (ops.pointwise_add_, (x.clone(), strided, None, weight.T, None, None, (2, 2), None)),
        (ops.pointwise_wgrad, (dy, None, x, None, NONE)),
        (ops.pointwise_wgrad, (strided.bfloat16(), None, x.bfloat16(), None, (2, 2))),
        (ops.gram, (x, (2, 1))),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def bad_calls():
    numbers = Numbers(torch.float32)
    x, weight, vector = numbers.activation(2, 6, 5, 5), numbers.weight(4, 6), numbers.vector(4)
    mask = numbers.mask(x)

    def pointwise(x=x, mask=None, weight=weight, stride=NONE, scale=None, x2=None, weight2=None, scale2=None,
                  residual=None, residual_mask=None):  # fmt: skip
        return lambda: ops.pointwise(
            x, mask, weight, stride, scale, x2, weight2, NONE, scale2, None, residual, residual_mask, True, True
        )

    return {
        r"pointwise: x: expected a tensor dense in channels_last, got shape .* strides": pointwise(x.contiguous()),
        r"pointwise: x: expected float64.*got Int": pointwise(x.int()),
        r"pointwise: weight: expected Float, got BFloat16": pointwise(weight=weight.bfloat16()),
        r"pointwise: weight: expected shape \[4, 6\], got \[4, 5\]": pointwise(weight=weight[:, :5]),
        r"pointwise: weight: expected \[n_out, n_in\], got 1 dim": pointwise(weight=vector),
        r"pointwise: stride: expected two positive numbers, got \[0, 1\]": pointwise(stride=(0, 1)),
        r"pointwise: mask: expected stride \[1, 1\] with a mask, got \[2, 2\]": pointwise(mask=mask, stride=(2, 2)),
        r"pointwise: mask: expected .* \[38\].* got \[37\]": pointwise(mask=mask[:-1]),
        r"pointwise: mask: expected Byte, got Int": pointwise(mask=mask.int()),
        r"pointwise: scale: expected shape \[4\], got \[3\]": pointwise(scale=vector[:3]),
        r"pointwise: scale: expected Float, got Double": pointwise(scale=vector.double()),
        r"pointwise: x2: expected weight2 beside it": pointwise(x2=x),
        r"pointwise: scale2: expected x2 beside it": pointwise(scale2=vector),
        r"pointwise: residual_mask: expected residual beside it": pointwise(residual_mask=mask),
        r"pointwise: x2: expected products of shape \[2, 4, 5, 5\].* got \[2, 4, 4, 5\]": pointwise(
            x2=x[:, :, :4].contiguous(memory_format=torch.channels_last), weight2=weight
        ),
        r"pointwise: residual: expected shape \[2, 4, 5, 5\].* got \[2, 6, 5, 5\]": pointwise(residual=x),
        r"pointwise_add_: x: expected shape \[2, 6, 3, 3\].* got \[2, 6, 5, 5\]": lambda: ops.pointwise_add_(
            x.clone(), x, None, numbers.weight(6, 6), None, None, (2, 2), None
        ),
        r"pointwise_wgrad: dy: expected shape \[2, 6, 3, 3\]": lambda: ops.pointwise_wgrad(x, None, x, None, (2, 2)),
        r"pointwise_wgrad: centre: expected shape \[6\]": lambda: ops.pointwise_wgrad(x, None, x, vector, NONE),
        r"gram: x: expected \[N, C, H, W\], got 2 dim": lambda: ops.gram(weight, NONE),
    }


@pytest.mark.parametrize("message", bad_calls() if native.is_loaded() else [])
def test_bad_arguments_are_named(message):
    with pytest.raises(RuntimeError, match=message):
        bad_calls()[message]()


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    "capability", ["baseline", pytest.param("avx2", marks=pytest.mark.slow), "avx512", "avx512_bf16"]
)
def test_every_instruction_set_that_runs_here(capability):
    info = native.build_info()
    if not info:
        pytest.skip("the bindings that tell the instruction sets are not built")
    known = info["instruction_sets"]
    if capability not in known or known.index(capability) > known.index(info["detected"]):
        pytest.skip(f"no {capability} here (but {info['detected']})")
    if info["selected"] != info["detected"]:
        pytest.skip("RESNET_FUSED_CPU_CAPABILITY is set: the child process runs one set already")
    if capability == info["selected"]:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
               "-k", "not instruction_set and not bad_arguments"]  # fmt: skip
    environment = {**os.environ, "RESNET_FUSED_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
