"""Batch norm's kernels and residual additions, run by emulation: every dtype, layout and tail against float64."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from emulated import DTYPES, LAYOUTS, Banded, Kernels, Run, banded, image, name_of, shape_of, vector
from torch import Tensor

from resnet_fused.backends.aten import AtenKernels, memory_order, pack_mask
from resnet_fused.backends.operands import acc_dtype
from resnet_fused.testing import assert_as_accurate

ATEN = AtenKernels()
SHAPES = [(2, 3, 5, 7), (1, 17, 3, 3), (2, 40, 4, 6), (3, 264, 3, 5), (1, 1, 1, 9)]


# Of planes a block has one channel: 264 of them are no other case than 40, and take long.
LAID_OUT = [
    (shape, layout) for shape in SHAPES for layout in LAYOUTS if shape[1] < 264 or layout == torch.channels_last
]
CASES = [(dtype, shape, layout) for dtype in DTYPES for shape, layout in LAID_OUT]
every_case = pytest.mark.parametrize("dtype, shape, layout", CASES, ids=name_of)


def taking_turns(name: str, *values: object) -> pytest.MarkDecorator:
    """Every case with one of the values; they take turns, so that each meets every dtype, shape and layout."""
    of = [values[(i % 2 + i // 2 + i // 10) % len(values)] for i in range(len(CASES))]
    assert {(*case, value)[::3] for case, value in zip(CASES, of)} == {(d, v) for d in DTYPES for v in values}
    names = f"dtype, shape, layout, {name}"
    return pytest.mark.parametrize(names, [(*case, value) for case, value in zip(CASES, of)], ids=name_of)


RUN = Run(3, 4, 1)
GATES = {"open": 0, "mask": 1, "activation": 2}


def like(banded_flat: Tensor, x: Tensor) -> Tensor:
    """Results in memory order as a tensor of x's shape and layout."""
    out = torch.empty_like(x, dtype=banded_flat.dtype)
    memory_order(out).copy_(banded_flat)
    return out


def call(kernels: Kernels, name: str, x: Tensor, *arguments: Any, run: Run = RUN, aligned: bool = True) -> None:
    kernels(name, x.dtype, shape_of(x, aligned), run, *arguments)


def mask_memory(x: Tensor) -> Banded:
    return Banded((x.numel() + 7) // 8, torch.uint8)


def check_bn_act(
    kernels, dtype, shape, layout, residual=True, relu=True, masked=True, offset=0, inplace=False, run=RUN
):
    x, scale, shift = image(dtype, shape, layout), vector(dtype, shape[1]), vector(dtype, shape[1])
    r = image(dtype, shape, layout) if residual else None
    at = banded(x, offset)
    out = at if inplace else Banded(x.numel(), dtype, offset)
    mask = mask_memory(x) if masked else None
    call(
        kernels,
        "bn_act",
        x,
        at,
        banded(scale),
        banded(shift),
        banded(r, offset),
        int(relu),
        out,
        mask,
        aligned=not offset,
        run=run,
    )
    found = like(out.check(), x)
    wide = [t if t is None else t.double() for t in (x, scale, shift, r)]
    gold = ATEN.bn_act(*wide, relu, False)[0]
    stock = ATEN.bn_act(x, scale, shift, r, relu, False)[0]
    assert_as_accurate(found, stock, gold)
    if masked and relu:
        assert torch.equal(mask.check(), pack_mask(~(found <= 0)))
    return [found, *([mask.flat] if masked else [])]


@every_case
def test_bn_act(kernels, dtype, shape, layout):
    check_bn_act(kernels, dtype, shape, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"residual": False},
        {"relu": False},
        {"masked": False},
        {"offset": 1},
        {"inplace": True},
        {"inplace": True, "offset": 3},
    ],
    ids=str,
)
def test_bn_act_options(kernels, dtype, options):
    check_bn_act(kernels, dtype, (2, 40, 4, 6), torch.channels_last, **options)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_the_mask_is_of_what_is_stored(kernels, dtype):
    """A positive number that rounds to 0 passes no gradient."""
    x, mask = (
        torch.ones(1, 8, 1, 2).to(dtype).contiguous(memory_format=torch.channels_last),
        mask_memory(torch.ones(16)),
    )
    tie = torch.tensor(2.0**-134 if dtype == torch.bfloat16 else 2.0**-25)
    above = torch.nextafter(tie, torch.tensor(1.0))
    scale = torch.tensor([tie, above, 2 * tie, 1e-43, -above, 0.0, above, tie])
    out, shift = Banded(16, dtype), torch.zeros(8)
    call(kernels, "bn_act", x, banded(x), banded(scale), banded(shift), None, 1, out, mask)
    assert (out.check().view(2, 8) > 0).tolist() == [[False, True, True, False, False, False, True, False]] * 2
    assert mask.check().tolist() == [0b01000110] * 2


