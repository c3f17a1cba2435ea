"""The compiled operators as PyTorch sees them: schemas, fake kernels, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import Case

from resnet_fused import native
from resnet_fused.backends.cpu import CpuKernels

pytestmark = pytest.mark.skipif(not native.is_loaded(), reason=f"no compiled kernels: {native.status()}")

LAYOUTS = [torch.channels_last, torch.contiguous_format]
cpu = CpuKernels()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["channels_last", "contiguous"])
def test_opcheck(layout):
    case = Case((2, 5, 7, 6), torch.float32, layout)
    x, grad, scale, shift, mean = case.x, case.grad, case.scale, case.shift, case.mean
    ops = torch.ops.resnet_fused
    _, mask = cpu.bn_act(x, scale, shift, None, True, True)
    pooled, index = cpu.bn_relu_maxpool(x, scale, shift)
    backward = (grad, x, mask, mean, scale, shift, True)
    calls = [
        (ops.bn_stats, (x,)),
        (ops.bn_act, (x, scale, shift, case.residual, True, True)),
        (ops.bn_act, (x, scale, shift, None, False, False)),
        (ops.bn_act_, (x.clone(), scale, shift, case.residual, True)),
        (ops.bn_act_backward_reduce, (*backward, True)),
        (ops.bn_act_backward_reduce, (grad, x, None, mean, scale, shift, True, False)),
        (ops.bn_act_backward, (*backward, *case.coefficients)),
        (ops.bn_act_backward_, (grad.clone(), *backward[1:], *case.coefficients)),
        (ops.add_relu, (x, grad, True)),
        (ops.mask_grad, (grad, mask)),
        (ops.mask_grad_add_, (x.clone(), grad, mask)),
        (ops.bn_relu_maxpool, (x, scale, shift)),
        (ops.bn_relu_maxpool_backward_reduce, (pooled, index, x, mean)),
        (ops.bn_relu_maxpool_backward, (pooled, index, x, mean, *case.coefficients)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def bad_calls():
    ops = torch.ops.resnet_fused
    case = Case((2, 6, 5, 5), torch.float32)
    x, scale, shift = case.x, case.scale, case.shift
    mask = cpu.bn_act(x, scale, shift, None, True, True)[1]
    pooled, index = cpu.bn_relu_maxpool(x, scale, shift)
    return {
        r"bn_stats: x: expected \[N, C, H, W\], got 2 dim": lambda: ops.bn_stats(scale.view(2, 3)),
        r"bn_stats: x: expected float64.*got Int": lambda: ops.bn_stats(x.int()),
        r"bn_stats: x: expected .* dense .*strides": lambda: ops.bn_stats(x[:, :, :, ::2]),
        r"bn_act: scale: expected shape \[6\], got \[5\]": lambda: ops.bn_act(x, scale[:5], shift, None, True, False),
        r"bn_act: shift: expected Float, got Double": lambda: ops.bn_act(x, scale, shift.double(), None, True, False),
        r"bn_act: shift: expected stride 1, got 2": lambda: ops.bn_act(
            x, scale, torch.randn(12)[::2], None, True, False
        ),
        r"bn_act: residual: expected shape": lambda: ops.bn_act(x, scale, shift, x[:1], True, False),
        r"bn_act: residual: expected Float, got Half": lambda: ops.bn_act(x, scale, shift, x.half(), True, False),
        r"bn_act: residual: expected strides": lambda: ops.bn_act(x, scale, shift, x.contiguous(), True, False),
        r"mask_grad: mask: expected .* \[38\].* got \[37\]": lambda: ops.mask_grad(x, mask[:-1]),
        r"mask_grad: mask: expected Byte": lambda: ops.mask_grad(x, mask.int()),
        r"add_relu: b: expected strides": lambda: ops.add_relu(x, x.contiguous(), False),
        r"maxpool_backward_reduce: index: expected Byte": lambda: ops.bn_relu_maxpool_backward_reduce(
            pooled, index.int(), x, shift
        ),
        r"maxpool_backward_reduce: grad: expected shape \[2, 6, 3, 3\]": lambda: ops.bn_relu_maxpool_backward_reduce(
            x, index, x, shift
        ),
    }


@pytest.mark.parametrize("message", bad_calls() if native.is_loaded() else [])
def test_bad_arguments_are_named(message):
    with pytest.raises(RuntimeError, match=message):
        bad_calls()[message]()
