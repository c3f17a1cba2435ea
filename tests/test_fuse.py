"""``fuse``: the same function as before, and as much of it fused as can be proven."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from resnet_fused.testing import assert_as_accurate, import_torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tutorial_networks import PreActivationNet, TutorialResNet18, TutorialResNet101

from resnet_fused import layers
from resnet_fused.convert import FusionReport, fuse, unfuse

torchvision = import_torchvision()


def timm_model(name: str, **kwargs: object) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **kwargs)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tutorial18": lambda: TutorialResNet18(10),
    "tutorial101": lambda: TutorialResNet101((1, 2, 1, 1), 10),
    "pre-activation": PreActivationNet,
    "torchvision-resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision-resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "torchvision-densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "timm-resnet18": lambda: timm_model("resnet18", num_classes=10),
    "timm-resnet50": lambda: timm_model("resnet50", num_classes=10),
    "timm-resnet26d": lambda: timm_model("resnet26d", num_classes=10),
    "timm-seresnet18": lambda: timm_model("legacy_seresnet18", num_classes=10),
    "timm-drop-path": lambda: timm_model("resnet18", num_classes=10, drop_path_rate=0.3),
    "timm-blur": lambda: timm_model("resnet18", num_classes=10, aa_layer="blur"),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters away from their initial values, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(eval output, train output, buffers), and all gradients."""
    model.eval()
    with torch.no_grad():
        evaluated = model(x.clone())
    model.train()
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    model.zero_grad()
    trained = model(x)
    (trained * torch.linspace(0.5, 1.5, trained.numel(), dtype=x.dtype).view_as(trained)).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [evaluated, trained.detach(), *model.buffers()], [x.grad, *gradients]


