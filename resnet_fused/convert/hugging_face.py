"""Folders of transformers' ``ResNetForImageClassification``: ``save_pretrained(model, folder)``, and which file to read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
_PARTS = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps", "ceil_mode")
_LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Identity)
_TRAINING_ONLY = ("Dropout", "DropPath", "DropBlock2d")  # the latter two are timm's


def hugging_face_key(key: str) -> str:
    """torchvision's name of a tensor in transformers' ``ResNetForImageClassification``."""
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(.+)", key)
    if block:
        stage, index, kind, number, shortcut, rest = block.groups()
        place = "shortcut" if shortcut else f"layer.{int(number) - 1}"
        return f"resnet.encoder.stages.{int(stage) - 1}.layers.{index}.{place}.{_PARTS[shortcut or kind]}.{rest}"
    stem = re.fullmatch(r"(conv|bn)1\.(.+)", key)
    if stem:
        return f"resnet.embedder.embedder.{_PARTS[stem[1]]}.{stem[2]}"
    return re.sub(r"^fc\.", "classifier.1.", key)


def _differences(model: nn.Module, plain: nn.Module) -> list[str]:
    """How ``model`` computes something else than ``plain``, as far as its modules tell."""
    found = []
    pool = getattr(model, "global_pool", None)  # timm's
    ignored = "global_pool." if getattr(pool, "pool_type", None) == "avg" else "no such module"
    for name, module in model.named_modules():
        is_known = type(module) in _LEAVES or type(module).__name__ in _TRAINING_ONLY
        if next(module.children(), None) is None and not is_known and not f"{name}.".startswith(ignored):
            found.append(f"{name} is {type(module).__name__}")
    ours, theirs = model.state_dict(), plain.state_dict()
    found += [f"{key} is of another network" for key in ours.keys() - theirs.keys()]
    found += [f"{key} is missing" for key in theirs.keys() - ours.keys()]
    for key in ours.keys() & theirs.keys():
        if ours[key].shape != theirs[key].shape:
            found.append(f"{key} has shape {tuple(ours[key].shape)}, expected {tuple(theirs[key].shape)}")
    modules = dict(model.named_modules())
    for name, expected in plain.named_modules():
        if isinstance(expected, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)) and name in modules:
            for attribute in _GEOMETRY:
                want = getattr(expected, attribute, None)
                have = getattr(modules[name], attribute, None)
                if have not in (want, (want, want)):
                    found.append(f"{name}.{attribute} is {have}, expected {want}")
    return sorted(found)


def _config(model: nn.Module, labels: Sequence[str] | None) -> dict[str, Any]:
    """transformers' configuration of a model that it can hold.

    Raises:
        ValueError: it cannot; the message lists what is different.
    """
    from ..blocks import BasicBlock, Bottleneck
    from ..models import ResNet

    try:
        stages = [getattr(model, f"layer{i}") for i in range(1, 5)]
        depths = [len(stage) for stage in stages]
        is_bottleneck = hasattr(stages[0][0], "conv3")
        classes, channels = model.fc.out_features, model.conv1.in_channels
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"save_pretrained: model must have a ResNet's conv1, layer1 to layer4 and a Linear fc, "
            f"got {type(model).__name__} ({error})"
        ) from error
    block = Bottleneck if is_bottleneck else BasicBlock
    with torch.device("meta"):
        plain = ResNet(block, depths, num_classes=classes)
        plain.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    differences = _differences(model, plain)
    if differences:
        listing = "\n  ".join(differences)
        raise ValueError(f"save_pretrained: transformers' ResNet cannot hold this model:\n  {listing}")
    if labels is not None and len(labels) != classes:
        raise ValueError(
            f"save_pretrained: labels must name the {classes} classes of the model, got {len(labels)} names"
        )
    names = [f"LABEL_{i}" for i in range(classes)] if labels is None else list(labels)
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": channels,
        "embedding_size": 64,
        "hidden_sizes": [width * block.expansion for width in (64, 128, 256, 512)],
        "depths": depths,
        "layer_type": "bottleneck" if is_bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], labels: Sequence[str] | None = None) -> None:
    """Write a folder that transformers' ``ResNetForImageClassification.from_pretrained`` reads.

    Args:
        model (nn.Module): a ResNet with torchvision's names: this package's, torchvision's or timm's, fused or not, with basic
            or bottleneck blocks of the plain width; any number of input channels and classes.
        folder: made where it is missing. ``model.safetensors`` and ``config.json`` in it are replaced, when both are written.
        labels (sequence of str, optional): names of the classes, in order; by default LABEL_0, …
    Raises:
        ValueError: transformers' ResNet cannot hold the model (groups, other widths, dilation, other modules), or labels do
            not fit it; nothing is written.
        ImportError: safetensors is not installed.
    """
    config = _config(model, labels)
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_pretrained needs the package safetensors (pip install safetensors)") from error
    state = {hugging_face_key(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in (_WEIGHTS[0], _CONFIG)]
    try:
        save_file(state, f"{paths[0]}.partial", metadata={"format": "pt"})
        with open(f"{paths[1]}.partial", "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, ensure_ascii=False)
        for path in paths:
            os.replace(f"{path}.partial", path)
    finally:
        for path in paths:
            if os.path.exists(f"{path}.partial"):
                os.remove(f"{path}.partial")


def weights_in(folder: str) -> str | None:
    """The path of the weights in a folder of transformers' or of a hub's, None where there are none.

    Raises:
        ValueError: ``config.json`` says that the network strides elsewhere than this package's do.
    """
    found = next((path for name in _WEIGHTS if os.path.isfile(path := os.path.join(folder, name))), None)
    config = os.path.join(folder, _CONFIG)
    if found and os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            settings = json.load(file)
        for name in ("downsample_in_bottleneck", "downsample_in_first_stage"):
            if settings.get(name):
                raise ValueError(f"read: {config} sets {name}: that network strides elsewhere than torchvision's")
    return found
