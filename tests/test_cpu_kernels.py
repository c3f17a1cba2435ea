"""The compiled processor kernels against float64, beside stock PyTorch in the same dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_cases import Case
from torch import Tensor

from resnet_fused import native
from resnet_fused.backends.aten import AtenKernels, pack_mask, unpack_mask
from resnet_fused.backends.cpu import CpuKernels
from resnet_fused.backends.operands import acc_dtype
from resnet_fused.testing import assert_as_accurate

pytestmark = [
    pytest.mark.skipif(not native.is_loaded(), reason=f"no compiled kernels: {native.status()}"),
    pytest.mark.one_in(3),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Blocks are 16 elements and tiles at least 32 pixels: fewer, as many, more, and planes that end inside a block.
SHAPES = [
    (1, 3, 1, 1),
    (2, 3, 9, 7),
    (1, 8, 5, 5),
    (3, 17, 7, 11),
    (2, 35, 13, 9),
    (2, 64, 8, 8),
    (1, 16, 65, 63),
    (2, 130, 3, 5),
]

every_case = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"]),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
]


def over_every_case(test):
    for mark in every_case:
        test = mark(test)
    return test


cpu, stock = CpuKernels(), AtenKernels()


def check(name, ours, plain, gold, rows=1):
    ours, plain, gold = (t if isinstance(t, tuple) else (t,) for t in (ours, plain, gold))
    for i, (one, other, reference) in enumerate(zip(ours, plain, gold, strict=True)):
        # Sums of terms of either sign may come out at about 0, and in float64 the reference is no better than either
        # side: there the size of the terms gives the scale.
        scale = 16 if one.dtype is torch.float64 else float(one.dim() == 1)
        assert_as_accurate(one, other, reference, rows=rows, name=f"{name}[{i}]", scale=scale)


@over_every_case
def test_statistics(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    check("bn_stats", cpu.bn_stats(case.x), stock.bn_stats(case.x), stock.bn_stats(case.x.double()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("channels", [3, 64, 130])
def test_statistics_when_the_mean_is_a_thousand_deviations(channels, layout):
    x = Case((4, channels, 29, 31), torch.float32, layout, mean=1000.0).x
    mean, var = cpu.bn_stats(x)
    gold_var, gold_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean.double(), gold_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), gold_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("save_mask", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@over_every_case
def test_bn_act(shape, dtype, layout, with_residual, relu, save_mask):
    case = Case(shape, dtype, layout)

    def run(kernels, case):
        residual = case.residual if with_residual else None
        return kernels.bn_act(case.x, case.scale, case.shift, residual, relu, save_mask)

    out, mask = run(cpu, case)
    check("bn_act", out, run(stock, case)[0], run(stock, case.double())[0])
    assert out.stride() == case.x.stride()
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_empty(0))
    written_over = case.x.clone()
    cpu.bn_act_(written_over, case.scale, case.shift, case.residual if with_residual else None, relu)
    assert torch.equal(written_over, out)


@pytest.mark.parametrize("gate", ["mask", "recompute", "open"])
@over_every_case
def test_bn_act_backward(shape, dtype, layout, gate):
    case = Case(shape, dtype, layout)
    relu = gate != "open"
    mask = cpu.bn_act(case.x, case.scale, case.shift, None, True, True)[1]
    # The reference takes the mask that the forward made in this dtype: a rounding at 0 must not count as an error.
    given = mask if relu else None

    def arguments(case, mask):
        return case.grad, case.x, mask, case.mean, case.scale, case.shift, relu

    ours = cpu.bn_act_backward_reduce(*arguments(case, mask if gate == "mask" else None), True)
    plain = stock.bn_act_backward_reduce(*arguments(case, given), True)
    gold = stock.bn_act_backward_reduce(*arguments(case.double(), given), True)
    check("sums", ours[:2], plain[:2], gold[:2], rows=case.rows)
    assert torch.equal(ours[2], cpu.bn_act(case.x, case.scale, case.shift, None, relu, False)[0])
    without = cpu.bn_act_backward_reduce(*arguments(case, mask if gate == "mask" else None), False)
    assert torch.equal(without[0], ours[0])
    assert torch.equal(without[1], ours[1])
    assert without[2].numel() == 0

    dx = cpu.bn_act_backward(*arguments(case, mask if gate == "mask" else None), case.coefficients)
    plain = stock.bn_act_backward(*arguments(case, given), case.coefficients)
    gold = stock.bn_act_backward(*arguments(case.double(), given), case.double().coefficients)
    check("dx", dx, plain, gold)
    case.grad = case.grad.clone()
    written_over = cpu.bn_act_backward(
        *arguments(case, mask if gate == "mask" else None), case.coefficients, inplace=True
    )
    assert written_over is case.grad
    assert torch.equal(written_over, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_formed_again_from_x_is_the_forward_mask(dtype):
    # scale * x + shift falls on and beside 0, and below the smallest number of the dtype.
    case = Case((2, 32, 16, 16), dtype)
    for size in (1.0, 1e-7, 1e-38):
        shift = -(case.scale * case.x[0, :, 0, 0].to(case.scale.dtype)) * size
        scale = case.scale * size
        out, mask = cpu.bn_act(case.x, scale, shift, None, True, True)
        assert torch.equal(mask, pack_mask(~(out <= 0)))
        with_mask = cpu.bn_act_backward(case.grad, case.x, mask, case.mean, scale, shift, True, case.coefficients)
        without = cpu.bn_act_backward(case.grad, case.x, None, case.mean, scale, shift, True, case.coefficients)
        assert torch.equal(with_mask, without)


@over_every_case
def test_residual_additions(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    out, mask = cpu.add_relu(case.x, case.residual, True)
    plain, plain_mask = stock.add_relu(case.x, case.residual, True)
    assert torch.equal(out, plain)
    assert torch.equal(mask, plain_mask)
    assert torch.equal(cpu.add_relu(case.x, case.residual, False)[0], out)
    assert torch.equal(cpu.mask_grad(case.grad, mask), stock.mask_grad(case.grad, mask))
    total = case.residual.clone()
    cpu.mask_grad_add_(total, case.grad, mask)
    assert torch.equal(total, torch.where(unpack_mask(mask, case.x), case.grad, 0.0) + case.residual)


@over_every_case
def test_max_pooling(shape, dtype, layout):
    case = Case(shape, dtype, layout)
    out, index = cpu.bn_relu_maxpool(case.x, case.scale, case.shift)
    activation = cpu.bn_act(case.x, case.scale, case.shift, None, True, False)[0]
    stock_out = torch.nn.functional.max_pool2d(activation, 3, 2, 1)
    assert torch.equal(out, stock_out)
    assert out.is_contiguous(memory_format=layout)
    assert index.is_contiguous(memory_format=layout)

    leaf = activation.clone().requires_grad_()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).contiguous(memory_format=layout)
    torch.nn.functional.max_pool2d(leaf, 3, 2, 1).backward(grad)
    dz = torch.where(activation <= 0, 0.0, leaf.grad)
    double = case.double()
    gold_dz = stock._scatter(grad.double(), index, double.x)
    if dtype is torch.float64:
        torch.testing.assert_close(gold_dz, dz, rtol=1e-14, atol=1e-14)
    sums = cpu.bn_relu_maxpool_backward_reduce(grad, index, case.x, case.mean)
    plain = stock.bn_relu_maxpool_backward_reduce(grad, index, case.x, case.mean)
    gold = gold_dz.sum((0, 2, 3)), (gold_dz * (double.x - double.mean.view(1, -1, 1, 1))).sum((0, 2, 3))
    check("sums", sums, plain, gold, rows=case.rows)
    dx = cpu.bn_relu_maxpool_backward(grad, index, case.x, case.mean, case.coefficients)
    plain = stock.bn_relu_maxpool_backward(grad, index, case.x, case.mean, case.coefficients)
    gold = stock.bn_relu_maxpool_backward(grad.double(), index, double.x, double.mean, double.coefficients)
    check("dx", dx, plain, gold)
    assert dx.stride() == case.x.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_nan_in_max_pooling(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 3, (2, 19, 11, 13), generator=generator).to(dtype)
    x[torch.rand(x.shape, generator=generator) < 0.05] = float("nan")
    x[torch.rand(x.shape, generator=generator) < 0.05] = float("inf")
    x = x.contiguous(memory_format=layout)
    ones = torch.ones(19, dtype=acc_dtype(dtype))
    out, index = cpu.bn_relu_maxpool(x, ones, ones * 0)
    plain_out, plain_index = stock.bn_relu_maxpool(x, ones, ones * 0)
    torch.testing.assert_close(out, plain_out, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(index, plain_index)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_channels(dtype, layout):
    case = Case((2, 35, 9, 7), dtype, layout)
    planted = {1: float("nan"), 5: float("inf"), 20: float("-inf")}
    for channel, value in planted.items():
        case.x[1, channel, 4, 3] = value
    healthy = torch.ones(35, dtype=torch.bool)
    healthy[list(planted)] = False
    for one, other in zip(cpu.bn_stats(case.x), stock.bn_stats(case.x), strict=True):
        torch.testing.assert_close(one[healthy], other[healthy], rtol=1e-5, atol=1e-5)
        assert not one[~healthy].isfinite().any()
    out, mask = cpu.bn_act(case.x, case.scale, case.shift, case.residual, True, True)
    torch.testing.assert_close(
        out,
        stock.bn_act(case.x, case.scale, case.shift, case.residual, True, False)[0],
        equal_nan=True,
        rtol=0.02,
        atol=0.02,
    )
    assert out[1, 1, 4, 3].isnan()
    assert torch.equal(mask, pack_mask(~(out <= 0)))
    case.grad[0, 2, 0, 0] = float("nan")
    ours = cpu.bn_act_backward_reduce(case.grad, case.x, None, case.mean, case.scale, case.shift, False, False)
    bad = torch.zeros(35, dtype=torch.bool)
    bad[2] = True
    assert torch.equal(ours[0].isnan(), bad)
    assert not ours[1][[c for c in range(35) if c not in (1, 2, 5, 20)]].isnan().any()


def everything(case: Case) -> list[Tensor]:
    """Every kernel's results."""
    x, grad, scale, shift, mean = case.x, case.grad, case.scale, case.shift, case.mean
    results = [*cpu.bn_stats(x)]
    out, mask = cpu.bn_act(x, scale, shift, case.residual, True, True)
    results += [out, mask]
    for given in (mask, None):
        results += cpu.bn_act_backward_reduce(grad, x, given, mean, scale, shift, True, True)
        results.append(cpu.bn_act_backward(grad, x, given, mean, scale, shift, True, case.coefficients))
    results += [*cpu.add_relu(x, case.residual, True), cpu.mask_grad(grad, mask)]
    pooled, index = cpu.bn_relu_maxpool(x, scale, shift)
    results += [pooled, index, *cpu.bn_relu_maxpool_backward_reduce(pooled, index, x, mean)]
    results.append(cpu.bn_relu_maxpool_backward(pooled, index, x, mean, case.coefficients))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 48, 130])
