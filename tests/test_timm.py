"""timm: ``fused_*`` models from its registry, and ``fuse`` on what it builds, beside the stock model of the same values."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_cases import assert_same_steps, flattened, step
from stock_pairs import assert_same, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import resnet_fused
from resnet_fused.models import BUILDERS
from resnet_fused.testing import import_torchvision, randomise_norms

import_torchvision()
timm = pytest.importorskip("timm", reason="timm is not installed")

import resnet_fused.timm  # noqa: E402  (needs timm)

SMALL: dict[str, Any] = {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 10}
NETWORK = ["NONE", "PROJECTION", "PROJECTION", "IDENTITY", "PROJECTION", "PROJECTION"]  # 64 channels go to 8 in layer1


def pair(name: str = "resnet18", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(timm's fused model, timm's model), float64, with the same values."""
    torch.manual_seed(0)
    stock = randomise_norms(timm.create_model(name, **(SMALL | kwargs))).double()
    ours = timm.create_model(f"fused_{name}", **(SMALL | kwargs)).double()
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


# The registry


def test_every_builder_is_registered_with_the_tags_of_its_weights() -> None:
    assert set(timm.list_models("fused_*")) == {f"fused_{name}" for name in BUILDERS}
    for name in BUILDERS:
        assert timm.is_model(f"fused_{name}") and f"fused_{name}" in resnet_fused.timm.__all__
        assert timm.list_pretrained(f"fused_{name}.*") == [f"fused_{tag}" for tag in timm.list_pretrained(f"{name}.*")]
        ours, stock = (timm.get_pretrained_cfg(prefix + name) for prefix in ("fused_", ""))
        assert (ours.tag, ours.hf_hub_id, ours.url) == (stock.tag, stock.hf_hub_id, stock.url)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", BUILDERS)
def test_names_and_shapes_are_those_of_timm_and_of_this_package(name: str) -> None:
    with torch.device("meta"):
        models = [timm.create_model(f"fused_{name}", layers=(1, 1, 1, 1))]
        models += [timm.create_model(name, layers=(1, 1, 1, 1))]
    ours, stock = ({key: t.shape for key, t in model.state_dict().items()} for model in models)
    assert list(ours.items()) == list(stock.items())
    assert models[0].fusion_report.left == [] and len(models[0].fusion_report.fused) == 5
    with torch.device("meta"):
        own = BUILDERS[name]().state_dict()
    assert all(own[key].shape == shape for key, shape in ours.items())


def test_weights_are_loaded_as_timm_loads_them(tmp_path: Path) -> None:
    _, stock = pair()
    path = tmp_path / "weights.pth"
    torch.save(stock.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 10}
    made = []
    for name in ("fused_resnet18.tv_in1k", "resnet18.tv_in1k"):
        torch.manual_seed(3)
        options = SMALL | {"pretrained_cfg_overlay": overlay, "in_chans": 1, "num_classes": 3}
        made.append(timm.create_model(name, pretrained=True, **options).double())
    assert made[0].pretrained_cfg == made[1].pretrained_cfg and made[0].pretrained_cfg["tag"] == "tv_in1k"
    torch.testing.assert_close(made[0].conv1.weight, stock.conv1.weight.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert_same_steps(*made, images()[:, :1])
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("fused_resnet18.no_such_tag")


def test_without_timm_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "resnet_fused.timm")
    with pytest.raises(ImportError, match=r"pip install timm torchvision"):
        importlib.import_module("resnet_fused.timm")


# The options of timm's ResNet: what fuses of each, and that the rest is stock's

