"""Sequentials, and other tools over a fused model: fx, jit, compile, export, SyncBatchNorm, parametrisations."""

from __future__ import annotations

import copy

import pytest
import torch
from fuse_cases import NETWORKS, assert_same, count_calls, randomised, torchvision
from torch import fx, nn
from torch.nn.utils import prune
from tutorial_networks import TutorialResNet18

from resnet_fused.convert import fuse, unfuse

# Sequential


def test_sequential_fuses_its_neighbours_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)

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
    assert ours.fusion_report.fused == [
        ("", "stem: 0 → 1 → 2 → 3 (neighbours)"),
        ("", "conv-bn: 4 → 5 → 6 → 7 → 8 (neighbours)"),
        ("", "bn-relu: 9 → 10 (neighbours)"),
    ]
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


def test_sequential_in_a_parent_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)

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
        # Unstructured pruning flattens the weight with view, which PyTorch refuses for channels_last.
        prune.ln_structured(model.layer2[0].conv2, "weight", 0.5, n=2, dim=0)
    assert_same(ours, stock, torch.randn(3, 3, 64, 64, dtype=torch.float64))
