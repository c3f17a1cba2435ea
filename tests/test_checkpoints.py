"""``convert.load``, ``read`` and ``resolve``: every layout, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from fuse_cases import randomised
from torch import Tensor, nn
from tutorial_networks import TutorialResNet18, TutorialResNet101

import resnet_fused
from resnet_fused.convert import fuse, load, read, resolve
from resnet_fused.testing import import_torchvision

torchvision = import_torchvision()


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's keys as transformers' ResNetForImageClassification names them (models/resnet/modeling_resnet.py).

    ResNetEmbeddings.embedder and ResNetConvLayer give ``convolution`` and ``normalization``; ResNetEncoder.stages of
    ResNetStage.layers of blocks, whose ``layer`` is a Sequential of ResNetConvLayer and whose ``shortcut`` is a
    ResNetShortCut; ``classifier`` = Sequential(Flatten, Linear).
    """
    result = {}
    for key, value in state.items():
        key = re.sub(r"^conv1\.", "resnet.embedder.embedder.convolution.", key)
        key = re.sub(r"^bn1\.", "resnet.embedder.embedder.normalization.", key)
        key = re.sub(r"^fc\.", "classifier.1.", key)
        block = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.*)", key)
        if block:
            stage, index, kind, number, rest = block.groups()
            prefix = f"resnet.encoder.stages.{int(stage) - 1}.layers.{index}"
            if kind == "downsample.":
                key = f"{prefix}.shortcut.{('convolution', 'normalization')[int(number)]}.{rest}"
            else:
                name = {"conv": "convolution", "bn": "normalization"}[kind]
                key = f"{prefix}.layer.{int(number) - 1}.{name}.{rest}"
        result[key] = value
    return result


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return randomised(torchvision.models.resnet18(num_classes=10)).state_dict()


def own_resnet18() -> nn.Module:
    return resnet_fused.resnet18(num_classes=10)


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


# Layouts


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_torchvision_keys_with_and_without_a_prefix(weights: dict[str, Tensor], prefix: str) -> None:
    model = own_resnet18()
    assert load(model, {prefix + key: value for key, value in weights.items()}) is model
    assert_loaded(model, weights)


def test_loading_into_torchvision_timm_and_fused_models(weights: dict[str, Tensor]) -> None:
    x = torch.randn(1, 3, 64, 64)
    stock = torchvision.models.resnet18(num_classes=10).eval()
    stock.load_state_dict(weights)
    models = [
        torchvision.models.resnet18(num_classes=10),
        fuse(torchvision.models.resnet18(num_classes=10)),
        own_resnet18(),
    ]
    if importlib.util.find_spec("timm"):
        import timm

        models.append(timm.create_model("resnet18", num_classes=10))
    for model in models:
        load(model.eval(), to_hugging_face(weights))
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_hugging_face_keys(name: str) -> None:
    state = randomised(getattr(torchvision.models, name)(num_classes=10)).state_dict()
    renamed = to_hugging_face(state)
    assert not renamed.keys() & state.keys()
    model = getattr(resnet_fused, name)(num_classes=10)
    assert_loaded(load(model, renamed), state)


def test_tutorial_resnet18_gives_the_outputs_of_its_network() -> None:
    torch.manual_seed(0)
    original = randomised(TutorialResNet18(10)).eval()
    state = original.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    model = load(own_resnet18(), state).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(state[key], kept[key]) for key in kept)


def test_a_bias_before_batch_norm_is_absorbed_by_the_mean_and_cancels_in_training() -> None:
    torch.manual_seed(0)
    original = randomised(TutorialResNet18(10)).double()
    for module in original.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    model = load(own_resnet18().double(), original.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    close(model.eval()(x), original.eval()(x))
    close(model.train()(x), original.train()(x))
    # The running means still differ by exactly the bias after the step, so eval still agrees.
    for path in ("layer1.0", "layer2.0"):
        ours, theirs = model.get_submodule(path), original.get_submodule(path)
        close(ours.bn1.running_mean, theirs.bn1.running_mean - theirs.conv1.bias)
        close(ours.bn1.running_var, theirs.bn1.running_var)
    close(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (3, 4, 6, 3)])
def test_tutorial_resnet101_layout_of_other_depths(blocks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    original = randomised(TutorialResNet101(blocks, 10)).eval()
    model = resnet_fused.ResNet(resnet_fused.Bottleneck, list(blocks), num_classes=10).eval()
    load(model, original.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)


def test_tutorial_resnet101_keys() -> None:
    with torch.device("meta"):
        original, model = TutorialResNet101(num_classes=10), resnet_fused.resnet101(num_classes=10)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in original.state_dict().items()}
    load(model, state)
    assert not any(value.is_meta for value in model.state_dict().values())


def test_a_network_takes_its_own_keys_as_they_are() -> None:
    original = TutorialResNet18(10)
    state = {key: value + 1 for key, value in original.state_dict().items()}
    assert_loaded(load(original, state), state)


