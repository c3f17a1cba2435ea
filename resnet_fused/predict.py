"""``resnet-fused predict``: classify pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import images, models
from .console import UsageError, print_table, warn
from .inference import optimize_for_inference
from .testing import import_torchvision


def _labels(path: str | None, model: str, count: int) -> list[str]:
    """One label per class: from a file with one per line, else torchvision's for ImageNet, else the numbers."""
    if path is not None:
        if not Path(path).is_file():
            raise UsageError(f"--labels: no such file: {path}")
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(found) != count:
            raise UsageError(f"--labels: the network has {count} classes, {path} has {len(found)} lines")
        return found
    if count == 1000:
        try:
            torchvision = import_torchvision()
        except ImportError:
            pass
        else:
            return list(torchvision.models.get_model_weights(model).DEFAULT.meta["categories"])
    return [f"class {i}" for i in range(count)]


def _network(name: str, weights: str | None) -> models.ResNet:
    try:
        return models.BUILDERS[name](weights=weights)
    except FileNotFoundError:
        raise UsageError(f"--weights: no such file: {weights}") from None
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--weights: {error}") from None


def run(
    paths: Sequence[str],
    *,
    model: str = "resnet50",
    weights: str | None = None,
    random: bool = False,
    top_k: int = 5,
    labels: str | None = None,
    device: str = "cpu",
) -> int:
    """Classify, print a table; 0 when every picture could be read, else 1."""
    if weights is None and not random:
        raise UsageError("--weights is required: an untrained network knows nothing (--random runs one all the same)")
    if weights is None:
        torch.manual_seed(0)
        warn(f"{model} has RANDOM weights: it is untrained and its answers mean nothing")
    network = _network(model, weights).to(device)
    names = _labels(labels, model, network.fc.out_features)
    fast = optimize_for_inference(network.eval())
    rows: list[list[str]] = []
    failed = 0
    with torch.inference_mode():
        for path in paths:
            try:
                x = images.preprocess(images.decode(path)).to(device)
            except images.UnreadableImage as error:
                warn(str(error))
                failed += 1
                continue
            best = fast(x[None])[0].float().softmax(0).topk(min(top_k, len(names)))
            for rank, (probability, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                rows.append([path if rank == 0 else "", str(rank + 1), f"{100 * probability:.2f} %", names[index]])
    if rows:
        origin = "RANDOM weights: untrained" if weights is None else f"weights {weights}"
        print_table(f"{model}, {origin}", ["image", "", "probability", "label"], rows, right=(1, 2))
    return 1 if failed else 0
