"""Labelled pictures for training: a folder of classes, Fashion-MNIST's IDX files, CIFAR-10's binary files.

Every random draw is a function of (seed, epoch, index of the picture), and the order of the pictures one of (seed, epoch): a
run that goes on in the middle of an epoch, with any number of loader processes, sees what it would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fashion_mnist
import numpy
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from resnet_fused import images
from resnet_fused.console import UsageError

Key = tuple[int, int]  # the epoch and the index of a picture: what samplers give to datasets
Labelled = tuple[Tensor, int]  # uint8 [C, H, W]
Batches = Iterator[tuple[Tensor, Tensor]]
Floats = tuple[float, ...]  # one a channel
Augment = Callable[[Tensor, numpy.random.Generator], Tensor]

SMALL = 64  # up to this extent pictures are "small": a stem that halves twice would leave too little of them
PADDING = 4  # around small pictures, before a crop of their own size
RECORD = (3, 32, 32)  # one of CIFAR-10's, behind its label
CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels in 0 … 1


def draws(seed: int, *key: int) -> numpy.random.Generator:
    """The random numbers that belong to a key, for instance (epoch, index)."""
    return numpy.random.default_rng((seed, *key))


def _apart(worker: int) -> None:
    """Ctrl-C and torchrun send their signals to whole groups: a loader's process is in its own, the last step needs it."""
    os.setsid()


class Pictures(Dataset[Labelled]):
    """Pictures that ``read`` gives by their index, with their labels; ``augment`` (None: nothing) changes each by its draws."""

    def __init__(self, read: Callable[[int], Tensor], labels: list[int], augment: Augment | None, seed: int) -> None:
        self.read, self.labels, self.augment, self.seed = read, labels, augment, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Labelled:
        epoch, index = key
        image = self.read(index)
        if self.augment is not None:
            image = self.augment(image, draws(self.seed, epoch, index))
        return image, self.labels[index]


@dataclass
class Data:
    """A training and a test part, and what a network must know of them; pictures are ``uint8 [channels, size, size]``."""

    train: Pictures
    test: Pictures
    classes: int
    size: int
    mean: Floats
    deviation: Floats

    def batches(self, pictures: Pictures, keys: Iterator[list[Key]], workers: int, device: torch.device) -> Batches:
        """Normalised pictures ``float32 [N, channels, size, size]``, channels_last, and ``int64 [N]``, on the device."""
        shape = (1, len(self.mean), 1, 1)
        mean, deviation = (255 * torch.tensor(x, device=device).view(shape) for x in (self.mean, self.deviation))
        cuda = device.type == "cuda"
        for x, y in DataLoader(
            pictures, batch_sampler=keys, num_workers=workers, pin_memory=cuda, worker_init_fn=_apart
        ):
            x = x.to(device, non_blocking=True).to(memory_format=torch.channels_last)
            yield (x - mean) / deviation, y.to(device, non_blocking=True)


def _resized(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """A box of a ``uint8 [C, H, W]`` picture at size×size: bilinear, antialiased."""
    box = image[None, :, top : top + height, left : left + width]
    return F.interpolate(box, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def _mirrored(image: Tensor, draw: numpy.random.Generator) -> Tensor:
    return image.flip(-1) if draw.random() < 0.5 else image


def padded_crop(image: Tensor, draw: numpy.random.Generator) -> Tensor:
    """A crop of the picture's own size out of the picture with a black border, mirrored half of the time."""
    height, width = image.shape[-2:]
    top, left = draw.integers(0, 2 * PADDING + 1, 2)
    padded = F.pad(image, (PADDING,) * 4)
    return _mirrored(padded[:, top : top + height, left : left + width], draw)


def random_resized_crop(image: Tensor, draw: numpy.random.Generator, size: int) -> Tensor:
    """torchvision's RandomResizedCrop and flip: 8 … 100 % of the area, sides 3:4 … 4:3, at size×size."""
    height, width = image.shape[-2:]
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1.0)
        ratio = numpy.exp(draw.uniform(numpy.log(3 / 4), numpy.log(4 / 3)))
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            top, left = int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1))
            return _mirrored(_resized(image, top, left, h, w, size), draw)
    return _mirrored(central_crop(image, size, 1.0), draw)


