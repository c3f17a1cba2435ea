"""Reading weights in other people's layouts: ``load(model, state_dict)``, ``read(path)``, and what ``weights=`` means.

The layouts, each translated to torchvision's keys:

- torchvision and timm: the same keys; a ``module.`` (DataParallel) or ``_orig_mod.`` (torch.compile) prefix is removed.
- Hugging Face ``ResNetForImageClassification``: names as in transformers' ``models/resnet/modeling_resnet.py`` (embedder,
  encoder stages of layers, each a Sequential of ResNetConvLayer with ``convolution`` and ``normalization``; ``shortcut``;
  ``classifier`` = Flatten, Linear). ``downsample_in_bottleneck=False`` puts the stride in the 3×3, as here.
- tutorial ResNet-18: ``extra`` for the shortcut, and a bias in the convolutions of a block.
- tutorial ResNet-101 (and other depths): ``conv1`` and ``bottleneck`` are Sequentials, ``downSample`` is the shortcut.

A convolution's bias before batch norm cancels in training and shifts the mean in eval: it is absorbed as
``running_mean -= bias``.
"""

from __future__ import annotations

import enum
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .hugging_face import weights_in

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]

_PREFIXES = ("module.", "_orig_mod.")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".safetensors")
_BLOCK = r"(layer\d+\.\d+\.)"

_HUGGING_FACE = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", "layer{0+1}.{1}.conv{2+1}."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", "layer{0+1}.{1}.bn{2+1}."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", "layer{0+1}.{1}.downsample.0."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", "layer{0+1}.{1}.downsample.1."),
    (r"classifier\.1\.", "fc."),
)
_TUTORIAL_18 = ((_BLOCK + r"extra\.([01])\.", "{0}downsample.{1}."),)
_TUTORIAL_101 = (
    (r"conv1\.0\.", "conv1."),
    (r"conv1\.1\.", "bn1."),
    *((_BLOCK + rf"bottleneck\.{3 * i}\.", f"{{0}}conv{i + 1}.") for i in range(3)),
    *((_BLOCK + rf"bottleneck\.{3 * i + 1}\.", f"{{0}}bn{i + 1}.") for i in range(3)),
    (_BLOCK + r"downSample\.([01])\.", "{0}downsample.{1}."),
)
# (name, a key that only this layout has, its translation, whether convolutions carry biases)
_LAYOUTS = (
    ("Hugging Face", r"(resnet\.)?(embedder|encoder)\.", _HUGGING_FACE, False),
    ("tutorial ResNet-101", rf"conv1\.[01]\.|{_BLOCK}(bottleneck|downSample)\.", _TUTORIAL_101, True),
    ("tutorial ResNet-18", rf"{_BLOCK}(extra\.|conv\d\.bias$)", _TUTORIAL_18, True),
)


class WrongWeights(TypeError, ValueError):
    """The weights enum of another model (a TypeError in torchvision)."""