def test_the_number_of_threads_changes_no_bit(channels, dtype, layout):
    case = Case((4, channels, 37, 41), dtype, layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(case)
        torch.set_num_threads(2)
        together = everything(case)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written(shape, layout):
    case = Case(shape, torch.float32, layout)
    clean = everything(case)
    # Fresh memory comes filled with NaN, or 255.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = everything(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)
        assert not one.is_floating_point() or one.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty_tensors(shape):
    case = Case(shape, torch.float32)
    out, mask = cpu.bn_act(case.x, case.scale, case.shift, case.residual, True, True)
    assert out.shape == shape
    assert mask.shape == (0,)
    assert all(t.isnan().all() for t in cpu.bn_stats(case.x))
    sums = cpu.bn_act_backward_reduce(case.grad, case.x, None, case.mean, case.scale, case.shift, True, True)
    assert not sums[0].any()
    assert not sums[1].any()
    pooled, index = cpu.bn_relu_maxpool(case.x, case.scale, case.shift)
    assert cpu.bn_relu_maxpool_backward(pooled, index, case.x, case.mean, case.coefficients).shape == shape


@pytest.mark.one_in(1)
@pytest.mark.parametrize("capability", ["baseline", pytest.param("avx2", marks=pytest.mark.slow), "avx512"])
def test_every_instruction_set_that_runs_here(capability):
    info = native.build_info()
    if not info:
        pytest.skip("the bindings that tell the instruction sets are not built")
    known = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if known.index(capability) > known.index(str(info["detected"])):
        pytest.skip(f"this processor has no {capability} (it has {info['detected']})")
    if info["selected"] != info["detected"]:
        pytest.skip("RESNET_FUSED_CPU_CAPABILITY is set: the child process runs one set already")
    if capability == info["selected"]:
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "not instruction_set",
    ]
    environment = {**os.environ, "RESNET_FUSED_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
