"""What a launch costs: devices, tile configurations, and a model that ranks configurations for a shape.

The model predicts ``max(bytes / bandwidth, flops / rate)`` of a launch, where

* bytes are counted twice: from memory, each operand once unless L2 cannot hold what the running programs share, and from L2,
  where every tile reads its operands again;
* memory reaches its bandwidth only while enough bytes are on their way (Little's law): programs that run at the same time,
  times pipeline stages, times bytes of a stage;
* flops include the padding of partial tiles, and the fullest multiprocessor decides (wave quantisation);
* how many programs share a multiprocessor follows from estimates of registers and shared memory.

It is for ranking. What was measured stands in the tuning table (``tuning.py``) and has precedence.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes and compiler options of one launch.

    ``block_m`` always runs along the rows (pixels) of the ``[M, C]`` matrices; what the others run along:

    ==================================  ==================  =====================
    kernel                              ``block_n``         ``block_k``
    ==================================  ==================  =====================
    fprop1x1, fprop3x3                  K, of the output    C, the reduction
    dgrad1x1, dgrad3x3                  C, of the output    K, the reduction
    wgrad1x1, wgrad3x3 (reduce over M)  K, rows of dW       C, columns of dW
    gram (reduces over M)               C, rows of AᵀA      C, columns (the same)
    all others                          C                   unused (1)
    ==================================  ==================  =====================
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Device:
    """A GPU as the model sees it: rates that are reached, not advertised. ``arch`` is 90 for compute capability 9.0."""

    name: str
    arch: int
    sms: int
    clock_hz: float
    bandwidth: float  # bytes/s from memory
    half_rate: float  # flop/s of bf16 and fp16 on tensor cores
    float_rate: float  # flop/s of fp32 without them
    l2_bytes: int
    shared_bytes: int  # per multiprocessor; a program may have 1 KiB less
    registers: int = 65536
    threads: int = 2048

    def rate(self, dtype: torch.dtype) -> float:
        return self.half_rate if dtype.itemsize == 2 else self.float_rate


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
        if name in properties.name and (device.arch, device.sms) == (
            arch,
            sms,
        ):  # not a slice of it (MIG), nor a PCIe form
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


# What a launch does

# Tensors of [M, C] elements that a kernel without products reads and writes.
_STREAMS = {
    "bn_stats": (1, 0),
    "bn_act": (1, 1),
    "bn_backward_reduce": (2, 0),
    "bn_backward": (2, 1),
    "add_relu": (2, 1),
    "pool": (4, 1.5),  # of pooled pixels: four are read for each, with a byte for the winner
    "pool_backward": (1.375, 1),  # of pixels in front of the pooling
}
REDUCTIONS = ("bn_stats", "bn_backward_reduce")
PRODUCTS = ("fprop1x1", "dgrad1x1", "wgrad1x1", "gram", "fprop3x3", "dgrad3x3", "wgrad3x3")
KERNELS = (*PRODUCTS, *_STREAMS)


def over_rows(kernel: str) -> bool:
    """Whether the product reduces over the M rows, which it then splits among programs."""
    return kernel in ("wgrad1x1", "wgrad3x3", "gram")


@dataclass(frozen=True)
class Work:
    """One launch in the model's terms; sums over all programs unless said otherwise."""

    programs: int
    memory_bytes: float
    l2_bytes: float
    flops: float
    vector_flops: float  # outside the products: prologues, epilogues
    steps: int  # of one program's pipeline
    step_bytes: int  # that one step of one program loads
    feed_bytes: float  # from shared memory to the tensor cores
    registers: int  # of a thread
    shared_bytes: int  # of a program


