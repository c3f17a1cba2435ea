"""Labelled pictures to train on: Fashion-MNIST, another data set in its files' format, or scikit-learn's digits."""

from __future__ import annotations

import functools
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.console import UsageError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = 0x242BC73F  # crc32 of its test labels: a folder's name proves nothing
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class LabelledImages:
    """Labelled pictures: images ``uint8 [N, H, W]``, labels ``int64 [N]``."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @functools.cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training images; ten thousand tell them."""
        some = self.train_x[:10_000].float()
        return some.mean(), some.std()

    def batch(self, images: Tensor, size: int, layout: torch.memory_format) -> Tensor:
        """``float32 [n, 3, size, size]``, normalised by the training images, three equal channels."""
        mean, std = self.normalisation
        x = (images[:, None].float() - mean) / std
        if size != x.shape[-1]:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=layout)


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor of an idx file, gzipped or not.

    Raises:
        UsageError: it is none.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        shape = numpy.frombuffer(raw, ">i4", raw[3], offset=4).tolist()
        return torch.from_numpy(numpy.frombuffer(raw, "u1", offset=4 + 4 * raw[3]).reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UsageError(f"--data: cannot read {path}: {error}") from None


def find_idx(folder: Path) -> list[Path] | None:
    """The four files in a folder, or in the ``raw`` folder that torchvision's datasets make below it."""
    for place in (folder, *(folder / below for below in ("raw", "FashionMNIST/raw", "MNIST/raw"))):
        found = [next((p for p in (place / name, place / f"{name}.gz") if p.is_file()), None) for name in FILES]
        if all(found):
            return [path for path in found if path is not None]
    return None


def digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8×8, a quarter of them for the test."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UsageError("digits need 'scikit-learn'; --data names a folder with idx files instead") from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("u1")
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return LabelledImages("digits", train_x, train_y.long(), test_x, test_y.long())


def load(where: str | None) -> LabelledImages:
    """The data set: ``where`` is a folder, "digits", or None for what is there."""
    if where == "digits":
        return digits()
    paths = find_idx(DEBIAN if where is None else Path(where))
    if paths is None:
        if where is not None:
            raise UsageError(f"--data: no {FILES[0]}[.gz] and the three files beside it in {where}")
        print("no Fashion-MNIST here (apt-get install dataset-fashion-mnist): scikit-learn's digits instead")
        return digits()
    train_x, train_y, test_x, test_y = map(read_idx, paths)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.dim() != 3 or y.shape != x.shape[:1]:
            raise UsageError(f"--data: images {tuple(x.shape)} do not fit labels {tuple(y.shape)}")
    known = zlib.crc32(test_y.numpy().tobytes()) == FASHION_MNIST
    return LabelledImages("fashion-mnist" if known else "idx files", train_x, train_y.long(), test_x, test_y.long())
