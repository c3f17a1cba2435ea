"""How long calls take on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

_WARM_UP = 2


class Clock:
    """Microseconds of calls on a GPU. A call is a CUDA graph, so that the host's time does not count, and finds L2 flushed."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
        self._flushed = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        """A function that runs ``call`` once and returns its time in microseconds."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles or loads may not be captured
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            self._flushed.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3

        return sample


def medians(samplers: Mapping[str, Callable[[], float]], samples: int) -> dict[str, float]:
    """The median of each sampler, the samplers in turns."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(samples):
        for name, sample in samplers.items():
            times[name].append(sample())
    return {name: statistics.median(found) for name, found in times.items()}
