"""How long calls of the CUDA extension take, how many launches they make, and what the device allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resnet_fused import bench

WARM_UP = 3


class Clock:
    """Milliseconds of calls: on a GPU by events, L2 being flushed before. On a processor, where kernels are emulated, by the
    wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._flushed = device, torch.empty(0, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
            self._flushed = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], Any], restore: Callable[[], None], graph: bool) -> Callable[[], float]:
        """A function that restores the inputs, runs ``call`` once and returns the time of the call in milliseconds.

        ``graph``: a call is the replay of a CUDA graph, so that only the GPU's time counts; else the host's launches count
        where the GPU waits for them.
        """
        restore()
        for _ in range(WARM_UP if self.device.type == "cuda" else 0):
            call()
        repeated = self._captured(call) if graph and self.device.type == "cuda" else call

        def sample() -> float:
            restore()
            self._flushed.zero_()
            return bench.timed_ms(lambda _: repeated(), self._flushed, 1)

        return sample

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def launches(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a call starts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


Bound = tuple[float, float] | None


def peak(device: torch.device, dtype: torch.dtype) -> Bound:
    """Bytes/s of memory and flop/s of products that the GPU reaches, as the cost model has them; None for a processor."""
    if device.type != "cuda":
        return None
    from resnet_fused.backends.triton import devices

    gpu = devices.describe(device)
    return gpu.bandwidth, gpu.rate(dtype)


def roofline_share(moved: int, flops: int, seconds: float, bound: Bound) -> float | None:
    """``max(moved / bandwidth, flops / rate) / seconds``; None where there is nothing to tell."""
    if bound is None or not moved:
        return None
    return max(moved / bound[0], flops / bound[1]) / seconds
