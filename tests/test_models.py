"""The ten builders against torchvision: names, shapes, initial values, attributes, errors, outputs and gradients."""

from __future__ import annotations

import copy
import inspect
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import models, networks
from resnet_fused.testing import import_torchvision

torchvision = import_torchvision()
tv = torchvision.models
BUILDERS = list(models.BUILDERS)
FAST = ["resnet18", "resnet50", "resnext50_32x4d"]
every_builder = pytest.mark.parametrize("name", BUILDERS)


def both(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's from one seed."""
    pair = []
    for source in (resnet_fused, tv):
        torch.manual_seed(0)
        pair.append(getattr(source, name)(**kwargs))
    return pair[0], pair[1]


# Structure


@every_builder
def test_keys_shapes_and_attributes(name: str) -> None:
    with torch.device("meta"):
        ours, stock = both(name)
    described = [[(key, t.shape, t.dtype) for key, t in model.state_dict().items()] for model in (ours, stock)]
    assert described[0] == described[1]
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in stock.named_parameters()]
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, attribute) == getattr(stock, attribute)
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in stock.named_modules()]
    for a, b in zip(ours.modules(), stock.modules(), strict=True):
        assert type(a).__name__ == type(b).__name__
        assert set(vars(a)) == set(vars(b))
        if isinstance(b, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear, nn.ReLU)):
            assert a.extra_repr() == b.extra_repr()
        if hasattr(b, "expansion"):
            assert (a.expansion, a.stride) == (b.expansion, b.stride)


