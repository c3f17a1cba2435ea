"""The cost model: what it predicts where theory is plain, and that every configuration it ranks can be launched."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from resnet_fused.backends.triton import configs, cost, devices
from resnet_fused.backends.triton.configs import Config

H200 = devices.DEVICES["H200"]
BF16, FP32 = torch.bfloat16, torch.float32
EXPAND = {"m": 256 * 56 * 56, "c": 64, "k": 256}  # bound by memory
DEEP = {"m": 256 * 14 * 14, "c": 2048, "k": 2048}  # bound by the tensor cores
KERNELS = pytest.mark.parametrize("kernel", configs.KERNELS)


def shape_of(kernel: str, m: int = 32 * 28 * 28, c: int = 128, k: int = 512) -> dict[str, int]:
    shape = {"m": m, "c": c}
    if kernel in configs.PRODUCTS and kernel != "gram":
        shape["k"] = k
    return shape | ({"h": 28, "w": 28} if kernel.endswith("3x3") else {})


@KERNELS
@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=devices.DEVICES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_a_choice_is_valid(kernel, device, dtype):
    for m, c, k in ((256 * 56 * 56, 64, 256), (49, 2048, 512), (1, 1, 1), (1000, 17, 35)):
        shape = shape_of(kernel, m, c, k)
        config = cost.ranked(kernel, shape, dtype, device)[0]
        blocks = (config.block_m, config.block_n, config.block_k)
        assert all(block & (block - 1) == 0 for block in blocks) and config.warps in (4, 8)
        assert min(blocks) >= 16 if kernel in configs.PRODUCTS else config.block_k == 1
        todo = cost.work(kernel, shape, dtype, config, device)
        assert todo.shared_bytes <= device.shared_bytes - devices.KIB and todo.registers <= cost.MOST_REGISTERS
        if kernel == "gram":
            assert config.block_n == config.block_k
        if kernel in configs.PRODUCTS and dtype != FP32:  # wgmma and tcgen05 want 64 rows for four warps
            assert (config.block_n if configs.over_rows(kernel) else config.block_m) >= 64


def test_what_memory_bounds_takes_bytes_over_bandwidth():
    m, c, k = EXPAND.values()
    config = cost.ranked("fprop1x1", EXPAND, BF16, H200)[0]
    least = (m * c + m * k + c * k) * 2 / H200.bandwidth
    assert cost.predict("fprop1x1", EXPAND, BF16, config, H200).seconds == pytest.approx(least, rel=0.05)
    for kernel, tensors in (
        ("bn_stats", 1),
        ("bn_act", 2),
        ("bn_backward_reduce", 2),
        ("bn_backward", 3),
        ("add_relu", 2),
    ):
        shape = {"m": m, "c": k}
        config = cost.ranked(kernel, shape, BF16, H200)[0]
        least = tensors * m * k * 2 / H200.bandwidth
        assert cost.predict(kernel, shape, BF16, config, H200).seconds == pytest.approx(least, rel=0.05)


def test_what_tensor_cores_bound_takes_flops_over_rate():
    config = cost.ranked("fprop1x1", DEEP, BF16, H200)[0]
    least = 2 * math.prod(DEEP.values()) / H200.half_rate
    predicted = cost.predict("fprop1x1", DEEP, BF16, config, H200)
    assert predicted.memory_seconds < least < predicted.seconds < 1.6 * least


def test_deep_products_want_large_tiles():
    best = cost.ranked("fprop1x1", DEEP, BF16, H200)[0]
    assert best.block_m * best.block_n == 128 * 128
    small = Config(64, 32, 64, 4, 3)
    assert cost.predict("fprop1x1", DEEP, BF16, small, H200).seconds > 1.5 * (
        cost.predict("fprop1x1", DEEP, BF16, best, H200).seconds
    )


def test_few_rows_want_small_tiles():
    few = {"m": 32 * 7 * 7, "c": 2048, "k": 512}
    best = cost.ranked("fprop1x1", few, BF16, H200)[0]
    assert best.block_m * best.block_n < 128 * 128
    assert cost.work("fprop1x1", few, BF16, best, H200).programs > H200.sms // 2


def test_the_fullest_multiprocessor_decides():
    config = Config(128, 128, 64, 8, 3)
    wave = {"m": 128 * H200.sms, "c": 4096, "k": 128}
    one, more = (
        cost.predict("fprop1x1", wave | {"m": rows}, BF16, config, H200).compute_seconds
        for rows in (wave["m"], wave["m"] + 1)
    )
    assert more > 1.9 * one


def test_bytes_on_their_way_limit_the_flow():
    """One warp-sized program a multiprocessor does not reach the bandwidth."""
    shape = {"m": 16 * H200.sms, "c": 64}
    config = Config(16, 64, 1, 4, 1)
    least = 2 * shape["m"] * shape["c"] * 2 / H200.bandwidth
    assert cost.predict("bn_act", shape, BF16, config, H200).seconds > 4 * least


def test_what_does_not_fit_is_never_chosen():
    huge = Config(128, 128, 256, 8, 4)
    assert cost.predict("fprop1x1", DEEP, BF16, huge, H200).seconds == math.inf
    spilling = Config(128, 256, 64, 4, 2)
    assert cost.predict("fprop1x1", DEEP, BF16, spilling, H200).seconds == math.inf


def test_occupancy():
    assert cost.occupancy(128, 64 * devices.KIB, 8, H200) == 2  # 65536 registers
    assert cost.occupancy(64, 100 * devices.KIB, 4, H200) == 2  # 228 KiB
    assert cost.occupancy(24, 0, 8, H200) == 8  # 2048 threads
    assert cost.occupancy(128, 228 * devices.KIB, 8, H200) == 0


M, C, K = EXPAND.values()


@pytest.mark.parametrize(
    ("kernel", "flags", "more"),
    [
        ("fprop1x1", {"residual": 1}, 2 * M * K),
        ("fprop1x1", {"mask": 1}, M * K / 8),
        ("fprop1x1", {"c2": 32}, 2 * 32 * (M + K)),
        ("dgrad1x1", {"residual": 1}, 2 * M * C),
        ("dgrad1x1", {"below": 1, "accumulate": 1}, 4 * M * C),
        ("dgrad1x1", {"masked": 1}, M * K / 8),
        ("dgrad1x1", {"pending_grad": 1}, 2 * M * K),
        ("dgrad1x1", {"feedback": 1}, 2 * (M * C + 2 * C * C)),  # the coupling has two parts
        ("wgrad1x1", {"masked": 1, "pending_grad": 1}, M * K / 8 + 2 * M * K),
        ("bn_act", {"residual": 1, "mask": 1}, 2 * M * C + M * C / 8),
        ("bn_backward_reduce", {"activation": 1}, 2 * M * C),
        ("bn_backward", {"mask": 1}, M * C / 8),
        ("add_relu", {"residual": 1}, 2 * M * C),
    ],
)
def test_what_a_flag_adds_costs_its_bytes(kernel, flags, more):
    config = Config(64, 64, 64, 4, 2) if kernel in configs.PRODUCTS else Config(32, 64, 1, 4, 1)
    plain, added = (cost.work(kernel, EXPAND | f, BF16, config, H200).memory_bytes for f in ({}, flags))
    assert added - plain == more


def test_a_second_operand_reads_the_gradient_once():
    """As many programs: the partial results are as large; what is more is the second operand."""
    config, shape = Config(64, 64, 64, 4, 2), {"m": M, "c": 64, "k": 4096}
    plain, added = (cost.work("wgrad1x1", shape | f, BF16, config, H200) for f in ({"c": 128}, {"c2": 64}))
    assert plain.programs == added.programs and plain.memory_bytes == added.memory_bytes and plain.flops == added.flops


@pytest.mark.parametrize(("precision", "factor"), [("tf32", 2), ("tf32x3", 6)])
def test_rates_of_float32(precision, factor):
    assert H200.rate(FP32, precision) == H200.half_rate / factor > H200.rate(FP32) == H200.float_rate
    config = cost.ranked("fprop1x1", DEEP | {precision: 1}, FP32, H200)[0]
    predicted = cost.predict("fprop1x1", DEEP | {precision: 1}, FP32, config, H200)
    least = factor * 2 * math.prod(DEEP.values()) / H200.half_rate
    assert least < predicted.seconds < 1.7 * least
    slow = cost.ranked("fprop1x1", DEEP, FP32, H200)[0]
    assert predicted.seconds < cost.predict("fprop1x1", DEEP, FP32, slow, H200).seconds


# Devices


def properties(name="NVIDIA H200", major=9, minor=0, sms=132, **others) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=sms, **others)


def test_known_devices():
    assert devices.device_from_properties(properties()) is H200
    assert (round(H200.bandwidth / 1e12, 1), round(H200.half_rate / 1e12)) == (4.3, 791)
    assert devices.device_from_properties(properties("NVIDIA A100-SXM4-80GB", 8, 0, 108)).name == "A100"
    assert devices.device_from_properties(properties("NVIDIA B200", 10, 0, 148)).arch == 100


def test_other_devices_are_estimated():
    slice_of = devices.device_from_properties(properties("NVIDIA H200 MIG 3g.71gb", sms=60))
    assert slice_of.sms == 60 and slice_of.half_rate < H200.half_rate / 2 * 1.1
    a10 = properties(
        "NVIDIA A10", 8, 6, 72, clock_rate=1_695_000, memory_clock_rate=6_251_000, memory_bus_width=384,
        L2_cache_size=6 * devices.MIB, shared_memory_per_multiprocessor=100 * devices.KIB,
        max_threads_per_multi_processor=1536,
    )  # fmt: skip
    device = devices.device_from_properties(a10)
    assert device.bandwidth == pytest.approx(600e9 * devices.MEMORY_SHARE, rel=0.01)
    assert (device.arch, device.l2_bytes, device.threads) == (86, 6 * devices.MIB, 1536)
    for kernel in configs.KERNELS:
        assert cost.ranked(kernel, shape_of(kernel), BF16, device)