# What can be wrong


def test_every_problem_is_listed_and_nothing_changes(weights: dict[str, Tensor]) -> None:
    model = own_resnet18()
    before = copy.deepcopy(model.state_dict())
    wrong = dict(weights)
    del wrong["layer1.0.conv1.weight"]
    del wrong["bn1.running_mean"]
    wrong["fc.weight"] = torch.zeros(1000, 512)
    wrong["fc.bias"] = torch.zeros(1000)
    wrong["head.extra"] = torch.zeros(1)
    wrong["layer4.1.bn2.bias"] = "text"
    with pytest.raises(RuntimeError) as error:
        load(model, wrong)
    message = str(error.value)
    for line in (
        "6 keys do not fit ResNet (layout: torchvision); nothing was loaded",
        "unknown: head.extra",
        "missing: layer1.0.conv1.weight",
        "missing: bn1.running_mean",
        "shape: fc.weight: the model has (10, 512), the checkpoint (1000, 512)",
        "shape: fc.bias: the model has (10,), the checkpoint (1000,)",
        "not a tensor: layer4.1.bn2.bias is str",
    ):
        assert line in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_problems_are_named_by_the_keys_of_the_file() -> None:
    state = TutorialResNet101((1, 1, 1, 1), 10).state_dict()
    state["layer1.0.bottleneck.9.weight"] = torch.zeros(1)
    state["layer2.0.bottleneck.3.weight"] = torch.zeros(1)
    model = resnet_fused.ResNet(resnet_fused.Bottleneck, [1, 1, 1, 1], num_classes=10)
    with pytest.raises(RuntimeError, match="unknown: layer1.0.bottleneck.9.weight") as error:
        load(model, state)
    assert "shape: layer2.0.bottleneck.3.weight" in str(error.value)
    assert "tutorial ResNet-101" in str(error.value)


def test_missing_batch_counts_are_accepted(weights: dict[str, Tensor]) -> None:
    model = own_resnet18()
    load(model, {key: value for key, value in weights.items() if "num_batches_tracked" not in key})
    assert torch.equal(model.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])


@pytest.mark.parametrize("state", [None, [1], {1: torch.zeros(1)}])
def test_anything_but_a_state_dict_is_a_type_error(state: object) -> None:
    with pytest.raises(TypeError, match="state_dict must map names to tensors"):
        load(own_resnet18(), state)


# Files


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_read_unwraps(tmp_path: Path, weights: dict[str, Tensor], wrapper: str | None) -> None:
    path = tmp_path / "w.pth"
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, path)
    assert_loaded(load(own_resnet18(), read(path)), weights)


def test_read_safetensors(tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "w.safetensors"
    safetensors.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    assert_loaded(load(own_resnet18(), read(path)), weights)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="needs the package safetensors"):
        read(path)


def test_damaged_and_unsafe_files(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(path)
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"w\.pth"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"w\.pth"):
        read(path)
    torch.save(own_resnet18(), path)
    with pytest.raises(ValueError, match="objects other than tensors"):
        read(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected tensors by name, got list"):
        read(path)
    broken = tmp_path / "w.safetensors"
    broken.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        read(broken)


# weights=


def test_resolve_paths_and_state_dicts(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save(weights, path)
    for given in (path, str(path), weights, {"state_dict": weights}, to_hugging_face(weights)):
        state, num_classes, meta = resolve(given, "resnet18")
        assert (num_classes, meta) == (10, {})
        load(own_resnet18(), state)
    assert resolve({"a": torch.zeros(1)}, "resnet18")[1] is None


@pytest.mark.parametrize("given", ["DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1", "member"])
def test_resolve_torchvision_weights(given: str, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    enum = torchvision.models.ResNet50_Weights
    asked = []
    monkeypatch.setattr(enum, "get_state_dict", lambda self, *args, **kwargs: asked.append((self, kwargs)) or weights)
    state, num_classes, meta = resolve(enum.IMAGENET1K_V2 if given == "member" else given, "resnet50", progress=False)
    assert state is weights
    assert num_classes == len(meta["categories"]) == 1000
    assert asked[0][0] is (enum.IMAGENET1K_V2 if given in ("member", "DEFAULT") else enum.IMAGENET1K_V1)
    assert asked[0][1]["progress"] is False


def test_resolve_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ResNet50_Weights has IMAGENET1K_V1, IMAGENET1K_V2"):
        resolve("IMAGENET1K_V7", "resnet50")
    for error in (ValueError, TypeError):
        with pytest.raises(error, match="expected ResNet50_Weights but received ResNet18_Weights"):
            resolve(torchvision.models.ResNet18_Weights.DEFAULT, "resnet50")
    with pytest.raises(TypeError, match="got int"):
        resolve(3, "resnet50")
    with pytest.raises(FileNotFoundError):
        resolve("missing.pth", "resnet50")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision, which is not installed"):
        resolve("DEFAULT", "resnet50")