@every_builder
def test_initial_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal from one seed; for the large networks the calls that draw the values are compared in place of the values."""
    if name in ("resnet18", "resnet50", "resnext50_32x4d"):
        ours, stock = both(name)
        for (key, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        return
    drawn: list[list] = []
    for function in ("kaiming_normal_", "constant_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(
            nn.init,
            function,
            lambda t, *a, _name=function, **k: drawn[-1].append((_name, tuple(t.shape), a, sorted(k.items()))) or t,
        )
    for source in (resnet_fused, tv):
        drawn.append([])
        with torch.device("meta"):
            getattr(source, name)()
    assert drawn[0] == drawn[1] and drawn[0]


def test_zero_init_residual_and_filters_in_stock_layout() -> None:
    for name in ("resnet18", "resnet50"):
        ours, stock = both(name, zero_init_residual=True, num_classes=7)
        for (key, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        convs = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.weight.is_contiguous() for m in convs)


def test_signatures() -> None:
    for name in ("ResNet", "BasicBlock", "Bottleneck"):
        source = tv.resnet if name != "ResNet" else tv
        ours, stock = (inspect.signature(getattr(s, name).__init__) for s in (resnet_fused, source))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in stock.parameters.values()
        ]
    for name in BUILDERS:
        parameters = inspect.signature(getattr(resnet_fused, name)).parameters
        assert list(parameters) == list(inspect.signature(getattr(tv, name)).parameters)
        assert getattr(resnet_fused, name).__name__ == name


@pytest.mark.parametrize("dilate", [(False, True, True), [False, False, True], (True, True, True), None])
def test_dilation_in_place_of_stride(dilate: tuple | None) -> None:
    ours, stock = both("resnet50", replace_stride_with_dilation=dilate, num_classes=3)
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(ours.double().eval()(x), stock.double().eval()(x), rtol=1e-8, atol=1e-8)
    assert [m.dilation for m in ours.modules() if isinstance(m, nn.Conv2d)] == [
        m.dilation for m in stock.modules() if isinstance(m, nn.Conv2d)
    ]


def test_other_norm_layers_take_the_plain_path() -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    ours, stock = both("resnet18", norm_layer=norm, num_classes=3)
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)


# Errors


ERRORS = {
    "groups in BasicBlock": ("resnet18", {"groups": 2}),
    "width in BasicBlock": ("resnet34", {"width_per_group": 128}),
    "dilation in BasicBlock": ("resnet18", {"replace_stride_with_dilation": (False, True, True)}),
    "two dilations": ("resnet50", {"replace_stride_with_dilation": (True, False)}),
    "four dilations": ("resnet50", {"replace_stride_with_dilation": [True] * 4}),
    "groups of resnext": ("resnext50_32x4d", {"groups": 16}),
    "width of resnext": ("resnext101_64x4d", {"width_per_group": 8}),
    "width of wide": ("wide_resnet50_2", {"width_per_group": 64}),
    "unknown argument": ("resnet50", {"colour": "red"}),
}


@pytest.mark.parametrize("label", ERRORS)
def test_errors_are_torchvisions(label: str) -> None:
    name, kwargs = ERRORS[label]
    said = []
    for source in (resnet_fused, tv):
        with pytest.raises(Exception) as error, torch.device("meta"):
            getattr(source, name)(**kwargs)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


def test_positional_weights_are_refused() -> None:
    with pytest.raises(TypeError):
        resnet_fused.resnet18({})


# Weights


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return tv.resnet18(num_classes=7).state_dict()


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert model.fc.out_features == 7


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "dict"])
def test_weights_from_a_file_or_a_dict(checkpoint: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == "dict":
        assert_holds(resnet_fused.resnet18(weights=checkpoint), checkpoint)
        return
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    assert_holds(resnet_fused.resnet18(weights=path), checkpoint)
    assert_holds(resnet_fused.resnet18(weights=str(path), num_classes=7), checkpoint)


def test_weights_conflicts(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes.*7.*got 10"):
        resnet_fused.resnet18(weights=checkpoint, num_classes=10)
    with pytest.raises((ValueError, KeyError, RuntimeError), match="missing|Missing|layer1"):
        resnet_fused.resnet50(weights=checkpoint)
    partial = {key: t for key, t in checkpoint.items() if key != "layer1.0.conv1.weight"}
    with pytest.raises((ValueError, KeyError, RuntimeError), match=r"layer1\.0\.conv1\.weight"):
        resnet_fused.resnet18(weights=partial)
    with pytest.raises(ValueError, match="no weights named 'BEST'"):
        resnet_fused.resnet18(weights="BEST")
    with pytest.raises(ValueError, match="ResNet50_Weights"):
        resnet_fused.resnet50(weights=tv.ResNet18_Weights.DEFAULT)
    with pytest.raises(FileNotFoundError):
        resnet_fused.resnet18(weights=tmp_path / "none.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged.pth"):
        resnet_fused.resnet18(weights=tmp_path / "damaged.pth")
    with pytest.raises(TypeError, match="weights must be"):
        resnet_fused.resnet18(weights=3)


# Accuracy


CLASSES = 10


def _case(name: str, dtype: torch.dtype, training: bool, seed: int) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    """Ours, stock and the float64 network with the same (rounded) values; an input."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 64, 64)
    stock = networks.stock_model(name, CLASSES)
    if training:
        networks.hold_clear_of_kinks(stock, seed)
    else:
        networks.calibrate(stock, x)
    stock = stock.to(dtype).train(training)
    ours = networks.copy_of(name, stock.state_dict(), CLASSES, fused=True).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return ours.train(training), stock, networks.double_copy(stock).train(training), x.to(dtype)


