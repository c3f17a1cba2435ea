"""Runs of ``examples/train.py``, and what they leave: shared by its tests."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN = ("train", "train_options", "image_data", "run_folder", "fashion_mnist")
PICTURES, TEST_PICTURES = 28, 13
RUN = ("--batch", "8", "--epochs", "2", "--lr", "0.02", "--log-every", "1", "--workers", "0", "--deterministic")
STEPS = 4  # of an epoch: the last batch is filled with pictures from the start of the order


def write_idx(path: Path, values: Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes())


def idx_files(folder: Path) -> Path:
    """Fashion-MNIST's four files with a few pictures of 8×8 that are brighter the higher their class."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", PICTURES), ("t10k", TEST_PICTURES)):
        labels = torch.arange(count) % 10
        noise = torch.randint(60, (count, 8, 8), generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte", (noise + 20 * labels[:, None, None]).byte())
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.byte())
    return folder


def tiny(options: Any, data: Any, device: torch.device) -> nn.Module:
    """In place of ``train.network``, where the kind does not matter: it trains in a moment."""
    torch.manual_seed(options.seed)
    inputs = len(data.mean) * data.size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Linear(8, data.classes))


def rows(path: Path, but: str) -> list[dict[str, str]]:
    """The rows of a table without a column of times."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != but} for row in csv.DictReader(file)]


def losses(output: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(output / "losses.csv", "images_per_s")]


def checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same_run(output: Path, whole: Path) -> None:
    """Tables, network, EMA and momenta agree to the bit."""
    assert rows(output / "losses.csv", "images_per_s") == rows(whole / "losses.csv", "images_per_s")
    assert rows(output / "evaluation.csv", "trained_s") == rows(whole / "evaluation.csv", "trained_s")
    one, other = checkpoint(output), checkpoint(whole)
    assert one.pop("settings") == other.pop("settings")
    assert one.pop("trained_s") > 0 and other.pop("trained_s") > 0
    assert one.pop("schedule") == other.pop("schedule")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def start(*command: str | Path) -> subprocess.Popen[str]:
    """A script and its arguments in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{EXAMPLES.parent}{os.pathsep}{EXAMPLES}"}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_rows(process: subprocess.Popen[str], output: Path, count: int) -> None:
    path = output / "losses.csv"
    begin = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begin < 120, f"no {count} rows in two minutes"
        time.sleep(0.01)