def check_add_relu(kernels, dtype, shape, layout, offset=0, run=RUN):
    a, b = image(dtype, shape, layout), image(dtype, shape, layout)
    out, mask = Banded(a.numel(), dtype, offset), mask_memory(a)
    call(kernels, "add_relu", a, banded(a, offset), banded(b, offset), out, mask, aligned=not offset, run=run)
    expected = ATEN.add_relu(a, b, True)
    assert torch.equal(like(out.check(), a), expected[0]) and torch.equal(mask.check(), expected[1])


@every_case
def test_add_relu(kernels, dtype, shape, layout):
    check_add_relu(kernels, dtype, shape, layout)


def check_mask_grad(kernels, dtype, shape, layout, add, offset=0, run=RUN):
    grad, acc = image(dtype, shape, layout), image(dtype, shape, layout)
    mask = pack_mask(torch.randn(shape).contiguous(memory_format=layout) > 0)
    out = banded(acc, offset) if add else Banded(acc.numel(), dtype, offset)
    given = (banded(grad, offset), banded(mask), int(add), out)
    call(kernels, "mask_grad", grad, *given, aligned=not offset, run=run)
    if add:
        ATEN.mask_grad_add_(acc, grad, mask)
    else:
        acc = ATEN.mask_grad(grad, mask)
    assert torch.equal(like(out.check(), grad), acc)


@taking_turns("add", False, True)
def test_mask_grad(kernels, dtype, shape, layout, add):
    check_mask_grad(kernels, dtype, shape, layout, add)


def gradients(dtype, shape, layout, gate):
    x, grad = image(dtype, shape, layout, 0.5), image(dtype, shape, layout)
    vectors = [vector(dtype, shape[1], -0.5) for _ in range(3)]  # mean, scale, shift
    mask = pack_mask(torch.randn(shape).contiguous(memory_format=layout) > 0) if gate == "mask" else None
    return x, grad, vectors, mask


def check_bn_backward(kernels, dtype, shape, layout, gate, run=RUN):
    x, grad, vectors, mask = gradients(dtype, shape, layout, gate)
    coefficients = [vector(dtype, shape[1]) for _ in range(3)]
    coefficients[1][::3] = 0
    out = Banded(x.numel(), dtype)
    gates = banded(grad), banded(x), banded(mask)
    call(kernels, "bn_backward", x, GATES[gate], *gates, *map(banded, (*vectors, *coefficients)), out, run=run)
    sides = (
        [x, grad, vectors, coefficients],
        [x.double(), grad.double(), [v.double() for v in vectors], [c.double() for c in coefficients]],
    )
    stock, gold = (ATEN.bn_act_backward(g, v, mask, *of, gate == "activation", tuple(c)) for v, g, of, c in sides)
    assert_as_accurate(like(out.check(), x), stock, gold)
    return [out.flat]


@taking_turns("gate", *GATES)
def test_bn_backward(kernels, dtype, shape, layout, gate):
    check_bn_backward(kernels, dtype, shape, layout, gate)


def test_x_does_not_count_where_statistics_are_frozen(kernels):
    x, grad, vectors, _ = gradients(torch.float32, (2, 40, 4, 6), torch.channels_last, "open")
    x[0, 3, 1, 1] = float("nan")
    a, b, c = (vector(x.dtype, 40) for _ in range(3))
    b[3], out = 0, Banded(x.numel(), x.dtype)
    given = (banded(t) for t in (grad, x, None, *vectors, a, b, c))
    call(kernels, "bn_backward", x, GATES["open"], *given, out)
    assert like(out.check(), x).isfinite().all()


def exact_moments(x: Tensor) -> list[Tensor]:
    """In more than float64."""
    matrix = memory_order(x.contiguous(memory_format=torch.channels_last)).view(-1, x.shape[1]).double().numpy()
    matrix = matrix.astype(numpy.longdouble)
    return [torch.from_numpy(moment.astype(numpy.float64)) for moment in (matrix.mean(0), matrix.var(0))]


def check_bn_stats(kernels, dtype, shape, layout, mean=0.0, run=RUN, planned=0):
    x = image(dtype, shape, layout, mean)
    of = acc_dtype(dtype)
    outs = [Banded(shape[1], of) for _ in range(2)]
    partials = Banded((planned or run.splits) * 3 * shape[1], of)
    call(kernels, "bn_stats", x, banded(x), partials, *outs, run=run)
    partials.check()
    for out, theirs, exact in zip(outs, ATEN.bn_stats(x), exact_moments(x)):
        assert_as_accurate(out.check(), theirs, exact, scale=mean)
    return [out.check() for out in outs]