def central_crop(image: Tensor, size: int, share: float = 224 / 256) -> Tensor:
    """The central square, its side this share of the shorter one, at size×size: torchvision's evaluation preset."""
    height, width = image.shape[-2:]
    side = max(1, round(min(height, width) * share))
    return _resized(image, (height - side) // 2, (width - side) // 2, side, side, size)


def _in_memory(parts: list[tuple[Tensor, Tensor]], seed: int, classes: int, mean: Floats, deviation: Floats) -> Data:
    for _, labels in parts:
        if not len(labels) or labels.max() >= classes:
            raise ValueError(f"expected labels below {classes}, got {labels.tolist()[:10]} …")
    train, test = (
        Pictures(pictures.__getitem__, labels.tolist(), augment, seed)
        for (pictures, labels), augment in zip(parts, (padded_crop, None), strict=True)
    )
    return Data(train, test, classes, parts[0][0].shape[-1], mean, deviation)


def _cifar10(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    records = []
    for path in (folder / name for name in names):
        data = numpy.fromfile(path, numpy.uint8)
        length = 1 + int(numpy.prod(RECORD))
        if not len(data) or len(data) % length:
            raise ValueError(f"{path}: expected records of {length} bytes, got {len(data)} bytes")
        records.append(torch.from_numpy(data).view(-1, length))
    joined = torch.cat(records)
    return joined[:, 1:].reshape(-1, *RECORD), joined[:, 0].long()


def _paths(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    """The pictures below ``folder``/CLASS and their labels, in an order that no file system changes."""
    strange = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if strange:
        raise UsageError(f"--data: {folder} has the class {strange[0]!r}, which the training part lacks")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in images.SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UsageError(f"--data: no pictures ({', '.join(images.SUFFIXES)}) in {folder}/CLASS")
    return paths, labels


def _decoded(paths: list[Path], size: int | None, index: int) -> Tensor:
    image = images.decode(paths[index])
    return image if size is None else central_crop(image, size)


def _folder(folder: Path, size: int, seed: int) -> Data:
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    paths, labels = _paths(folder / "train", classes)
    train = Pictures(partial(_decoded, paths, None), labels, partial(random_resized_crop, size=size), seed)
    paths, labels = _paths(folder / "val", classes)
    test = Pictures(partial(_decoded, paths, size), labels, None, seed)
    return Data(train, test, len(classes), size, images.MEAN, images.STD)


def load(folder: Path | None, size: int | None, seed: int) -> Data:
    """The data in a folder, by what lies there.

    Args:
        folder: with ``train/CLASS`` and ``val/CLASS``; or CIFAR-10's binary files (``data_batch_1.bin`` …); or Fashion-MNIST's
            four files, which None looks for where the system's package puts them.
        size: of pictures out of class folders, 224 by default; the others have their own.
        seed: of the random crops and mirror images.
    Raises:
        UsageError: nothing of the kind is there, a file is damaged, or a size is given that is not asked for.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--data: no such folder: {folder}")
    if folder is not None and (folder / "train").is_dir() and (folder / "val").is_dir():
        return _folder(folder, size or 224, seed)
    if size is not None:
        raise UsageError("--size: is for pictures in train/CLASS and val/CLASS, these have their own size")
    try:
        if folder is not None and (folder / "test_batch.bin").is_file():
            parts = [
                _cifar10(folder, [f"data_batch_{i}.bin" for i in range(1, 6)]),
                _cifar10(folder, ["test_batch.bin"]),
            ]
            return _in_memory(parts, seed, 10, CIFAR_MEAN, CIFAR_DEVIATION)
        parts = [(part.images, part.labels) for part in fashion_mnist.load(folder)]
        return _in_memory(parts, seed, len(fashion_mnist.CLASSES), (fashion_mnist.MEAN,), (fashion_mnist.DEVIATION,))
    except (OSError, ValueError) as error:
        raise UsageError(f"--data: {error}") from None


def training_batches(
    count: int, batch: int, start: int, stop: int, *, seed: int, epoch: int, rank: int = 0, ranks: int = 1
) -> Iterator[list[Key]]:
    """This rank's batches ``start`` … ``stop`` of an epoch, all full: behind the last of ``count`` pictures the first follow.

    All ranks' batches of one number are neighbours in the epoch's order, and so are batches that are accumulated: how many
    pictures make a step decides which they are, not how they are divided.
    """
    order = draws(seed, epoch).permutation(count)
    for number in range(start, stop):
        first = (number * ranks + rank) * batch
        yield [(epoch, int(order[i % count])) for i in range(first, first + batch)]


def test_batches(count: int, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Key]]:
    """This rank's share of the test pictures, in batches of at most ``batch``: of all ranks' each picture is in one."""
    mine = range(rank, count, ranks)
    for first in range(0, len(mine), batch):
        yield [(0, index) for index in mine[first : first + batch]]