def assert_same(ours: nn.Module, stock: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    values, gradients = step(ours, x)
    wanted, wanted_gradients = step(stock, x)
    for a, b in zip(values, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)
    # A bias before batch norm has gradient zero: rounding is measured against the largest gradient.
    scale = max(g.abs().max() for g in wanted_gradients)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * scale


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the calls of layers.run_* made by models that are fused after this."""
    counter: Counter[str] = Counter()
    for name in ("run_units", "run_stem", "run_bn_act", "run_add_act"):
        original = getattr(layers, name)

        @functools.wraps(original)
        def counting(*args, _name=name, _original=original, **kwargs):
            counter[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(layers, name, counting)
    yield counter


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
def test_stem_and_every_block_is_one_call(name: str, blocks: int, calls: Counter[str]) -> None:
    model = fuse(NETWORKS[name]()).eval()
    model(torch.randn(1, 3, 64, 64))
    assert calls == {"run_units": blocks, "run_stem": 1}
    assert len(model.fusion_report.fused) == blocks + 1
    assert not model.fusion_report.left


def test_all_torchvision_builders_are_fused_completely() -> None:
    blocks = {
        "resnet34": 16,
        "resnet101": 33,
        "resnet152": 50,
        "resnext50_32x4d": 16,
        "resnext101_32x8d": 33,
        "resnext101_64x4d": 33,
        "wide_resnet50_2": 16,
        "wide_resnet101_2": 33,
    }
    for name, count in blocks.items():
        with torch.device("meta"):
            report = fuse(getattr(torchvision.models, name)()).fusion_report
        assert (len(report.fused), report.left) == (count + 1, []), name


def test_pre_activation_is_paired_by_data_flow(calls: Counter[str]) -> None:
    model = fuse(PreActivationNet()).eval()
    patterns = [pattern for _, pattern in model.fusion_report.fused]
    assert patterns.count("bn-relu: bn1 → relu") == 3
    assert patterns.count("conv-bn: conv1 → bn2 → relu") == 3
    model(torch.randn(1, 3, 32, 32))
    assert calls == {"run_bn_act": 4, "run_units": 3}


# Hazards: each forward must behave as before, and what cannot be proven is left with a reason


class Hazard(nn.Module):
    reason: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.calls = 0


class DiscardedInPlaceReLU(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        self.relu(y)
        return y


class InPlaceReLUOfInput(Hazard):
    def forward(self, x):
        shortcut = x * 1
        y = self.bn2(self.conv(self.relu(shortcut)))
        y += shortcut
        return F.relu(y)


class ResidualChangedInPlace(Hazard):
    reason = "no ReLU follows"

    def forward(self, x):
        y = x * 1
        z = self.bn(y * 2)
        y += z
        return torch.relu(y) + z


class MainPathAddedIntoResidual(Hazard):
    def forward(self, x):
        x = x * 1
        y = x.detach()
        y += self.bn(self.conv(x.detach()))
        return self.relu(y) + self.bn2(x)


class UsedAfterInPlaceAdd(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y
        y += x
        return F.relu(y) * z


class InputChangedBetween(Hazard):
    def forward(self, x):
        x = x * 1
        y = self.bn(x)
        x.mul_(2)
        return self.relu(y) + x


class ConvWithTwoUsers(Hazard):
    reason = "the output of conv is used elsewhere too"

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class CalledTwice(Hazard):
    reason = "called more than once"

    def forward(self, x):
        return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))


class NoGrad(Hazard):
    reason = "context manager"

    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn2(self.conv2(y)))


class Autocast(Hazard):
    reason = "context manager"

    def forward(self, x):
        with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
            y = self.bn(self.conv(x))
        return F.relu(y.to(x.dtype))


class RandomBranch(Hazard):
    reason = "random"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if random.random() < 0.5 else y


class WritesAttribute(Hazard):
    reason = "changes attributes (calls)"

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn(self.conv(x)))


class Checkpointed(Hazard):
    reason = "checkpointing"

    def forward(self, x):
        return checkpoint(lambda z: F.relu(self.bn(self.conv(z))), x, use_reentrant=False)


class TrainingBranch(Hazard):
    reason = "differs between train and eval"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if self.training else y


class DataDependent(Hazard):
    reason = "cannot be traced"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if y.sum() > 0 else y


class ScaledAdd(Hazard):
    def forward(self, x):
        return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


class SameOperandTwice(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)


class CircularPadding(Hazard):
    reason = "not the output of a plain Conv2d"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.bn(self.conv(x))


HAZARDS = [cls for cls in Hazard.__subclasses__()]


@pytest.mark.parametrize("cls", HAZARDS)
def test_hazards(cls: type[Hazard]) -> None:
    torch.manual_seed(0)
    stock = randomised(cls()).double()
    attributes = dict(stock.__dict__)
    ours = fuse(copy.deepcopy(stock))
    report = ours.fusion_report
    assert cls.reason is None or any(cls.reason in reason for _, reason in report.left), str(report)
    assert {k: v for k, v in ours.__dict__.items() if isinstance(v, (int, bool))} == {
        k: v for k, v in attributes.items() if isinstance(v, (int, bool))
    }
    for model in (ours, stock):
        random.seed(0)
        model.result = step(
            model, torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        )
    for a, b in zip(ours.result[0] + ours.result[1], stock.result[0] + stock.result[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours.calls == stock.calls


def test_an_input_that_stock_changes_in_place_is_changed() -> None:
    class Block(Hazard):
        def forward(self, x):
            x += self.bn(self.conv(x))
            return F.relu(x)

    stock = Block().eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(1, 4, 8, 8)
    changed, expected = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(ours(changed), stock(expected))
    torch.testing.assert_close(changed, expected)


def test_a_module_shared_by_two_parents() -> None:
    class Block(Hazard):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()
            self.b.conv = self.a.conv

        def forward(self, x):
            return self.b(self.a(x))

    stock = randomised(Pair()).double()
    ours = fuse(copy.deepcopy(stock))
    assert ours.a.conv is ours.b.conv
    assert len(ours.fusion_report.fused) == 2
    assert_same(ours, stock, torch.randn(2, 4, 8, 8, dtype=torch.float64))


# What stays as it was


def test_hooks_fire_with_the_values_of_stock() -> None:
    stock = randomised(torchvision.models.resnet18()).eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(1, 3, 64, 64)
    seen: dict[str, list[Tensor]] = {"stock": [], "ours": []}
    for name, model in (("stock", stock), ("ours", ours)):
        for path in ("bn1", "relu", "layer2.0.bn1", "layer2.0.downsample", "layer3.1.conv2", "layer3.1", "layer4"):
            hook = lambda m, args, out, n=name: seen[n].append(out.detach().clone())
            model.get_submodule(path).register_forward_hook(hook)
        with torch.no_grad():
            model(x)
    assert len(seen["ours"]) == len(seen["stock"]) == 8 - 1
    for a, b in zip(seen["ours"], seen["stock"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_changes_after_fusing_are_seen(calls: Counter[str]) -> None:
    stock = randomised(timm_model("resnet18")).eval()
    ours = fuse(copy.deepcopy(stock))
    for model in (stock, ours):
        model.fc = nn.Identity()
        model.layer1[0].act1 = nn.GELU()
        model.layer1[1].drop_block = nn.Hardtanh(-0.5, 0.5)
        model.layer2[0].downsample.append(nn.Tanh())
        model.layer3[0].downsample = nn.AvgPool2d(2, 2) if False else nn.Conv2d(128, 256, 1, 2)
        nn.init.constant_(model.layer3[0].downsample.weight, 0.01)
        nn.init.zeros_(model.layer3[0].downsample.bias)
        model.layer4[1].se = nn.Sigmoid()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)
    # layer1.1, layer2.0, layer3.0 and layer4.1 are not what was traced.
    assert calls == {"run_stem": 1, "run_units": 4}


def test_grad_checkpointing_switched_on_later_uses_the_original_forward(calls: Counter[str]) -> None:
    model = fuse(timm_model("resnet18"))
    model.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert calls["run_stem"] == 0
    model.set_grad_checkpointing(False)
    model(x)
    assert calls["run_stem"] == 1


def test_other_arguments_use_the_original_forward(calls: Counter[str]) -> None:
    class Net(Hazard):
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
    assert ours.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_copies_and_pickles_are_fused_and_carry_the_report(calls: Counter[str]) -> None:
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
    report = fuse(randomised(ConvWithTwoUsers())).fusion_report
    assert isinstance(report, FusionReport)
    assert "0 fused, 2 left" not in str(report)
    assert "left   bn  the output of conv is used elsewhere too" in str(report)


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


# Sequential


def test_sequential_fuses_its_neighbours_as_it_is(calls: Counter[str]) -> None:
    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    torch.manual_seed(0)
    stock = nn.Sequential(
        *layer(3, 8), nn.MaxPool2d(3, 2, 1), *layer(8, 8), *layer(8, 8)[:2], nn.BatchNorm2d(8), nn.ReLU()
    )
    stock = randomised(stock).double()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(ours, stock, x)
    assert calls == {"run_stem": 2, "run_units": 2, "run_bn_act": 2}
    assert ours.fusion_report.fused == [("", "Sequential: 4 pairs of neighbours (conv-bn, bn-relu)")]
    for change in (
        lambda m: m[:3],
        lambda m: m.append(nn.Tanh()),
        lambda m: m.insert(3, nn.Dropout(0.0)),
        lambda m: (m.__setitem__(1, nn.Identity()), m)[1],
        lambda m: m + nn.Sequential(nn.Sigmoid()),
    ):
        a, b = change(ours), change(stock)
        assert isinstance(a, nn.Sequential)
        torch.testing.assert_close(a(x), b(x), rtol=1e-10, atol=1e-10)
    assert repr(ours) == repr(stock)
    assert isinstance(copy.deepcopy(ours), nn.Sequential)
    assert type(unfuse(ours)) is nn.Sequential


def test_sequential_in_a_parent_that_cannot_be_traced(calls: Counter[str]) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = fuse(Net())
    assert [path for path, _ in model.fusion_report.fused] == ["body"]
    assert "cannot be traced" in model.fusion_report.left[0][1]
    model(torch.randn(2, 3, 8, 8))
    assert calls == {"run_units": 1}


# Other tools over a fused model


def test_tracing_tools_see_the_original_forward() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    stock = randomised(torchvision.models.resnet18()).eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(1, 3, 64, 64)
    expected = stock(x)
    ours_classes = [type(module) for module in ours.modules()]
    traced = fx.symbolic_trace(ours)
    assert str(traced.graph) == str(fx.symbolic_trace(stock).graph)
    taps = create_feature_extractor(ours, ["layer2.0.relu", "fc"])(x)
    for result in (traced(x), torch.jit.trace(ours, x)(x), torch.jit.script(ours)(x), taps["fc"], ours(x)):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert [type(module) for module in ours.modules()] == ours_classes


def test_feature_extractors_can_be_fused() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    stock = create_feature_extractor(randomised(torchvision.models.resnet18()), ["layer2", "fc"]).eval()
    ours = fuse(copy.deepcopy(stock).eval())
    assert len(ours.fusion_report.fused) >= 7
    x = torch.randn(1, 3, 64, 64)
    for name, value in stock(x).items():
        torch.testing.assert_close(ours(x)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torchvision-resnet18", "timm-resnet18", "tutorial101"])
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = fuse(randomised(NETWORKS[name]()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_export() -> None:
    model = fuse(randomised(TutorialResNet18(10))).eval()
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_synchronised_batch_norm_after_fusing() -> None:
    torch.manual_seed(0)
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(randomised(torchvision.models.resnet18()).double())
    ours = fuse(randomised(torchvision.models.resnet18()).double())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    ours.load_state_dict(stock.state_dict())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    assert_same(ours, stock, torch.randn(3, 3, 64, 64, dtype=torch.float64))


def test_weight_norm_and_parametrisations_after_fusing() -> None:
    torch.manual_seed(0)
    stock = randomised(torchvision.models.resnet18()).double()
    ours = fuse(copy.deepcopy(stock))
    for model in (stock, ours):
        torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
        torch.nn.utils.prune.l1_unstructured(model.layer2[0].conv2, "weight", 0.5)
    assert_same(ours, stock, torch.randn(3, 3, 64, 64, dtype=torch.float64))
