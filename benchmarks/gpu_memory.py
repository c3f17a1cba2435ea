"""Memory of whole networks on a GPU: its peak for each provider, and what a training step keeps for its backward.

A peak is measured in a process of its own (``resnet_fused.peak_memory``). What stock and fused keep is counted as
``bench_memory.py`` counts it, in rows whose op says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from bench_memory import kept_for_backward

from resnet_fused import info, networks, peak_memory, providers
from resnet_fused.arguments import Parser, device_name, image_size, one_of, positive
from resnet_fused.console import print_table, require_rich, warn
from resnet_fused.result_file import append_csv, check_results_file

KEPT = ", kept for backward"  # behind the network's name, as op


def kept_mib(name: str, setting: providers.Setting) -> float:
    network = networks.stock_model(setting.model)
    if name == "fused":
        network = networks.copy_of(setting.model, network.state_dict(), 1000, fused=True)
    network = networks.in_layout(network.to(setting.device), torch.channels_last).train()
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, device=setting.device)
    x, target = providers.batch_for(setting, images), setting.target(setting.batch)
    kept = kept_for_backward(network, x, target, setting.torch_dtype)
    return sum(count * key[0] for key, count in kept.items()) / 2**20


def run(options: argparse.Namespace) -> int:
    """Rows are appended as they come; 1 when a process did not come back."""
    check_results_file(options.results_file)
    setting = providers.Setting(
        options.model, options.mode, options.dtype, options.device, options.batch, options.image_size
    )
    fixed = {
        "mode": options.mode,
        "shape": f"{options.batch}x3x{options.image_size}x{options.image_size}",
        "dtype": options.dtype,
        "layout": "channels_last",
        "device": info.device_name(options.device),
        **info.provenance(),
    }
    table: list[list[str]] = []
    failed = 0

    def add(op: str, name: str, mib: float) -> None:
        row: dict[str, Any] = fixed | {"op": op, "provider": name, "peak_mib": f"{mib:.1f}"}
        table.append([op, name, f"{mib:,.1f}"])
        if options.results_file:
            append_csv(options.results_file, [row])

    for name in options.providers:
        reason = providers.missing(name, setting)
        if reason:
            warn(f"{name} is left out: {reason}")
            continue
        mib = peak_memory.measure(name, setting)
        if mib is None:
            failed += 1
            warn(f"{options.model}, {options.mode}, {options.dtype}: the process that weighs {name} did not come back")
        else:
            add(options.model, name, mib)
    for name in ("stock", "fused") if options.mode == "train" else ():
        add(options.model + KEPT, name, kept_mib(name, setting))
    print_table(
        f"memory, {options.mode}, {options.dtype}, {fixed['shape']}, on {fixed['device']}", ["", "", "MiB"], table
    )
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=one_of("model", networks.BUILDERS), default="resnet50", metavar="NAME")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--image-size", type=image_size, default=224)
    parser.add_argument("--device", type=device_name, default="cuda")
    parser.add_argument(
        "--providers", type=one_of("provider", providers.NAMES), nargs="+", default=["stock", "fused"], metavar="NAME"
    )
    parser.add_argument("--results-file", metavar="CSV", help="rows are appended")
    options = parser.parse_args(argv)
    require_rich()
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
