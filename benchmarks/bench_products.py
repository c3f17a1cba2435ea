"""Products for 1x1 convolutions, with their fusions, beside the bare convolutions of PyTorch (oneDNN).

    python benchmarks/bench_products.py [--batch 16] [--dtype float32 bfloat16] [--threads 2] [--rounds 9]

One line per shape, dtype and operation: medians in milliseconds, their ratio, and our rate. The two are timed in turn,
so that whatever else runs on the machine slows both. Ours: forward with scale, shift, ReLU and mask; input gradient of
a masked gradient; weight gradient of a masked gradient with centred inputs and the sums of the gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import resnet_fused  # noqa: F401  (loads the operators)

# ResNet-50: pixels at batch 1, channels in, channels out.
SHAPES = [
    (56, 64, 256),
    (56, 256, 64),
    (28, 128, 512),
    (28, 512, 128),
    (14, 256, 1024),
    (14, 1024, 256),
    (7, 512, 2048),
    (7, 2048, 512),
]
ops = torch.ops.resnet_fused


def calls(batch: int, side: int, n_in: int, n_out: int, dtype: torch.dtype):
    def activation(c: int) -> Tensor:
        return torch.randn(batch, c, side, side).to(dtype).contiguous(memory_format=torch.channels_last)

    x, dy = activation(n_in), activation(n_out)
    weight = torch.randn(n_out, n_in).to(dtype)
    filters = weight.view(n_out, n_in, 1, 1).contiguous(memory_format=torch.channels_last)
    scale, shift, centre = torch.rand(n_out), torch.randn(n_out), torch.randn(n_in)
    mask = torch.randint(0, 256, ((dy.numel() + 7) // 8,), dtype=torch.uint8)
    one = (1, 1)

    def backward(wanted):
        return torch.ops.aten.convolution_backward(dy, x, filters, None, one, (0, 0), one, False, (0, 0), 1, wanted)

    yield (
        "forward",
        lambda: ops.pointwise(x, None, weight, one, scale, None, None, one, None, shift, None, None, True, True),
        lambda: torch.nn.functional.conv2d(x, filters),
    )
    yield (
        "dgrad",
        lambda: ops.pointwise(dy, mask, weight.T, one, None, None, None, one, None, None, None, None, False, False),
        lambda: backward((True, False, False)),
    )
    yield (
        "wgrad",
        lambda: ops.pointwise_wgrad(dy, mask, x, centre, one),
        lambda: backward((False, True, False)),
    )


def milliseconds(functions, rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, series in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            series.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(series) for series in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operation", nargs="+", default=["forward", "dgrad", "wgrad"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'shape':>22} {'dtype':>9} {'operation':>9} {'ours ms':>8} {'oneDNN':>8} {'speedup':>7} {'GF/s':>6}")
    for name in options.dtype:
        for side, n_in, n_out in SHAPES:
            pixels = options.batch * side * side
            for operation, ours, theirs in calls(options.batch, side, n_in, n_out, getattr(torch, name)):
                if operation not in options.operation:
                    continue
                mine, other = milliseconds([ours, theirs], options.rounds)
                rate = 2e-6 * pixels * n_in * n_out / mine
                shape = f"{pixels}x{n_in}->{n_out}"
                print(f"{shape:>22} {name:>9} {operation:>9} {mine:8.2f} {other:8.2f} {other / mine:7.2f} {rate:6.0f}")


if __name__ == "__main__":
    main()
