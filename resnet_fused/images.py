"""Pictures as input: decoding, torchvision's evaluation preprocessing, and the photographs that benchmarks run on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .console import UsageError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Photographs that lie inside scikit-image's wheels; its other pictures would be downloaded.
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


class UnreadableImage(Exception):
    """A picture that cannot be decoded, with the reason in one line."""


def decode(path: str | Path) -> Tensor:
    """The picture as ``uint8 [3, H, W]``, turned upright as its EXIF data say.

    Raises:
        UnreadableImage: no such file, or not a picture.
        UsageError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError("reading pictures needs 'pillow': pip install resnet_fused[cli]") from error
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            data = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
            return data.view(upright.height, upright.width, 3).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise UnreadableImage(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UnreadableImage(f"{path}: is a directory") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage(f"{path}: not a picture that pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: damaged or unreadable: {error}") from None


def _resized(image: Tensor, short_side: int) -> Tensor:
    """``uint8 [3, H, W]`` with its shorter side resized: bilinear, antialiased, rounded to whole steps as there."""
    height, width = image.shape[-2:]
    if height <= width:
        size = (short_side, int(short_side * width / height))
    else:
        size = (int(short_side * height / width), short_side)
    scaled = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].round_().clamp_(0, 255)


def preprocess(image: Tensor, size: int = 224, position: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """torchvision's evaluation preset: shorter side to ``size·256/224``, crop of ``size``, ImageNet's normalisation.

    Args:
        image (uint8 Tensor[3, H, W]).
        position: where the crop lies, (0, 0) top left, (0.5, 0.5) centre, (1, 1) bottom right.
    Returns:
        float32 Tensor[3, size, size].
    """
    scaled = _resized(image, max(size, round(size * 256 / 224)))
    top = round((scaled.shape[1] - size) * position[0])
    left = round((scaled.shape[2] - size) * position[1])
    crop = scaled[:, top : top + size, left : left + size] / 255
    return (crop - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _from_scikit_image() -> list[Path]:
    try:
        import skimage
    except ImportError:
        return []
    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]


def batch(count: int, size: int, folder: str | None = None) -> tuple[Tensor, str]:
    """``float32 [count, 3, size, size]`` and what it is: photographs where there are some, else noise.

    More images than photographs are made of other crops and of mirror images.

    Raises:
        UsageError: ``folder`` does not exist or holds no picture that can be read.
    """
    if folder is None:
        paths = _from_scikit_image()
    elif not Path(folder).is_dir():
        raise UsageError(f"--images: no such folder: {folder}")
    else:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
    photographs = []
    try:
        for path in paths:
            photographs.append(decode(path))
    except UnreadableImage as error:
        raise UsageError(str(error)) from None
    if not photographs:
        if folder is not None:
            raise UsageError(f"--images: no pictures ({', '.join(SUFFIXES)}) in {folder}")
        noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise, "synthetic images (normal noise: neither --images nor scikit-image)"
    positions = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    made = []
    for i in range(count):
        turn = i // len(photographs)
        picture = preprocess(photographs[i % len(photographs)], size, positions[turn // 2 % len(positions)])
        made.append(picture.flip(-1) if turn % 2 else picture)
    origin = "scikit-image" if folder is None else folder
    return torch.stack(made), f"{min(count, len(photographs))} real photographs from {origin}"
