"""Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, 28×28, ten classes.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
The four files are read as their authors publish them (the IDX format of MNIST, compressed by gzip or not).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's and Ubuntu's package puts it
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels in 0 … 1
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

_HOW = (
    "apt install dataset-fashion-mnist, or put the four .gz files of github.com/zalandoresearch/fashion-mnist (data/fashion) "
    "into a folder and name it"
)


class Split(NamedTuple):
    """Pictures ``uint8 [N, 1, 28, 28]`` and labels ``int64 [N]``."""

    images: Tensor
    labels: Tensor


def _idx(path: Path) -> Tensor:
    """The array in an IDX file: two zero bytes, a type (8: uint8), the number of dimensions, sizes as big-endian int32.

    Raises:
        ValueError: it is no such file, or it ends early.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    dimensions = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if not dimensions or len(data) - start != numpy.prod(shape):
        raise ValueError(f"{path}: expected an IDX file of bytes, got {len(data)} bytes that are none")
    return torch.from_numpy(numpy.frombuffer(data, numpy.uint8, offset=start).reshape(shape).copy())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: has no {name}[.gz]; {_HOW}")


def load(folder: Path | None = None) -> tuple[Split, Split]:
    """The training and the test part.

    Args:
        folder: with the four files; None: where the system's package put them.
    Raises:
        FileNotFoundError: says how to get them. ValueError: a file is damaged.
    """
    folder = folder or DEBIAN
    parts = []
    for prefix in ("train", "t10k"):
        images = _idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
        labels = _idx(_find(folder, f"{prefix}-labels-idx1-ubyte"))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(f"{folder}: {prefix} has pictures {list(images.shape)} and labels {list(labels.shape)}")
        parts.append(Split(images[:, None], labels.long()))
    return parts[0], parts[1]