@every_case
def test_bn_stats(kernels, dtype, shape, layout):
    check_bn_stats(kernels, dtype, shape, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_far_from_zero_and_a_cumulative_average(kernels, dtype, layout):
    check_bn_stats(kernels, dtype, (4, 40, 16, 9), layout, mean=100.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_order_of_blocks_and_threads_does_not_count(kernels, layout):
    found = []
    for seed in range(4):
        torch.manual_seed(0)
        found.append(check_bn_stats(kernels, torch.float32, (2, 40, 8, 9), layout, run=Run(3, 5, seed)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def check_bn_backward_reduce(kernels, dtype, shape, layout, gate, run=RUN):
    activation = gate != "open"
    x, grad, vectors, mask = gradients(dtype, shape, layout, gate)
    of = vectors[0].dtype
    sums, partials = [Banded(shape[1], of) for _ in range(2)], Banded(run.splits * 2 * shape[1], of)
    written = Banded(x.numel(), dtype) if activation else None
    relu = gate == "activation"
    inputs = (banded(t) for t in (grad, x, mask, *vectors))
    call(kernels, "bn_backward_reduce", x, GATES[gate], *inputs, written, partials, *sums, run=run)
    partials.check()
    wide = [v.double() for v in vectors]
    gold = ATEN.bn_act_backward_reduce(grad.double(), x.double(), mask, *wide, relu, activation)
    stock = ATEN.bn_act_backward_reduce(grad, x, mask, *vectors, relu, activation)
    if activation:
        assert_as_accurate(like(written.check(), x), stock[2], gold[2])
    rows = x.numel() // shape[1]
    for found, theirs, exact in zip(sums, stock, gold):
        assert_as_accurate(found.check(), theirs, exact, rows=rows, scale=1.0)
    return [each.flat for each in (*sums, *([written] if activation else []))]


@taking_turns("gate", *GATES)
def test_bn_backward_reduce(kernels, dtype, shape, layout, gate):
    check_bn_backward_reduce(kernels, dtype, shape, layout, gate)


# Shapes, resident blocks and splits with which threads take some octets, not all of them as many.
SEVERAL = [
    ((2, 8, 40, 37), 1, 2),
    ((2, 24, 31, 29), 4, 3),
    ((1, 40, 41, 33), 6, 2),
    ((1, 64, 17, 19), 2, 3),
    ((1, 2048, 3, 5), 1, 1),
]
FIRST, LAST = LAYOUTS
several = pytest.mark.parametrize(
    "dtype, shape, resident, splits", [(dtype, *each) for dtype in DTYPES for each in SEVERAL], ids=name_of
)


def assert_both_forms_agree(check, kernels, dtype, shape, layout, *arguments, run):
    """Each as accurate as it has to be, and the same bits."""
    found = []
    for general in (0, 1):
        torch.manual_seed(1)
        run.general = general
        found.append(check(kernels, dtype, shape, layout, *arguments, run=run))
    for fast, slow in zip(*found):
        assert torch.equal(fast.contiguous().view(torch.uint8), slow.contiguous().view(torch.uint8))


@several
def test_both_forms_of_elementwise_kernels_agree(kernels, dtype, shape, resident, splits):
    run = Run(resident, splits, 1)
    gate = list(GATES)[(splits + resident) % 3]
    assert_both_forms_agree(check_bn_act, kernels, dtype, shape, FIRST, shape[1] != 24, run=run)
    assert_both_forms_agree(check_bn_backward, kernels, dtype, shape, FIRST, gate, run=run)


@several
def test_both_forms_of_sums_agree(kernels, dtype, shape, resident, splits):
    shape = (shape[0], min(shape[1], 264), *shape[2:])  # two tiles, of 17 and 16 octets
    run = Run(resident, splits, 1)
    gate = list(GATES)[(splits + resident) % 3]
    assert_both_forms_agree(check_bn_stats, kernels, dtype, shape, FIRST, 3.0, run=run)
    assert_both_forms_agree(check_bn_backward_reduce, kernels, dtype, shape, FIRST, gate, run=run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_forms_of_sums_of_planes_agree(kernels, dtype):
    for shape in ((9, 2, 40, 41), (150, 1, 8, 9)):
        run = Run(1, 2, 1)
        assert_both_forms_agree(check_bn_stats, kernels, dtype, shape, LAST, 3.0, run=run)
        assert_both_forms_agree(check_bn_backward_reduce, kernels, dtype, shape, LAST, "mask", run=run)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_octets_and_a_tail_without_vectors(kernels, dtype, offset):
    shape = (1, 17, 31, 23)  # 1515 octets and one element
    check_add_relu(kernels, dtype, shape, LAST, offset, Run(1, 1, 1))
    check_mask_grad(kernels, dtype, shape, LAST, True, offset, Run(1, 1, 1))
    check_mask_grad(kernels, dtype, shape, LAST, False, offset, Run(2, 1, 1))


@pytest.mark.parametrize("general", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_without_work(kernels, dtype, general):
    check_bn_act(kernels, dtype, (2, 40, 4, 6), FIRST, run=Run(1, 1, 1, general, 2))
    check_bn_backward(kernels, dtype, (2, 40, 4, 6), FIRST, "mask", run=Run(1, 1, 1, general, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_splits_some_of_them_empty(kernels, dtype):
    check_bn_stats(kernels, dtype, (2, 16, 8, 9), FIRST, mean=100.0, run=Run(1, 40, 1))
    check_bn_backward_reduce(kernels, dtype, (2, 16, 8, 9), FIRST, "mask", run=Run(1, 40, 1))
