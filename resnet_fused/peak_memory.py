"""Peak memory of one provider, in a process of its own: ``python -m resnet_fused.peak_memory SETTING``.

Not a command for people: ``bench`` calls it, because a process never gives back all that an earlier provider touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys

import torch

from . import networks, providers

GRAPH_STEPS = 3  # after which torch.compile's own CUDA graphs are replayed


def _status(key: str) -> float | None:
    """A line of /proc/self/status in MiB; None where there is none (other systems than Linux)."""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))
    except (OSError, StopIteration):
        return None


def _forget_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as control:
            control.write("5")  # resets the peak of the resident set, VmHWM
    except OSError:
        return False
    return True


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_here(name: str, setting: providers.Setting) -> float | None:
    """MiB that the network and one step need at most; None where the system cannot tell.

    On a processor: growth of the resident set from before the network exists to its peak within a second step. On a
    GPU: what PyTorch's allocator holds at most in a later step. That counts the memory of a CUDA graph, which is allocated
    when it is captured, and what is lost between blocks.
    """
    x = torch.zeros(setting.batch, 3, setting.image_size, setting.image_size)
    source = networks.stock_model(setting.model)
    if setting.device != "cpu":
        batch = providers.batch_for(setting, x)
        provider = providers.build(name, source, setting)
        with providers.searched_convolutions():
            for _ in range(GRAPH_STEPS):
                provider.step(batch)
            gc.collect()
            torch.cuda.empty_cache()  # what was needed once: to compile, to search an algorithm
            torch.cuda.reset_peak_memory_stats(setting.device)
            provider.step(batch)
        return torch.cuda.max_memory_reserved(setting.device) / 2**20
    # A small step first: libraries and thread pools are nobody's network.
    torch.nn.functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))
    batch = providers.batch_for(setting, x)
    source_mib = sum(t.numel() * t.element_size() for t in source.state_dict().values()) / 2**20
    _trim()
    before = _status("VmRSS")
    provider = providers.build(name, source, setting)
    del source
    provider.step(batch)
    _trim()
    if before is None or not _forget_peak():
        return None
    provider.step(batch)
    peak = _status("VmHWM")
    # The values came in ``source``, which was counted before and is gone now.
    return None if peak is None else peak - before + source_mib


def measure(name: str, setting: providers.Setting) -> float | None:
    """``measure_here`` in a fresh process; None when that failed."""
    request = json.dumps({"name": name, **dataclasses.asdict(setting)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "resnet_fused.peak_memory", request],
            check=False,
            capture_output=True,
            text=True,
            timeout=900,
        )
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.SubprocessError, OSError, IndexError, json.JSONDecodeError):
        return None


def main() -> int:
    request = json.loads(sys.argv[1])
    print(json.dumps(measure_here(request.pop("name"), providers.Setting(**request))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