_POOLING: dict[str, Any] = {"global_pool": "catavgmax"}
_DEEP: dict[str, Any] = {"stem_width": 32, "stem_type": "deep", "avg_down": True}
_OPTIONS: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "plain": ("resnet18", {}, NETWORK),
    "bottleneck": ("resnet50", {}, NETWORK),
    "grouped": ("resnext50_32x4d", {"channels": (64, 64, 64, 64), "layers": (1, 1, 1, 1)}, None),
    "in_chans": ("resnet18", {"in_chans": 1}, NETWORK),
    "no classifier": ("resnet18", {"num_classes": 0}, NETWORK),
    "no pooling": ("resnet18", {"num_classes": 0, "global_pool": ""}, NETWORK),
    "pooling": ("resnet18", _POOLING, NETWORK),
    "output_stride": ("resnet50", {"output_stride": 8}, NETWORK),
    "zero_init_last": ("resnet18", {"zero_init_last": False}, NETWORK),
    "dropout": ("resnet18", {"drop_rate": 0.5}, NETWORK),
    # conv-bn-relu-conv-bn, DropPath, then the shortcut as conv-bn-add-relu; the first block has rate 0.
    "drop path": (
        "resnet18",
        {"drop_path_rate": 0.9},
        NETWORK[:2] + ["NONE", "TENSOR", "NONE"] + ["NONE", "TENSOR"] * 2,
    ),
    "drop block": ("resnet18", {"drop_block_rate": 0.3}, None),
    "deep stem": ("resnet18", _DEEP, None),
    "stem without pool": ("resnet18", {"replace_stem_pool": True}, None),
    "anti-aliasing": ("resnet18", {"aa_layer": timm.layers.BlurPool2d}, None),
    "attention": ("resnet18", {"block_args": {"attn_layer": "se"}}, None),
    "activation": ("resnet18", {"act_layer": "silu"}, None),
    "group norm": ("resnet18", {"norm_layer": partial(timm.layers.GroupNorm, num_groups=2)}, []),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("option", _OPTIONS)
def test_options_of_timm(option: str, fused_calls: list[str]) -> None:
    name, kwargs, chains = _OPTIONS[option]
    ours, stock = pair(name, **kwargs)
    size = 72 if option == "drop block" else 40
    assert_same_steps(ours, stock, images(size=size)[:, : kwargs.get("in_chans", 3)])
    if chains is None:
        assert fused_calls
    else:
        assert fused_calls == chains * 2


def test_drop_path_draws_what_stock_draws() -> None:
    ours, stock = pair(drop_path_rate=0.9)
    x = images(8)
    results = []
    for model in (ours, stock):
        torch.manual_seed(11)
        results.append(torch.stack([model(x) for _ in range(3)]))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0][0], results[0][1])


# The methods


@pytest.mark.parametrize(
    ("method", "kwargs", "chains"),
    [
        ("forward_features", {}, NETWORK),
        ("forward_intermediates", {}, NETWORK[1:]),
        ("forward_intermediates", {"indices": [1, 3], "intermediates_only": True, "stop_early": True}, NETWORK[1:5]),
    ],
)
def test_methods_that_run_the_network(
    method: str, kwargs: dict[str, Any], chains: list[str], fused_calls: list[str]
) -> None:
    ours, stock = pair()
    assert_same_steps(ours, stock, method=method, **kwargs)
    assert fused_calls == chains * 2