def _translated(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, template in rules:
        match = re.match(pattern, key)
        if match:
            for i, group in enumerate(match.groups()):
                template = template.replace(f"{{{i}}}", group)
                if group.isdigit():
                    template = template.replace(f"{{{i}+1}}", str(int(group) + 1))
            return template + key[match.end() :]
    return key


def _without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(state)
    while prefix := next((p for p in _PREFIXES if result and all(k.startswith(p) for k in result)), None):
        result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def _norm_of(convolution: str) -> str:
    """The batch norm after a convolution, in torchvision's names."""
    if convolution.endswith("downsample.0"):
        return convolution[:-1] + "1"
    return re.sub(r"conv(\d)$", r"bn\1", convolution)


def _absorb_biases(state: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in [k for k in state if re.search(r"(^|\.)(conv\d|downsample\.0)\.bias$", k) and k not in wanted]:
        mean_key = f"{_norm_of(key[: -len('.bias')])}.running_mean"
        mean, bias = state.get(mean_key), state[key]
        if isinstance(mean, Tensor) and isinstance(bias, Tensor) and mean.shape == bias.shape:
            state[mean_key] = (mean.double() - bias.double()).to(mean.dtype)
            del state[key]


def _to_torchvision(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], str]:
    """(state in the keys of ``wanted``, the name each key came from, the layout's name)."""
    stripped = _without_prefix(state)
    names = dict(zip(stripped, state))
    if not stripped.keys() <= wanted.keys():
        for layout, marker, rules, biased in _LAYOUTS:
            if any(re.match(marker, key) for key in stripped):
                origin = {_translated(key, rules): names[key] for key in stripped}
                if len(origin) == len(stripped):
                    result = dict(zip(origin, stripped.values()))
                    if biased:
                        _absorb_biases(result, wanted)
                    return result, origin, layout
    return stripped, names, "torchvision"


def load(model: Model, state_dict: Mapping[str, Any]) -> Model:
    """Load weights of any known layout into a model with torchvision's keys (this package's, torchvision's, timm's).

    Args:
        model (nn.Module): changed in place; it may be fused.
        state_dict (mapping of str to Tensor): the layout is told by the keys; a missing ``num_batches_tracked`` is accepted.
    Returns:
        model itself.
    Raises:
        TypeError: state_dict is no mapping of names.
        RuntimeError: lists every unknown, missing and misshapen key; the model is unchanged.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"load: state_dict must map names to tensors, got {type(state_dict).__name__}")
    wanted = model.state_dict()
    state, origin, layout = _to_torchvision(state_dict, wanted)
    for key, value in wanted.items():
        if key.endswith(".num_batches_tracked") and key not in state:
            state[key] = value
    problems = [f"unknown: {origin.get(key, key)}" for key in state if key not in wanted]
    problems += [f"missing: {key}" for key in wanted if key not in state]
    for key in wanted.keys() & state.keys():
        value, expected = state[key], wanted[key]
        if not isinstance(value, Tensor):
            problems.append(f"not a tensor: {origin.get(key, key)} is {type(value).__name__}")
        elif value.shape != expected.shape:
            shapes = f"the model has {tuple(expected.shape)}, the checkpoint {tuple(value.shape)}"
            problems.append(f"shape: {origin.get(key, key)}: {shapes}")
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise RuntimeError(
            f"load: {len(problems)} keys do not fit {type(model).__name__} (layout: {layout}); nothing was loaded:\n  {listing}"
        )
    on_meta = any(value.is_meta for value in wanted.values())
    model.load_state_dict(state, assign=on_meta)
    return model


def _unwrapped(checkpoint: Any) -> Any:
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[k] for k in _WRAPPERS if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    return checkpoint


def read(path: str | os.PathLike[str]) -> State:
    """The state_dict in a .pth or .safetensors file, on the processor; ``{"state_dict": …}`` and the like are unwrapped.

    A folder stands for its ``model.safetensors`` or ``pytorch_model.bin``, as ``save_pretrained`` writes it.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ImportError: a .safetensors file, and safetensors is not installed.
        ValueError: the file is damaged, or holds something other than tensors by name; or the ``config.json`` in the folder
            describes another network.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        name = weights_in(name) or os.path.join(name, "model.safetensors")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"read: no such file: {name}")
    try:
        if name.endswith(".safetensors"):
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise ImportError(f"read: {name} needs the package safetensors (pip install safetensors)") from error
            checkpoint: Any = load_file(name)
        else:
            checkpoint = torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds objects other than tensors (those are never loaded)"
        raise ValueError(f"read: {name}: {reason}: {str(error).splitlines()[0]}") from error
    except (ImportError, OSError):
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"read: {name}: not a readable checkpoint: {str(error).splitlines()[:1]}") from error
    except Exception as error:
        raise ValueError(f"read: {name}: not a readable checkpoint: {type(error).__name__}: {error}") from error
    state = _unwrapped(checkpoint)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"read: {name}: expected tensors by name, got {type(state).__name__}")
    return dict(state)


def _class_count(state: Mapping[str, Any]) -> int | None:
    stripped = _without_prefix(state)
    weight = next((stripped[k] for k in ("fc.weight", "classifier.1.weight") if k in stripped), None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _from_torchvision(weights: Any, builder_name: str, progress: bool) -> tuple[State, int | None, dict[str, Any]]:
    from ..testing import import_torchvision

    try:
        torchvision = import_torchvision()
    except ImportError as error:
        raise ImportError(
            f"weights={weights!r} comes from torchvision, which is not installed; pass a path or a state_dict instead"
        ) from error
    choices = torchvision.models.get_model_weights(builder_name)
    if isinstance(weights, str):
        name = weights.removeprefix(f"{choices.__name__}.")
        if name not in choices.__members__:
            known = ", ".join(choices.__members__)
            raise ValueError(f"{builder_name}: no weights named {weights!r}; {choices.__name__} has {known}")
        weights = choices[name]
    if not isinstance(weights, choices):
        received = type(weights).__name__
        raise WrongWeights(f"Invalid Weight class provided; expected {choices.__name__} but received {received}.")
    meta = dict(weights.meta)
    return weights.get_state_dict(progress=progress, check_hash=True), len(meta["categories"]), meta


def resolve(
    weights: Any, builder_name: str, progress: bool = True
) -> tuple[Mapping[str, Any], int | None, dict[str, Any]]:
    """What a builder's ``weights=`` stands for.

    Args:
        weights: a torchvision weights enum member, its name ("IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V1", "DEFAULT"),
            a path (.pth, .safetensors, or a folder with a model.safetensors), or a state_dict.
        builder_name (str): "resnet50", …
        progress (bool): show a progress bar while torchvision downloads.
    Returns:
        (state_dict, number of classes or None when it cannot be told, torchvision's meta or an empty dict).
    Raises:
        ImportError: a name or enum member, and torchvision is not installed.
        ValueError: an unknown name, the enum of another builder (also a TypeError, as in torchvision), a damaged file.
        TypeError: anything else.
    """
    if isinstance(weights, Mapping):
        state = _unwrapped(weights)
        return state, _class_count(state), {}
    is_name = isinstance(weights, str) and not (
        weights.endswith(_SUFFIXES) or os.path.isfile(weights) or os.path.isdir(weights) and weights_in(weights)
    )
    if isinstance(weights, (str, os.PathLike)) and not is_name:
        state = read(weights)
        return state, _class_count(state), {}
    if isinstance(weights, (str, enum.Enum)):
        return _from_torchvision(weights, builder_name, progress)
    raise TypeError(
        f"{builder_name}: weights must be a torchvision weights enum, its name, a path or a state_dict, "
        f"got {type(weights).__name__}"
    )
