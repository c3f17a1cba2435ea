"""Types of command-line arguments, for ``resnet-fused`` and the scripts under ``benchmarks/``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def one_of(kind: str, choices: Sequence[str]) -> Callable[[str], str]:
    """One of ``choices``; the error suggests the nearest."""

    def check(value: str) -> str:
        if value in choices:
            return value
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(choices)}"
        raise argparse.ArgumentTypeError(f"unknown {kind} {value!r}, {hint}")

    return check


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {value!r}")
    return int(value)


def image_size(value: str) -> int:
    size = positive(value)
    if size < 32:
        raise argparse.ArgumentTypeError(f"a ResNet halves its input five times: at least 32, got {size}")
    return size


def device_name(value: str) -> str:
    try:
        device = torch.device(value)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use device {value!r}: {str(error).splitlines()[0]}") from None
    return str(device)
