"""GPUs as the cost model sees them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """A GPU as the model sees it: rates that are reached, not advertised. ``arch`` is 90 for compute capability 9.0."""

    name: str
    arch: int
    sms: int
    clock_hz: float
    bandwidth: float  # bytes/s from memory
    half_rate: float  # flop/s of bf16 and fp16 on tensor cores; of TF32 half of it
    float_rate: float  # flop/s of fp32 without them
    l2_bytes: int
    shared_bytes: int  # per multiprocessor; a program may have 1 KiB less
    registers: int = 65536
    threads: int = 2048

    def rate(self, dtype: torch.dtype, precision: str = "ieee") -> float:
        """Flop/s of products; float32 is multiplied in ``precision``: "ieee", "tf32", or "tf32x3", three products for one."""
        if dtype.itemsize == 2:
            return self.half_rate
        return self.float_rate if precision == "ieee" else self.half_rate / (2 if precision == "tf32" else 6)


# Published peaks, times the shares that an H200 reaches: copying 4.3 of 4.8 TB/s, bf16 products 790 of 989 TFLOP/s.
MEMORY_SHARE, TENSOR_SHARE = 0.90, 0.80
KIB, MIB = 2**10, 2**20


def _device(
    name: str, arch: int, sms: int, clock: float, tb_s: float, tflops: tuple[float, float], l2: int, shared: int
):
    rates = tb_s * 1e12 * MEMORY_SHARE, tflops[0] * 1e12 * TENSOR_SHARE, tflops[1] * 1e12 * TENSOR_SHARE
    return Device(name, arch, sms, clock * 1e9, *rates, l2 * MIB, shared * KIB)


DEVICES = {
    device.name: device
    for device in (
        _device("A100", 80, 108, 1.41, 2.039, (312, 19.5), 40, 164),
        _device("H100", 90, 132, 1.83, 3.35, (989, 67), 50, 228),
        _device("H200", 90, 132, 1.83, 4.8, (989, 67), 60, 228),
        _device("B200", 100, 148, 1.85, 8.0, (2250, 75), 126, 228),
    )
}

# Dense flop per clock and multiprocessor: tensor cores in half precision, plain float32.
_FLOP_PER_CLOCK = {
    70: (1024, 128),
    80: (2048, 128),
    86: (512, 256),
    89: (1024, 256),
    90: (4096, 256),
    100: (8192, 256),
    120: (1024, 256),
}


def device_from_properties(properties: Any) -> Device:
    """From what ``torch.cuda.get_device_properties`` tells: an entry of ``DEVICES``, or an estimate for any other GPU."""
    arch, sms = 10 * properties.major + properties.minor, properties.multi_processor_count
    for name, device in DEVICES.items():
        # Not a slice of it (MIG), nor a PCIe form.
        if name in properties.name and (device.arch, device.sms) == (arch, sms):
            return device
    nearest = max((known for known in _FLOP_PER_CLOCK if known <= arch), default=min(_FLOP_PER_CLOCK))
    clock = getattr(properties, "clock_rate", 1_500_000) * 1e3
    tensor, plain = (flop * sms * clock * TENSOR_SHARE for flop in _FLOP_PER_CLOCK[nearest])
    # Both edges of the memory clock carry data. 8 GB/s a multiprocessor and GHz is what the smaller GPUs have.
    bandwidth = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    return Device(
        name=properties.name,
        arch=arch,
        sms=sms,
        clock_hz=clock,
        bandwidth=MEMORY_SHARE * (bandwidth or 8 * sms * clock),
        half_rate=tensor,
        float_rate=plain,
        l2_bytes=getattr(properties, "L2_cache_size", 0) or 4 * MIB,
        shared_bytes=getattr(properties, "shared_memory_per_multiprocessor", 0) or 100 * KIB,
        threads=getattr(properties, "max_threads_per_multi_processor", 2048),
    )


@functools.lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """The GPU behind ``device``."""
    return device_from_properties(torch.cuda.get_device_properties(device))
