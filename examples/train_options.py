"""The options of ``train.py``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_fused import networks
from resnet_fused.arguments import Parser, device_name, one_of, positive

# What may differ when a run goes on, because it changes no number. The folder may have moved: its pictures are counted.
FREE = ("data", "output", "resume", "max_steps", "checkpoint_every", "log_every", "workers", "timeout")


def natural(value: str) -> int:
    return 0 if value == "0" else positive(value)


def between(low: float, high: float) -> Callable[[str], float]:
    """A number in low … high."""

    def check(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {value!r}")
        return number

    return check


def parsed(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The options in ``arguments``, None: of the command line."""
    parser = Parser("train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="train/CLASS and val/CLASS, or CIFAR-10's binary files, or Fashion-MNIST's four")
    add("--size", type=positive, help="of pictures out of class folders (224); up to 64 the stem keeps the extent")
    add("--output", type=Path, required=True, help="folder of checkpoint.pt, losses.csv and evaluation.csv")
    add("--resume", choices=("auto", "never"), default="auto", help="never: start anew where there is a checkpoint")
    add("--model", type=one_of("model", networks.BUILDERS), default="resnet18")
    add("--stock", action="store_true", help="the same run with torchvision's network, or without it plain torch.nn's")
    add("--epochs", type=positive, default=1)
    add("--batch", type=positive, default=128, help="pictures that a process takes at once")
    add("--accumulate", type=positive, default=1, help="batches whose gradients make a step")
    add("--lr", type=between(0, math.inf), default=0.1, help="of SGD with Nesterov's momentum, at its highest")
    add("--warmup", type=between(0, 0.99), default=0.05, help="share of all steps with a rising rate")
    add("--momentum", type=between(0, 1), default=0.9)
    add("--weight-decay", type=between(0, math.inf), default=5e-4, help="of filters and matrices, not of vectors")
    add("--label-smoothing", type=between(0, 1), default=0.1)
    add("--ema-decay", type=between(0, 1), default=0.99, help="what a step leaves of the EMA")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of autocast; fp16 has a GradScaler")
    add("--sync-bn", action="store_true", help="batch statistics of all processes together")
    add("--compile", action="store_true", help="torch.compile")
    add("--deterministic", action="store_true", help="the same bits on every run, also of one that was stopped")
    add("--seed", type=natural, default=0)
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=natural, default=4, help="processes that read pictures, for each that trains")
    add("--max-steps", type=positive, default=math.inf, help="write a checkpoint and end at this step of the whole run")
    add("--checkpoint-every", type=positive, default=500, help="steps; there is one at the end of each epoch too")
    add("--log-every", type=positive, default=20, help="steps whose rows are written together")
    add("--timeout", type=positive, default=600, help="seconds that processes wait for one that is gone")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that change numbers: a run goes on with the same ones."""
    return {name: value for name, value in vars(options).items() if name not in FREE}
