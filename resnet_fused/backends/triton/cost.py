"""What a launch costs: a model that ranks configurations (``configs``) for a shape on a GPU (``devices``).

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

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .configs import PRODUCTS, REDUCTIONS, Config, candidates, over_rows, precision_of
from .devices import KIB, Device

# Tensors of [M, C] elements that a kernel without products reads and writes.
_STREAMS = {
    "bn_stats": (1, 0),
    "bn_act": (1, 1),
    "bn_backward_reduce": (2, 0),
    "bn_backward": (2, 1),
    "add_relu": (1, 1),
    "pool": (4, 1.5),  # of pooled pixels: four are read for each, with a byte for the winner
    "pool_backward": (1.375, 1),  # of pixels in front of the pooling
}


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


@dataclass(frozen=True)
class _Matrices:
    """A product as the model sees it: ``[rows, columns]`` results, each a sum over ``depth``."""

    rows: int
    columns: int
    depth: int
    row_bytes: float  # of the operands that a row of the results, or of what is summed over, reads
    other_bytes: float  # of the filters, or of what else is read once
    result_bytes: float  # of a row of the results: written, and what is read to be added to it


def _matrices(kernel: str, shape: Mapping[str, int], size: int) -> _Matrices:
    """Flags: "c2" channels of a second operand, "masked" a mask read, "mask" one written, "pending_grad" a gradient of two
    tensors, "feedback", "residual", "below", "accumulate": tensors of the size of the result."""

    def has(flag: str) -> bool:
        return bool(shape.get(flag))

    m, c, c2 = shape["m"], shape["c"], shape.get("c2", 0)
    if kernel == "gram":
        return _Matrices(c, c, m, c * size, 0.0, 0.0)
    k = shape["k"]
    gradient = k * size * (1 + has("pending_grad")) + k / 8 * has("masked")
    if over_rows(kernel):
        return _Matrices(k, c + c2, m, gradient + (c + c2) * size, 0.0, 0.0)
    if kernel.startswith("fprop"):
        written = k * size * (1 + has("residual")) + k / 8 * has("mask")
        return _Matrices(m, k, c + c2, (c + c2) * size, (c + c2) * k * size, written)
    # A second product, with the coupling: in half precision with its two parts.
    depth = k + c * (2 if size == 2 else 1) * has("feedback")
    written = c * size * (1 + has("residual") + has("below") + has("accumulate"))
    return _Matrices(m, c, depth, gradient + c * size * has("feedback"), depth * c * size, written)


def _product(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Work:
    of = _matrices(kernel, shape, dtype.itemsize)
    taps = 9 if kernel.endswith("3x3") else 1
    size, threads, m = dtype.itemsize, 32 * config.warps, shape["m"]
    if over_rows(kernel):
        tile_rows, tile_columns, step = config.block_n, config.block_k, config.block_m
    else:
        tile_rows, tile_columns, step = config.block_m, config.block_n, config.block_k
    down, across = math.ceil(of.rows / tile_rows), math.ceil(of.columns / tile_columns)
    tiles, steps = down * across, math.ceil(of.depth / step)
    area = tile_rows * tile_columns
    one_step = math.ceil((tile_rows * (1 + bool(shape.get("pending_grad"))) + tile_columns) * step * size)
    if over_rows(kernel):
        tiles *= taps
        splits = max(1, min(steps, 2 * device.sms // tiles))
        programs, steps = tiles * splits, math.ceil(steps / splits)
        memory = m * of.row_bytes + 2 * 4.0 * programs * area  # partial products: written, read
    else:
        programs, steps = tiles, steps * taps
        # Programs that share rows run together: their operands are read once if L2 holds them.
        filters = taps * of.other_bytes
        together = min(down, math.ceil(device.sms / across)) * tile_rows * (of.row_bytes + of.columns * size)
        passes = 1 if together + filters <= device.l2_bytes else across
        memory = m * (of.row_bytes * passes + of.result_bytes) + filters
    precision = "half" if size == 2 else precision_of(shape)
    flops = 2.0 * programs * steps * area * step
    groups = _warp_grid(tile_rows, config.warps, device.arch)
    feed = programs * steps * step * size * (tile_rows * groups[1] + tile_columns * groups[0])
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
        registers=_registers(
            kernel, precision, (tile_rows + tile_columns) * step / threads, area / threads, device.arch
        ),
        shared_bytes=max(config.stages * one_step, area * size),
    )


def _registers(kernel: str, units: str, operands: float, sums: float, arch: int) -> int:
    """Of a thread with so many elements of operands and sums, as compiled: addresses take much where there are no descriptors,
    tiles of operands more than their bytes, and what sums over rows keeps sums apart."""
    if units == "ieee":
        return math.ceil(60 + sums * (3 if over_rows(kernel) else 1) + 4 * operands)
    base, of_operands = (92, 1.5) if arch < 90 else (60 if over_rows(kernel) else 40, 0.75)
    kept = 2 if over_rows(kernel) else 1
    if units != "half":  # two bytes more an element; and its parts
        of_operands *= 2 if units == "tf32" else 4
        kept += units == "tf32x3"
    return math.ceil(base + sums * kept + of_operands * operands)


def _stream(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, config: Config, device: Device) -> Work:
    m, c = shape["m"], shape["c"]
    reads, writes = _STREAMS[kernel]
    reads += bool(shape.get("residual"))
    writes += bool(shape.get("activation"))
    mask_bytes = m * c / 8 * bool(shape.get("mask"))  # read or written
    area = config.block_m * config.block_n
    down, across = math.ceil(m / config.block_m), math.ceil(c / config.block_n)
    programs, steps = down * across, 1
    memory = m * c * dtype.itemsize * (reads + writes) + mask_bytes
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
    compute = fullest * (
        max(todo.flops / device.rate(dtype, precision_of(shape)), feed) + todo.vector_flops / device.float_rate
    )
    compute += waves * LATENCY_S / resident
    return Prediction(max(memory, l2, compute), memory, l2, compute, resident)


def ranked(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, device: Device) -> list[Config]:
    """The candidates that fit, the fastest by the model first; those within about 2 % keep the order of ``candidates``."""
    tried = candidates(kernel, dtype, device.arch, bool(shape.get("feedback")), precision_of(shape))
    timed = [(predict(kernel, shape, dtype, c, device).seconds, c) for c in tried]
    fitting = [(round(math.log(seconds) / 0.02), config) for seconds, config in timed if math.isfinite(seconds)]
    return [config for _, config in sorted(fitting, key=lambda pair: pair[0])]