def _warp_grid(rows: int, warps: int, arch: int) -> tuple[int, int]:
    """How the units that multiply divide a tile: warp groups on sm_90, warps on others; sm_100 reads a tile once."""
    if arch >= 100:
        return 1, 1
    units = max(1, warps // 4) if arch >= 90 else warps
    down = min(units, max(1, rows // (64 if arch >= 90 else 32)))
    return down, max(1, units // down)


def _product(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Work:
    m, c = shape["m"], shape["c"]
    k = c if kernel == "gram" else shape["k"]
    taps = 9 if kernel.endswith("3x3") else 1
    size, threads = dtype.itemsize, 32 * config.warps
    if over_rows(kernel):
        rows, columns, depth = k, c, m
        tile_rows, tile_columns, step = config.block_n, config.block_k, config.block_m
    else:
        rows, columns, depth = (m, k, c) if kernel.startswith("fprop") else (m, c, k)
        # A second product, with the coupling: in half precision with its two parts.
        depth += c * (2 if size == 2 else 1) * bool(shape.get("feedback"))
        tile_rows, tile_columns, step = config.block_m, config.block_n, config.block_k
    down, across = math.ceil(rows / tile_rows), math.ceil(columns / tile_columns)
    tiles, steps = down * across, math.ceil(depth / step)
    area = tile_rows * tile_columns
    one_step = (tile_rows + tile_columns) * step * size
    if over_rows(kernel):
        tiles *= taps
        splits = max(1, min(steps, 2 * device.sms // tiles))
        programs, steps = tiles * splits, math.ceil(steps / splits)
        memory = (
            m * k * (kernel != "gram") + m * c
        ) * size + 2 * 4.0 * programs * area  # partial products: written, read
    else:
        programs, steps = tiles, steps * taps
        unique = (rows * depth + taps * depth * columns) * size
        # Programs that share rows run together: their operands are read once if L2 holds them.
        together = min(down, math.ceil(device.sms / across)) * tile_rows * (depth + columns) * size
        passes = 1 if together + taps * depth * columns * size <= device.l2_bytes else across
        outputs = 1 + bool(shape.get("residual")) + bool(shape.get("below"))
        memory = unique + (passes - 1) * rows * depth * size + outputs * rows * columns * size
    flops = 2.0 * programs * steps * area * step
    groups = _warp_grid(tile_rows, config.warps, device.arch)
    feed = programs * steps * step * size * (tile_rows * groups[1] + tile_columns * groups[0])
    # As compiled: addresses take much where there are no descriptors, tiles of operands more than their bytes, and what sums
    # over rows keeps sums apart.
    operands = (tile_rows + tile_columns) * step / threads
    if size == 2:
        base, of_operands = (92, 1.5) if device.arch < 90 else (60 if over_rows(kernel) else 40, 0.75)
        registers = base + area / threads * (2 if over_rows(kernel) else 1) + of_operands * operands
    else:
        registers = 60 + area / threads * (3 if over_rows(kernel) else 1) + 4 * operands
    transformed = (tile_rows + tile_columns * over_rows(kernel)) * step
    return Work(
        programs=programs,
        memory_bytes=memory,
        l2_bytes=float(programs * steps * one_step),
        flops=flops,
        vector_flops=6.0 * programs * (steps * transformed + area),
        steps=steps,
        step_bytes=one_step,
        feed_bytes=feed,
        registers=math.ceil(registers),
        shared_bytes=max(config.stages * one_step, area * size),
    )


def _stream(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Work:
    m, c = shape["m"], shape["c"]
    reads, writes = _STREAMS[kernel]
    reads += bool(shape.get("residual"))
    area = config.block_m * config.block_n
    down, across = math.ceil(m / config.block_m), math.ceil(c / config.block_n)
    programs, steps = down * across, 1
    memory = m * c * dtype.itemsize * (reads + writes)
    if kernel in REDUCTIONS:
        programs = across * max(1, min(down, 4 * device.sms // across))
        steps = math.ceil(down * across / programs)
        memory += 2 * 8.0 * programs * config.block_n
    per_thread = math.ceil(area / (32 * config.warps))
    return Work(
        programs=programs,
        memory_bytes=memory,
        l2_bytes=programs * steps * area * dtype.itemsize * (reads + writes),
        flops=0.0,
        vector_flops=8.0 * programs * steps * area,
        steps=steps,
        step_bytes=math.ceil(area * dtype.itemsize * reads),
        feed_bytes=0.0,
        registers=24 + math.ceil(per_thread * (1 + reads * dtype.itemsize / 4)),
        shared_bytes=4 * config.block_n * config.warps if kernel in REDUCTIONS else 0,
    )


def work(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Work:
    """What launching ``kernel`` with ``config`` does."""
    return (_product if kernel in PRODUCTS else _stream)(kernel, shape, dtype, config, device)


def occupancy(registers: int, shared_bytes: int, warps: int, device: Device) -> int:
    """Programs that one multiprocessor holds at a time. Registers are given out to warps in units of 256."""
    of_warp = 256 * math.ceil(32 * max(registers, 1) / 256)
    return min(
        device.registers // (of_warp * warps),
        device.shared_bytes // (shared_bytes + KIB),
        device.threads // (32 * warps),
        32,
    )


# What a launch costs

LATENCY_S = 0.8e-6  # of a load from memory under load, about
L2_OVER_MEMORY = 2.0  # bandwidth of L2, in those of memory: an assumption that only ranks
FEED_BYTES_PER_CLOCK = 128  # of a multiprocessor's shared memory
MOST_REGISTERS = 240  # estimates above it may spill


@dataclass(frozen=True)
class Prediction:
    """Seconds of a launch, and what they come from; infinite where the configuration does not fit."""

    seconds: float
    memory_seconds: float
    l2_seconds: float
    compute_seconds: float
    programs_per_sm: int


def predict(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Prediction:
    """The time of one launch of ``kernel`` with ``config``."""
    todo = work(kernel, shape, dtype, config, device)
    resident = occupancy(todo.registers, todo.shared_bytes, config.warps, device)
    if resident == 0 or todo.registers > MOST_REGISTERS:
        return Prediction(math.inf, math.inf, math.inf, math.inf, 0)
    waves = math.ceil(todo.programs / (device.sms * resident))
    on_their_way = todo.programs / waves * todo.step_bytes * max(1, min(config.stages - 1, todo.steps))
    flow = min(1.0, on_their_way / (device.bandwidth * LATENCY_S))
    memory = todo.memory_bytes / (device.bandwidth * flow)
    l2 = todo.l2_bytes / (device.bandwidth * L2_OVER_MEMORY * flow)
    # The fullest multiprocessor decides; one program alone hides neither its first loads nor its epilogue.
    fullest = math.ceil(todo.programs / device.sms) * device.sms / todo.programs
    feed = todo.feed_bytes / (device.sms * device.clock_hz * FEED_BYTES_PER_CLOCK)
    compute = fullest * (max(todo.flops / device.rate(dtype), feed) + todo.vector_flops / device.float_rate)
    compute += waves * LATENCY_S / resident
    return Prediction(max(memory, l2, compute), memory, l2, compute, resident)


# Which configurations there are

_HALF_TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32))
_FLOAT_TILES = ((64, 64), (64, 32), (32, 64), (32, 32))  # IEEE products live in registers


# (kernel, bytes of an element, architecture, configuration) of which some variant spills though registers are left: ptxas
# trades a few stores for one more program on a multiprocessor.
_SPILLING = {
    ("fprop3x3", 4, 80, Config(32, 64, 16, 4, 2)),
    ("fprop3x3", 4, 80, Config(32, 32, 16, 4, 2)),
    ("dgrad3x3", 4, 80, Config(32, 32, 16, 4, 2)),
    ("fprop3x3", 4, 90, Config(32, 64, 16, 4, 2)),
    ("dgrad3x3", 4, 100, Config(32, 64, 16, 4, 2)),
    ("fprop3x3", 2, 80, Config(64, 128, 64, 8, 3)),
    ("dgrad3x3", 2, 100, Config(64, 128, 64, 8, 3)),
    ("dgrad3x3", 2, 100, Config(64, 128, 32, 8, 4)),
    ("fprop3x3", 4, 90, Config(32, 64, 32, 8, 2)),
    ("fprop3x3", 2, 80, Config(64, 128, 64, 8, 2)),
    ("fprop3x3", 4, 80, Config(32, 32, 32, 4, 2)),
    ("fprop3x3", 4, 80, Config(32, 64, 16, 8, 2)),
    ("fprop3x3", 4, 90, Config(32, 64, 32, 4, 2)),
    ("dgrad3x3", 4, 80, Config(32, 32, 32, 4, 2)),
    ("fprop3x3", 2, 80, Config(64, 128, 32, 4, 2)),
    ("fprop3x3", 2, 80, Config(64, 128, 32, 4, 4)),
    ("fprop3x3", 4, 90, Config(32, 32, 32, 4, 2)),
    ("wgrad3x3", 2, 80, Config(32, 64, 64, 4, 3)),
    ("fprop3x3", 2, 80, Config(64, 128, 32, 4, 3)),
    ("fprop3x3", 2, 80, Config(64, 128, 64, 8, 4)),
}


def _most_sums(kernel: str, half: bool, warps: int, arch: int, feedback: bool) -> int:
    """Sums of a thread beyond which some variant of the kernel spills, as compiled by Triton 3.6."""
    if not half:
        return 16
    if kernel.startswith("dgrad"):  # its epilogue reads tensors too
        return 64 if 90 <= arch < 100 and warps == 8 and not feedback else 32
    if kernel == "gram" and 90 <= arch < 100:  # both of its operands are transformed
        return 32
    return 64 if over_rows(kernel) or arch < 100 else 32


def _product_candidates(kernel: str, dtype: torch.dtype, arch: int, feedback: bool) -> Iterator[Config]:
    half = dtype.itemsize == 2
    for (rows, columns), step in itertools.product(
        _HALF_TILES if half else _FLOAT_TILES, (64, 32) if half else (16, 32)
    ):
        for warps, stages in itertools.product((4, 8), (3, 2, 4) if half else (2,)):
            if not 8 <= rows * columns / (32 * warps) <= _most_sums(kernel, half, warps, arch, feedback):
                continue
            if kernel == "gram" and rows != columns:
                continue
            if kernel.startswith("dgrad") and (arch < 90 and step > 32 if half else rows * columns > 64 * 32):
                continue  # spills, as compiled by Triton 3.6
            if over_rows(kernel):
                if arch >= 100 and stages != 2:
                    continue  # more stages with a transposed operand fail inside Triton 3.6: one choice is left
                yield Config(step, rows, columns, warps, 1 if arch >= 100 else stages)
            else:
                yield Config(rows, columns, step, warps, stages)


def _stream_candidates(kernel: str, dtype: torch.dtype) -> Iterator[Config]:
    most = 8 if kernel.startswith("pool") else 32  # nine taps, or four windows and four pixels, want as many tiles
    for rows, columns, warps in itertools.product((32, 64, 16, 128), (64, 128, 32), (4, 8)):
        # Rows of whole 128-byte lines; at least a 16-byte load for each thread, and its tile in registers.
        if columns * dtype.itemsize >= 128 and 8 <= rows * columns / (32 * warps) <= most:
            yield Config(rows, columns, 1, warps, 1)


@functools.lru_cache(maxsize=256)
def candidates(kernel: str, dtype: torch.dtype, arch: int, feedback: bool = False) -> tuple[Config, ...]:
    """The configurations of ``kernel`` that are worth trying, in a fixed order; with ``feedback`` of those with a coupling.

    Raises:
        ValueError: no kernel has that name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    products = kernel in PRODUCTS
    found = _product_candidates(kernel, dtype, arch, feedback) if products else _stream_candidates(kernel, dtype)
    return tuple(c for c in dict.fromkeys(found) if (kernel, dtype.itemsize, arch, c) not in _SPILLING)


def ranked(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, device: Device) -> list[Config]:
    """The candidates that fit, the fastest by the model first; those within about 2 % keep the order of ``candidates``."""
    tried = candidates(kernel, dtype, device.arch, bool(shape.get("feedback")))
    timed = [(predict(kernel, shape, dtype, c, device).seconds, c) for c in tried]
    fitting = [(round(math.log(seconds) / 0.02), config) for seconds, config in timed if math.isfinite(seconds)]
    return [config for _, config in sorted(fitting, key=lambda pair: pair[0])]
