"""What this device reaches at most: a copy in memory, and matrix products by PyTorch.

GB/s of the copy count what is read and what is written. The roofline beside is that of the cost model
(``resnet_fused/backends/triton/devices.py``), as for all other rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_time import Clock, peak, roofline_share

from resnet_fused import info, networks
from resnet_fused.arguments import Parser, device_name, positive
from resnet_fused.console import print_table, require_rich
from resnet_fused.result_file import append_csv, check_results_file, key_of, measured

DTYPES = ("bf16", "fp16")
SHOWN = ("op", "shape", "dtype", "p50_ms", "gb_per_s", "tflop_per_s", "fraction_of_roofline")


def contests(mib: int, size: int, device: torch.device) -> list[tuple[str, str, str, int, int, Callable[[], Any]]]:
    """Op, shape, dtype, bytes moved, flop, and the call."""
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: list[tuple[str, str, str, int, int, Callable[[], Any]]] = [
        ("copy", f"{mib} MiB", "uint8", 2 * source.numel(), 0, lambda: target.copy_(source))
    ]
    for name in DTYPES:
        # Random numbers: zeros need less power, and a GPU then runs faster than it ever will on data.
        a, b = torch.randn(2, size, size, device=device).to(networks.DTYPES[name])
        moved = 3 * a.numel() * a.element_size()
        found.append(("matmul", f"{size}x{size}x{size}", name, moved, 2 * size**3, lambda a=a, b=b: a @ b))
    return found


def run(options: argparse.Namespace) -> int:
    check_results_file(options.results_file)
    device, name = torch.device(options.device), info.device_name(options.device)
    clock, provenance = Clock(device), info.provenance()
    done = measured(options.results_file, name) if options.resume else set()
    table = []
    for op, shape, dtype, moved, flops, call in contests(options.mib, options.size, device):
        row: dict[str, Any] = {"op": op, "mode": "", "shape": shape, "dtype": dtype}
        if key_of(row) in done:
            continue
        sample = clock.prepare(call, lambda: None, graph=False)
        samples = torch.tensor([sample() for _ in range(options.repeats)], dtype=torch.float64)
        seconds = float(samples.median()) * 1e-3
        bound = peak(device, networks.DTYPES.get(dtype, torch.bfloat16))
        share = roofline_share(moved, flops, seconds, bound)
        row |= {f"p{round(100 * q)}_ms": f"{float(samples.quantile(q)):.5f}" for q in (0.5, 0.2, 0.8)} | {
            "provider": "pytorch",
            "gb_per_s": f"{moved / seconds / 1e9:.4g}" if not flops else "",
            "tflop_per_s": f"{flops / seconds / 1e12:.4g}" if flops else "",
            "fraction_of_roofline": "" if share is None else f"{share:.3g}",
            "device": name,
            **provenance,
        }
        table.append([row[column] for column in SHOWN])
        if options.results_file:
            append_csv(options.results_file, [row])
    print_table(f"ceilings of {name}", SHOWN, table, right=range(3, 7))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=positive, default=1024, help="of the copied memory")
    parser.add_argument("--size", type=positive, default=8192, help="of the square matrices")
    parser.add_argument("--device", type=device_name, default="cuda")
    parser.add_argument("--repeats", type=positive, default=21)
    parser.add_argument("--results-file", metavar="CSV", help="rows are appended")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has of this device")
    options = parser.parse_args(argv)
    require_rich()
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