def _step(model: nn.Module, x: Tensor, backward: bool = True) -> dict[str, Tensor]:
    if not backward:
        with torch.inference_mode():
            return {"logits": model(x)}
    model.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    loss = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), torch.tensor([1, 7]))
    loss.backward()
    found = {"logits": out.detach(), "input": x.grad}
    found |= {key: p.grad for key, p in model.named_parameters()}
    return found | {key: b.clone() for key, b in model.named_buffers() if b.is_floating_point()}


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm-wise relative error per tensor."""
    gradients = [t for key, t in exact.items() if key.endswith(("weight", "bias"))] or [exact["logits"]]
    typical = torch.stack([t.square().sum() for t in gradients]).mean().sqrt().item()
    return {key: networks.relative_error(found[key], gold, 1e-3 * typical) for key, gold in exact.items()}


def _worst(ours: dict[str, float], stocks: list[dict[str, float]], dtype: torch.dtype) -> tuple[float, str]:
    """The worst tensor as a share of its limit, 2 × the worse layout of stock + 4 ulp; and a line about it."""
    floor = 4 * torch.finfo(dtype).eps
    limits = {key: 2 * max(stock[key] for stock in stocks) + floor for key in ours}
    key = max(ours, key=lambda key: ours[key] / limits[key])
    share = ours[key] / limits[key]
    return share, f"{key}: ours {ours[key]:.2e}, stock {(limits[key] - floor) / 2:.2e}, {share:.2f} of the limit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS]
)
def test_outputs_and_gradients(name: str, training: bool, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """One draw of the networks in the default suite; the median of three draws of the others.

    The error of one tensor out of hundreds is a noisy number: stock in channels_last exceeds this very limit against stock
    in NCHW. In the deepest networks stock's errors also depend on the number of threads. So the yardstick is the worst of
    stock's roundings: two layouts, and in the slow networks one thread and two.
    """
    if name in ("resnet101", "resnet152") and training and dtype == torch.bfloat16:
        reason = (
            "so deep that bfloat16 leaves little gradient to compare: stock's own worst tensors are off by more than "
            "themselves, and whose worst is worse is chance"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    shares = []
    for seed in range(1 if name in FAST or not training else 3):
        ours, stock, gold, x = _case(name, dtype, training, seed)
        # Evaluation has ordinary ReLUs, where rounding flips signs: outputs only. Its gradients are compared in float64.
        exact = _step(gold, x.double(), training)
        other = copy.deepcopy(stock).to(memory_format=torch.channels_last)
        found = _step(ours, x, training)
        stocks = []
        for threads in (1,) if name in FAST else (1, 2):
            torch.set_num_threads(threads)
            stocks.append(_step(stock, x, training))
            stocks.append(_step(other, x.contiguous(memory_format=torch.channels_last), training))
        torch.set_num_threads(1)
        assert found.keys() == exact.keys()
        share, line = _worst(_errors(found, exact), [_errors(side, exact) for side in stocks], dtype)
        print(f"{name} {dtype} seed {seed}: {line}")
        shares.append(share)
    assert statistics.median(shares) <= 1, shares


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_float64_equals_torchvision(backend: str, training: bool) -> None:
    """With ordinary ReLUs, every gradient, on both backends."""
    for name in ("resnet18", "resnet50"):
        ours, stock = both(name, num_classes=CLASSES)
        networks.calibrate(stock, torch.randn(2, 3, 40, 40))
        ours.load_state_dict(stock.state_dict())
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        a, b = (_step(model.double().train(training), x) for model in (ours, stock))
        for key, expected in b.items():
            assert networks.relative_error(a[key], expected, 1e-6) < 1e-9, (name, key)


def test_autocast_is_as_accurate_as_stock() -> None:
    torch.manual_seed(0)
    stock = networks.stock_model("resnet18", CLASSES)
    networks.hold_clear_of_kinks(stock)
    ours = networks.copy_of("resnet18", stock.state_dict(), CLASSES, fused=True)
    gold = networks.double_copy(stock)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 7])
    found = []
    for model in (ours, stock, gold):
        double = model is gold
        out = networks.training_step(
            model.train(), x.double() if double else x, target, torch.float64 if double else torch.bfloat16
        )
        found.append({"logits": out} | {key: p.grad for key, p in model.named_parameters()})
    assert found[0]["logits"].dtype == found[1]["logits"].dtype
    ours_error, stock_error = (_errors(side, found[2]) for side in found[:2])
    share, line = _worst(ours_error, [stock_error], torch.bfloat16)
    assert share <= 1, line