def test_head_classifier_and_unfuse() -> None:
    ours, stock = pair()
    features = torch.randn(2, 32, 2, 2, dtype=torch.float64)
    for kwargs in ({}, {"pre_logits": True}):
        torch.testing.assert_close(ours.forward_head(features, **kwargs), stock.forward_head(features, **kwargs))
    assert ours.get_classifier() is ours.fc and ours.feature_info == stock.feature_info
    assert ours.group_matcher() == stock.group_matcher() and isinstance(ours, timm.models.ResNet)
    resnet_fused.unfuse(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fused_before", [True, False])
def test_reset_classifier(fused_before: bool, fused_calls: list[str]) -> None:
    _, stock = pair()
    ours = copy.deepcopy(stock)
    if fused_before:
        resnet_fused.fuse(ours)
    for model in (ours, stock):
        torch.manual_seed(2)
        model.reset_classifier(5, "max")
        model.double()
    if not fused_before:
        resnet_fused.fuse(ours)
    assert_same_steps(ours, stock)
    assert ours(images()).shape == (2, 5) and fused_calls == NETWORK * 3
    for model in (ours, stock):
        model.reset_classifier(0, "")
    assert_same_steps(ours, stock)


def test_methods_replaced_after_fusing_are_called() -> None:
    results = []
    for model in pair():
        features = model.forward_features
        model.forward_features = lambda x, features=features: features(x) * 2
        results.append(step(model, images()))
    assert_same(*results)


def test_a_forward_features_of_the_class_replaced_after_fusing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = pair()
    features = timm.models.ResNet.forward_features
    monkeypatch.setattr(timm.models.ResNet, "forward_features", lambda self, x: features(self, x) * 2)
    assert_same_steps(ours, stock)
    assert_same_steps(ours, stock, method="forward_features")


# Feature extractors

_EXTRACTORS = {  # the chain of the stem is there where nobody listens to its activation
    "list": NETWORK,
    "dict": NETWORK,
    "fx": NETWORK,
    "hook": NETWORK[1:],
    "getter": NETWORK[1:],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", _EXTRACTORS)
def test_features_only(kind: str, fused_calls: list[str]) -> None:
    ours, stock = pair(features_only=True, feature_cls=kind)
    assert type(ours).__name__ == type(stock).__name__ and ours.feature_info.channels() == stock.feature_info.channels()
    assert_same_steps(ours, stock)
    assert sorted(fused_calls) == sorted(_EXTRACTORS[kind] * 2)


def test_features_of_some_stages_and_checkpointing(fused_calls: list[str]) -> None:
    ours, stock = pair(features_only=True, out_indices=(1, 3))
    assert_same_steps(ours, stock)
    assert fused_calls == NETWORK[:5] * 2
    ours.set_grad_checkpointing()
    stock.set_grad_checkpointing()
    with set_checkpoint_early_stop(False):  # an early stop spares the last chain its second update of the statistics
        assert_same_steps(ours, stock)


def test_a_block_exchanged_for_one_that_returns_a_tuple_is_seen() -> None:
    class Pair(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.block(x) * 2, x

    found = []
    for model in pair(features_only=True):
        model["layer4"][0] = Pair(model["layer4"][0])
        found.append(step(model, images()))
    assert_same(*found)


# Checkpointing


@pytest.mark.one_in(2)
@pytest.mark.parametrize("early_stop", [True, False])
def test_grad_checkpointing(early_stop: bool, fused_calls: list[str]) -> None:
    """The same gradients and statistics; but an early stop spares the last chain its second update."""
    results = []
    for model in pair():
        model.set_grad_checkpointing()
        with set_checkpoint_early_stop(early_stop):
            found = step(model, images())
        results.append({n: t for n, t in found.items() if not early_stop or "grad" in n or n == "out"})
    assert_same(*results)
    assert len(fused_calls) == 2 * len(NETWORK[1:])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_checkpoint_of_the_whole_network(reentrant: bool, fused_calls: list[str]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    ours, stock = (Checkpointed(model) for model in pair())
    assert_same(step(ours, images()), step(stock, images()))
    assert fused_calls == NETWORK * 2


# Copies, files and other tools


def _averaged(model: nn.Module) -> nn.Module:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model).module


def _saved(model: nn.Module) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    copied, _ = pair()
    copied.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    return copied


@pytest.mark.one_in(4)
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _averaged, _saved])
def test_copies_are_fused(copying: Any, fused_calls: list[str]) -> None:
    ours, stock = pair()
    copied = copying(ours)
    assert_same_steps(copied, stock)
    assert fused_calls == NETWORK * 2
    assert_same_steps(copied, stock, method="forward_features")


def test_export_fx_and_jit() -> None:
    ours, stock = (model.eval() for model in pair(layers=(1, 1, 1, 1)))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(ours, (images(4),), dynamic_shapes=({0: batch},)).module()
    traced = torch.fx.symbolic_trace(ours)
    assert str(traced.graph) == str(torch.fx.symbolic_trace(stock).graph)
    for tool in (exported, traced, torch.jit.trace(ours, images()), torch.jit.script(ours)):
        torch.testing.assert_close(tool(images(3)), stock(images(3)))


@pytest.mark.slow
def test_onnx_export() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx_reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    ours, stock = (model.eval().float() for model in pair(layers=(1, 1, 1, 1)))
    x = images(2, 33, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    proto = torch.onnx.export(ours, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False).model_proto
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    x = images(3, 33, torch.float32)
    (out,) = onnx_reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), stock(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}])
def test_compiles_in_one_graph(kwargs: dict[str, Any]) -> None:
    ours, stock = pair(**kwargs)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        flattened(compiled(images())).values(), flattened(stock(images())).values(), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_optimized_for_inference() -> None:
    ours, stock = (model.eval().float() for model in pair(drop_path_rate=0.5))
    fast = resnet_fused.optimize_for_inference(ours)
    torch.testing.assert_close(fast(images().float()), stock(images().float()), rtol=1e-3, atol=1e-3)
