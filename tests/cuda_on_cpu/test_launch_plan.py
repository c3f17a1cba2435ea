"""Grids of the CUDA kernels: every element once, no empty splits, the same sums on every GPU; and kernels run with them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import CUDA, LAYOUTS, Kernels, Run, build
from test_batch_norm import SHAPES, check_bn_act, check_bn_stats

KERNEL_SHAPES = [
    *SHAPES,
    (256, 64, 112, 112),
    (256, 2048, 7, 7),
    (1, 3, 1, 1),
    (8, 64, 4096, 4096),
    (1, 2048, 16384, 16384),
]


class LaunchPlan(ctypes.Structure):
    _fields_ = (
        ("blocks_x", ctypes.c_int64),
        ("blocks_y", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("each", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


def elementwise(
    kernels: Kernels, count: int, size: int = 2, tensors: int = 2, masks: int = 0, sms: int = 132
) -> LaunchPlan:
    function = kernels.library.elementwise_plan
    function.restype = LaunchPlan
    return function(ctypes.c_int64(count), size, tensors, masks, sms)


def sums(
    kernels: Kernels, shape: tuple[int, ...], channels_last: bool, size: int = 2, tensors: int = 1, values: int = 3
) -> LaunchPlan:
    function = kernels.library.channel_sums_plan
    function.restype = LaunchPlan
    n, c, h, w = shape
    return function(*map(ctypes.c_int64, (n, h * w, c)), int(channels_last), size, 4, tensors, values)


@pytest.mark.parametrize("sms", [1, 80, 132])
@pytest.mark.parametrize("count", [1, 8, 2047, 2048, 2049, 10**6, 2**31 + 5])
def test_elementwise(kernels, count, sms):
    plan = elementwise(kernels, count, masks=1, sms=sms)
    octets = -(-count // 8)
    threads = plan.blocks_x * plan.threads
    assert plan.blocks_y == 1 and plan.shared_bytes == 0 and 1 <= plan.blocks_x <= 8 * sms
    assert threads * plan.each >= octets > threads * (plan.each - 1)
    assert plan.bytes == 2 * 2 * count + octets


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_channel_sums(kernels, shape, channels_last):
    n, c, h, w = shape
    plan = sums(kernels, shape, channels_last)
    rows = n * h * w if channels_last else n * -(-h * w // 8)
    assert plan.blocks_x == (-(-c // 256) if channels_last else c)
    assert (plan.blocks_y - 1) * plan.each < rows <= plan.blocks_y * plan.each  # none is empty, none is missing
    assert plan.each * (1 if channels_last else 8) <= 2**23  # float32 counts them
    assert plan.blocks_x * plan.blocks_y <= max(1024, plan.blocks_x) or plan.each == 2**20
    assert plan.bytes == 2 * n * c * h * w + 2 * plan.blocks_y * 3 * c * 4
    assert plan.shared_bytes == 256 * 3 * 4


FAULTS = {
    "a part too many": ("(whole + part - 1) / part", "whole / part + 1"),
    "too many at a time": ("kRowsAtMost = 1 << 20", "kRowsAtMost = 1 << 30"),
    "empty splits": ("cut(rows, each)), each", "cut(rows, each) + 1), each"),
    "more blocks than are resident": ("std::min(blocks, resident)", "std::max(blocks, resident)"),
    "bytes of masks": ("octets * masks", "octets * (masks - masks)"),
    "partial results once": ("2 * partials", "partials"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(tmp_path, fault):
    text = (CUDA / "launch_plan.h").read_text(encoding="utf-8")
    right, wrong = FAULTS[fault]
    assert text.count(right) == 1
    faulty = Kernels(build(tmp_path, {"launch_plan.h": text.replace(right, wrong)}, only=torch.float32))
    with pytest.raises(AssertionError):
        for channels_last in (True, False):
            for shape in KERNEL_SHAPES:
                test_channel_sums(faulty, shape, channels_last)
        for count in (1, 8, 2047, 2**31 + 5):
            test_elementwise(faulty, count, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 4, 6), (3, 264, 3, 5), (4, 17, 20, 9)], ids=str)
def test_kernels_run_as_planned(kernels, shape, layout):
    splits = sums(kernels, shape, layout == torch.channels_last).blocks_y
    check_bn_stats(kernels, torch.float32, shape, layout, run=Run(0, 0, 0), planned=splits)
    check_bn_act(kernels, torch.bfloat16, shape, layout, run=Run(0, 0, 0))
