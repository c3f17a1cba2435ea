"""``fuse``: the same function as before, and as much of it fused as can be proven."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from fuse_cases import NETWORKS, assert_same, count_calls, randomised, step, timm_model, torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from tutorial_networks import PreActivationNet, TutorialResNet101

from resnet_fused.convert import FusionReport, fuse, unfuse
from resnet_fused.testing import assert_as_accurate

# The same function


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_original(name: str) -> None:
    torch.manual_seed(0)
    stock = randomised(NETWORKS[name]()).double()
    ours = fuse(copy.deepcopy(stock))
    assert ours.fusion_report.fused
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_same(ours, stock, torch.randn(3, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tutorial18", "torchvision-resnet18", "timm-resnet18"])
def test_float32_is_as_accurate_as_stock(name: str) -> None:
    torch.manual_seed(0)
    stock = randomised(NETWORKS[name]())
    gold = copy.deepcopy(stock).double()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(3, 3, 64, 64)
    for a, b, c in zip(step(ours, x)[0], step(stock, x)[0], step(gold, x.double())[0], strict=True):
        if a.is_floating_point():
            assert_as_accurate(a, b, c)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("torchvision-resnet18", 8),
        ("torchvision-resnet50", 16),
        ("timm-resnet18", 8),
        ("timm-resnet50", 16),
        ("tutorial18", 8),
        ("tutorial101", 5),
    ],
)
def test_stem_and_every_block_is_one_call(name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    model = fuse(NETWORKS[name]()).eval()
    model(torch.randn(1, 3, 64, 64))
    assert calls == {"run_units": blocks, "run_stem": 1}
    assert len(model.fusion_report.fused) == blocks + 1
    assert not model.fusion_report.left


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 32, "width_per_group": 8},
        {"width_per_group": 128},
        {"replace_stride_with_dilation": [False, True, True]},
        {"zero_init_residual": True},
    ],
    ids=["resnext", "wide", "dilated", "zero-init"],
)
def test_torchvision_variants_are_fused_completely(options: dict[str, object]) -> None:
    with torch.device("meta"):
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 2], **options)
    report = fuse(model).fusion_report
    assert (len(report.fused), report.left) == (7, [])


def test_pre_activation_is_paired_by_data_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    model = fuse(PreActivationNet()).eval()
    patterns = [pattern for _, pattern in model.fusion_report.fused]
    assert patterns.count("bn-relu: bn1 → relu") == 3
    assert patterns.count("conv-bn: conv1 → bn2 → relu") == 3
    model(torch.randn(1, 3, 32, 32))
    assert calls == {"run_bn_act": 4, "run_units": 3}


# What stays as it was


def test_hooks_fire_with_the_values_of_stock() -> None:
    stock = randomised(torchvision.models.resnet18()).eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(1, 3, 64, 64)
    seen: dict[str, list[Tensor]] = {"stock": [], "ours": []}
    for name, model in (("stock", stock), ("ours", ours)):
        for path in ("bn1", "relu", "layer2.0.bn1", "layer2.0.downsample", "layer3.1.conv2", "layer3.1", "layer4"):

            def hook(m, args, out, n=name):
                return seen[n].append(out.detach().clone())

            model.get_submodule(path).register_forward_hook(hook)
        with torch.no_grad():
            model(x)
    assert len(seen["ours"]) == len(seen["stock"]) == 8 - 1
    for a, b in zip(seen["ours"], seen["stock"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_changes_after_fusing_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    stock = randomised(timm_model("resnet18")).eval()
    ours = fuse(copy.deepcopy(stock))
    for model in (stock, ours):
        model.fc = nn.Identity()
        model.layer1[0].act1 = nn.GELU()
        model.layer1[1].drop_block = nn.Hardtanh(-0.5, 0.5)
        model.layer2[0].downsample.append(nn.Tanh())
        model.layer3[0].downsample = nn.Conv2d(128, 256, 1, 2)
        nn.init.constant_(model.layer3[0].downsample.weight, 0.01)
        nn.init.zeros_(model.layer3[0].downsample.bias)
        model.layer4[1].se = nn.Sigmoid()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)
    # layer1.1, layer2.0, layer3.0 and layer4.1 are not what was traced; layer2.0's shortcut is a Sequential.
    assert calls == {"run_stem": 1, "run_units": 4 + 1}


def test_grad_checkpointing_switched_on_later_uses_the_original_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    model = fuse(timm_model("resnet18"))
    model.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert calls["run_stem"] == 0
    model.set_grad_checkpointing(False)
    model(x)
    assert calls["run_stem"] == 1


def test_other_arguments_use_the_original_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, scale=1.0):
            return F.relu(self.bn(self.conv(x))) * scale

    model = fuse(Net()).eval()
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(model(x, scale=2.0), 2 * model(x))
    torch.testing.assert_close(model(x, 3.0), 3 * model(x=x))
    assert calls["run_units"] == 2


def test_identity_of_parameters_and_an_optimiser_built_before() -> None:
    torch.manual_seed(0)
    stock = randomised(torchvision.models.resnet18()).double()
    ours = copy.deepcopy(stock)
    before = dict(ours.named_parameters())
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, stock)]
    for i in range(2):
        x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
        for model, optimiser in zip((ours, stock), optimisers):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        if i == 0:
            fuse(ours)
    assert all(ours.get_parameter(name) is parameter for name, parameter in before.items())
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_copies_and_pickles_are_fused_and_carry_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    model = fuse(randomised(torchvision.models.resnet18())).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    for clone in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ):
        calls.clear()
        torch.testing.assert_close(clone(x), expected)
        assert calls == {"run_units": 8, "run_stem": 1}
        assert clone.fusion_report == model.fusion_report
        assert isinstance(clone, torchvision.models.ResNet)
    assert pickle.loads(pickle.dumps(unfuse(copy.deepcopy(model)))).__class__ is torchvision.models.ResNet


def test_unfuse_restores_the_stock_classes() -> None:
    for name in ("torchvision-resnet18", "tutorial101"):
        stock = NETWORKS[name]()
        classes = [type(module) for module in stock.modules()]
        attributes = [set(module.__dict__) for module in stock.modules()]
        description = repr(stock)
        fuse(stock)
        assert repr(stock) == description
        assert [type(module) for module in stock.modules()] != classes
        assert unfuse(stock) is stock
        assert [type(module) for module in stock.modules()] == classes
        assert [set(module.__dict__) for module in stock.modules()] == attributes


def test_fusing_twice_changes_nothing() -> None:
    model = fuse(TutorialResNet101((1, 1, 1, 1)))
    report, classes = model.fusion_report, [type(module) for module in model.modules()]
    assert fuse(model).fusion_report == report
    assert [type(module) for module in model.modules()] == classes


def test_the_report_reads_as_a_table() -> None:
    report = fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).fusion_report
    assert isinstance(report, FusionReport)
    report.left.append(("head.bn", "a reason"))
    assert str(report).splitlines() == [
        "1 fused, 1 left",
        "  fused           conv-bn: 0 → 1 (neighbours)",
        "  left   head.bn  a reason",
    ]


@pytest.mark.parametrize("convert", [fuse, unfuse])
def test_anything_but_a_module_is_a_type_error(convert: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        convert({})


def test_own_modules_are_left_as_they_are() -> None:
    import resnet_fused

    model = resnet_fused.resnet18()
    classes = [type(module) for module in model.modules()]
    report = fuse(model).fusion_report
    assert [type(module) for module in model.modules()] == classes
    assert not report.fused
    assert all("own module" in reason for _, reason in report.left)
