"""Grids of the CUDA kernels: every element once, no empty splits, the same sums on every GPU; and kernels run with them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import CUDA, HERE, LAYOUTS, Kernels, Run, build
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
        ("whole", ctypes.c_bool),
        ("lanes", ctypes.c_int),
    )


def elementwise(
    kernels: Kernels,
    count: int,
    channels: int = 1,
    inner: int = 1,
    aligned: bool = True,
    size: int = 2,
    tensors: int = 2,
    masks: int = 0,
    resident: int = 396,
) -> LaunchPlan:
    function = kernels.library.elementwise_plan
    function.restype = LaunchPlan
    whole = map(ctypes.c_int64, (count, inner, channels))
    return function(*whole, int(aligned), size, tensors, masks, ctypes.c_int64(resident))


def sums(
    kernels: Kernels,
    shape: tuple[int, ...],
    channels_last: bool,
    size: int = 2,
    tensors: int = 1,
    values: int = 3,
    aligned: bool = True,
) -> LaunchPlan:
    function = kernels.library.channel_sums_plan
    function.restype = LaunchPlan
    n, c, h, w = shape
    return function(*map(ctypes.c_int64, (n, h * w, c)), int(channels_last), int(aligned), size, 4, tensors, values)


@pytest.mark.parametrize("resident", [1, 320, 396])
@pytest.mark.parametrize("count", [1, 8, 2047, 2048, 2049, 10**6, 2**31 + 5])
def test_elementwise(kernels, count, resident):
    plan = elementwise(kernels, count, masks=1, resident=resident)
    octets = -(-count // 8)
    threads = plan.blocks_x * plan.threads
    assert plan.blocks_y == 1 and plan.shared_bytes == 0 and plan.blocks_x == min(-(-octets // 256), resident)
    assert threads * plan.each >= octets > threads * (plan.each - 1)
    assert plan.bytes == 2 * 2 * count + octets and not plan.whole


@pytest.mark.parametrize("channels", [8, 24, 64, 96, 128, 1000, 1536, 2048, 2056])
def test_threads_keep_their_channels(kernels, channels):
    """A thread has one octet alone, or the stride of the grid is a multiple of a pixel's octets; most blocks remain."""
    for pixels in (1, 49, 12544, 10**6):
        plan = elementwise(kernels, pixels * channels, channels)
        needed, stride = -(-pixels * channels // 2048), plan.blocks_x * plan.threads
        assert plan.whole and (plan.each == 1 or stride % (channels // 8) == 0)
        assert 0.6 * min(needed, 396) < plan.blocks_x <= min(needed, 396)


def test_where_the_general_form_is_needed(kernels):
    assert not elementwise(kernels, 8 * 64, 64, inner=8).whole
    assert not elementwise(kernels, 8 * 64, 64, aligned=False).whole
    assert not elementwise(kernels, 8 * 60, 60).whole
    far = elementwise(kernels, 8 * 397 * 4096, 8 * 397)  # 397 blocks would have to be resident
    assert not far.whole and far.blocks_x == 396
    assert sums(kernels, (8, 64, 7, 7), True).whole and not sums(kernels, (8, 64, 7, 7), True, aligned=False).whole
    assert not sums(kernels, (8, 63, 8, 8), True).whole and sums(kernels, (8, 63, 8, 8), False).whole
    assert not sums(kernels, (8, 64, 7, 7), False).whole


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_channel_sums(kernels, shape, channels_last):
    n, c, h, w = shape
    plan = sums(kernels, shape, channels_last)
    rows = n * h * w if channels_last else n * -(-h * w // 8)
    assert plan.blocks_x == (-(-c // 256) if channels_last else c)
    if channels_last:
        assert (
            plan.lanes <= 32 and 0 <= plan.blocks_x * plan.lanes - -(-c // 8) < plan.blocks_x
        )  # tiles as even as can be
    assert (plan.blocks_y - 1) * plan.each < rows <= plan.blocks_y * plan.each  # none is empty, none is missing
    assert plan.each * (1 if channels_last else 8) <= 2**23  # float32 counts them
    assert plan.blocks_x * plan.blocks_y <= max(1024, plan.blocks_x) or plan.each == 2**20
    assert plan.bytes == 2 * n * c * h * w + 2 * plan.blocks_y * 3 * c * 4
    assert plan.shared_bytes == (8 if channels_last else 1) * 256 * 3 * 4


FAULTS = {
    "a split too many": ("max<int64_t>(1, cut(rows, each)), each", "max<int64_t>(1, rows / each + 1), each"),
    "too many at a time": ("kRowsAtMost = 1 << 20", "kRowsAtMost = 1 << 30"),
    "empty splits": ("cut(rows, each)), each", "cut(rows, each) + 1), each"),
    "more blocks than are resident": ("std::min(blocks, resident)", "std::max(blocks, resident)"),
    "channels of a thread change": ("launched -= launched % period", "launched -= launched % 2"),
    "alignment does not count": ("whole = aligned && inner == 1", "whole = (aligned || true) && inner == 1"),
    "uneven tiles": ("lanes = cut(units, tiles)", "lanes = kLanes"),
    "bytes of masks": ("octets * masks", "octets * (masks - masks)"),
    "partial results once": ("2 * partials", "partials"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(tmp_path, fault):
    text = (CUDA / "launch_plan.h").read_text(encoding="utf-8")
    right, wrong = FAULTS[fault]
    assert text.count(right) == 1
    faulty = Kernels(build(tmp_path, {"launch_plan.h": text.replace(right, wrong)}, main=HERE / "launch_plans.cpp"))
    with pytest.raises(AssertionError):
        for channels_last in (True, False):
            for shape in KERNEL_SHAPES:
                test_channel_sums(faulty, shape, channels_last)
        for count in (1, 8, 2047, 2**31 + 5):
            test_elementwise(faulty, count, 2)
        for channels in (24, 1000):
            test_threads_keep_their_channels(faulty, channels)
        test_where_the_general_form_is_needed(faulty)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 4, 6), (3, 264, 3, 5), (4, 17, 20, 9)], ids=str)
def test_kernels_run_as_planned(kernels, shape, layout):
    splits = sums(kernels, shape, layout == torch.channels_last).blocks_y
    check_bn_stats(kernels, torch.float32, shape, layout, run=Run(396, 0, 0), planned=splits)
    check_bn_act(kernels, torch.bfloat16, shape, layout, run=Run(396, 0, 0))
