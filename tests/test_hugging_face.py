"""``save_pretrained``: the folder that transformers reads, and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_cases import timm_model
from torch import nn

import resnet_fused
from resnet_fused import BasicBlock, Bottleneck, ResNet, load, save_pretrained
from resnet_fused.convert import read
from resnet_fused.convert.hugging_face import hugging_face_key
from resnet_fused.testing import import_torchvision, randomise_norms

tv = import_torchvision().models.resnet
pytest.importorskip("safetensors", reason="safetensors is not installed")

KINDS = {"basic": BasicBlock, "bottleneck": Bottleneck}
# What transformers' own model has (its first line says which).
KEYS = [line.split() for line in (Path(__file__).parent / "hugging_face_keys.txt").read_text().splitlines()[1:]]


def network(kind: str = "basic", depths: tuple[int, ...] = (2, 1, 1, 1), **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(ResNet(KINDS[kind], depths, num_classes=10, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_transformers_and_values_come_back(kind: str, tmp_path: Path) -> None:
    model = network(kind).to(memory_format=torch.channels_last)
    folder = tmp_path / "new" / "folder"
    save_pretrained(model, folder)
    written = read(folder)
    wanted = {key: () if s == "scalar" else tuple(map(int, s.split("x"))) for k, key, s in KEYS if k == kind}
    assert {key: tuple(value.shape) for key, value in written.items()} == wanted
    assert len(wanted) > 60
    again = load(ResNet(KINDS[kind], (2, 1, 1, 1), num_classes=10), written)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_builder_takes_the_folder_for_weights(tmp_path: Path) -> None:
    model = network(depths=(2, 2, 2, 2))
    save_pretrained(model, tmp_path)
    again = resnet_fused.resnet18(weights=str(tmp_path))
    assert torch.equal(again.fc.weight, model.fc.weight)


def test_the_configuration(tmp_path: Path) -> None:
    names = [f"clothes {i}" for i in range(10)]
    model = network("bottleneck")
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    save_pretrained(model, tmp_path, labels=names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["layer_type"], config["num_channels"]) == ("resnet", "bottleneck", 1)
    assert (config["depths"], config["hidden_sizes"]) == ([2, 1, 1, 1], [256, 512, 1024, 2048])
    assert config["id2label"]["3"] == "clothes 3" and config["label2id"]["clothes 3"] == 3
    assert not config["downsample_in_bottleneck"] and not config["downsample_in_first_stage"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("origin", ["torchvision", "timm", "fused timm with drop path"])
def test_models_of_others(origin: str, tmp_path: Path) -> None:
    if origin == "torchvision":
        model: nn.Module = tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=10)
    else:
        rate = 0.2 if "drop" in origin else 0.0
        model = timm_model("resnet18", layers=(1, 1, 1, 1), num_classes=10, drop_path_rate=rate)
        model = resnet_fused.fuse(model) if "fused" in origin else model
    save_pretrained(model, tmp_path)
    again = load(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10), read(tmp_path)).eval()
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(again(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def _gelu() -> nn.Module:
    model = network()
    model.layer3[0].relu = nn.GELU()
    return model


def _without_classifier() -> nn.Module:
    model = network()
    model.fc = nn.Identity()
    return model


_REFUSED = {
    "groups": (lambda: network("bottleneck", groups=2), r"layer1\.0\.conv2\.groups is 2, expected 1"),
    "width": (lambda: network("bottleneck", width_per_group=128), r"layer1\.0\.conv1\.weight has shape \(128"),
    "dilation": (
        lambda: network("bottleneck", replace_stride_with_dilation=[False, False, True]),
        r"layer4\.0\.conv2\.stride is \(1, 1\), expected \(2, 2\)",
    ),
    "eps": (lambda: network(norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3)), r"bn1\.eps is 0\.001, expected 1e-05"),
    "norm": (lambda: network(norm_layer=lambda c: nn.GroupNorm(2, c)), "bn1 is GroupNorm"),
    "activation": (_gelu, r"layer3\.0\.relu is GELU"),
    "deep stem": (lambda: timm_model("resnet18d", num_classes=10), "conv1"),
    "classifier": (_without_classifier, "a Linear fc"),
    "another network": (lambda: nn.Linear(2, 2), "got Linear"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_transformers_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    build, message = _REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_pretrained(build(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_labels_are_as_many_as_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels must name the 10 classes of the model, got 2 names"):
        save_pretrained(network(), tmp_path, labels=["a", "b"])


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(network(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(network(depths=(1, 1, 1, 1)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_pretrained(network(), tmp_path)


@pytest.mark.parametrize("name", ["downsample_in_bottleneck", "downsample_in_first_stage"])
def test_a_network_that_strides_elsewhere_is_not_read(name: str, tmp_path: Path) -> None:
    save_pretrained(network(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: True}))
    with pytest.raises(ValueError, match=f"sets {name}"):
        read(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read(tmp_path)
    torch.save({hugging_face_key(k): v for k, v in network().state_dict().items()}, tmp_path / "pytorch_model.bin")
    load(network(), read(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = network(kind).double().eval()
    save_pretrained(model, tmp_path, labels=[f"class {i}" for i in range(10)])
    theirs, report = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label[3] == "class 3"
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(theirs.eval()(x).logits, model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load(network(kind).double(), read(tmp_path / "theirs")).eval()
    torch.testing.assert_close(again(x), model(x))
