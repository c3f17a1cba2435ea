"""optimize_for_inference against the eval model: dtypes, layouts, NaN, shapes, state, hazards of the data flow."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import folded, optimize_for_inference
from resnet_fused.folded import FoldedConv2d
from resnet_fused.testing import assert_as_accurate, import_torchvision, randomise_norms

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def torchvision_resnet18() -> nn.Module:
    return import_torchvision().models.resnet18()


def timm_model(name: str, **options: object) -> nn.Module:
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, **options)


class Tiny(nn.Module):
    """Stem, identity block with bottleneck, block with projection, a head: every pattern, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.layer1 = resnet_fused.Bottleneck(16, 4)
        self.layer2 = resnet_fused.BasicBlock(16, 32, 2, shortcut)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layer2(self.layer1(x)), 1), 1))


class Functional(nn.Module):
    """In-place additions, functional ReLU and a tensor method; biased convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = F.relu(self.na(self.a(x)), inplace=True)
        z = self.nb(self.b(y))
        z += y
        z = z.relu()
        if scale is not None:
            z = z * scale
        return torch.relu(self.c(z) + z) + x


class Aliased(nn.Module):
    """Values that a fusion must not lose: an output used twice, an in-place ReLU on a shared value, x + x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        raw = self.a(x)
        shared = self.na(raw)
        y = self.nb(self.b(self.relu(shared)))
        y = y + shared
        late = self.c(y) + y
        twice = self.c(late)
        kept = y
        y = y + twice
        kept += 1
        return raw, shared, late, kept, y + y


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + x


class Branching(nn.Module):
    """Cannot be traced: it branches on its values. Its child can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > -1e9 else x


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, groups=8), nn.Identity(), nn.BatchNorm2d(8), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 16, 1, stride=2), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip


def prepared(make: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_norms(make()).eval()  # type: ignore[operator]


def check(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every output of the optimised model is as accurate as stock in ``dtype``; returns the optimised model."""
    optimised = optimize_for_inference(model, dtype)
    with torch.no_grad():
        gold = copy.deepcopy(model).double()(x.double())
        stock = copy.deepcopy(model).to(dtype)(x.to(dtype))
    ours = optimised(x)
    as_tuple = [t if isinstance(t, tuple) else (t,) for t in (ours, stock, gold)]
    for mine, theirs, exact in zip(*as_tuple, strict=True):
        assert not mine.requires_grad
        assert_as_accurate(mine, theirs, exact, ulps=64 if dtype == torch.float64 else 4)
    return optimised


def convolutions(model: nn.Module) -> list[FoldedConv2d]:
    return [m for m in model.modules() if isinstance(m, FoldedConv2d)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [Tiny, sequential], ids=lambda f: f.__name__)
def test_as_accurate_as_stock(make, dtype):
    check(prepared(make), torch.randn(2, 3, 48, 40), dtype)


@pytest.mark.parametrize("make", [Functional, Aliased, PreActivation], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_data_flow_is_respected(make, dtype):
    x = torch.randn(2, 8, 9, 7)
    before = x.clone()
    check(prepared(make), x, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchvision(dtype):
    check(prepared(torchvision_resnet18), torch.randn(2, 3, 40, 40), dtype)


def test_every_norm_of_a_resnet_is_folded():
    for model in (Tiny(), resnet_fused.fuse(torchvision_resnet18()), timm_model("resnet26d")):
        optimised = optimize_for_inference(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in optimised.modules())
        blocks = [m for m in model.modules() if type(m).__name__ in ("Bottleneck", "BasicBlock")]
        if blocks:
            assert sum(c.reuse_residual for c in convolutions(optimised)) == len(blocks)


@pytest.mark.parametrize("name", ["seresnet18", "regnetx_002", "resnetv2_18", "resnet10t"])
def test_timm(name):
    try:
        model = prepared(lambda: timm_model(name))
    except RuntimeError as error:
        pytest.skip(f"this timm has no {name}: {error}")
    check(model, torch.randn(2, 3, 64, 64))


def test_fused_model_and_own_layers():
    check(prepared(lambda: resnet_fused.fuse(torchvision_resnet18())), torch.randn(1, 3, 40, 40))
    layers = lambda: nn.Sequential(  # noqa: E731
        resnet_fused.ConvBNReLU(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), resnet_fused.BNReLU2d(8)
    )
    optimised = check(prepared(layers), torch.randn(1, 3, 8, 8))
    assert [c.relu for c in convolutions(optimised)] == [True, True]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norms_without_parameters_or_statistics(options):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU()).eval()
    optimised = check(model, torch.randn(2, 3, 8, 8))
    folds = "track_running_stats" not in options
    assert any(isinstance(m, nn.BatchNorm2d) for m in optimised.modules()) != folds


def test_infinite_statistics_are_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model[1].running_mean[3] = float("inf")
    assert any(isinstance(m, nn.BatchNorm2d) for m in optimize_for_inference(model).modules())


def test_frozen_batch_norm():
    frozen = import_torchvision().ops.FrozenBatchNorm2d
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen(8), nn.ReLU()).eval()
    for buffer in model[1].buffers():
        buffer.uniform_(0.5, 2)
    optimised = check(model, torch.randn(1, 3, 8, 8))
    assert len(list(optimised.network.children())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_and_image_sizes_in_both_layouts(dtype):
    model = prepared(Tiny)
    optimised = optimize_for_inference(model, dtype)
    stock = copy.deepcopy(model).to(dtype)
    for shape in [(1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 64, 64), (5, 3, 17, 90), (1, 3, 7, 7), (1, 3, 32, 32)]:
        x = torch.randn(shape)
        with torch.no_grad():
            exact, theirs = copy.deepcopy(model).double()(x.double()), stock(x.to(dtype))
        ours = optimised(x)
        assert_as_accurate(ours, theirs, exact, ulps=4)
        assert torch.equal(ours, optimised(x.to(memory_format=torch.channels_last)))
        assert torch.equal(ours, optimised(x.flip(3).flip(3)))
    assert all(len(c._packed) <= folded.MAX_PACKED_SHAPES for c in convolutions(optimised))


def test_the_fast_path_is_taken():
    if not folded._has_onednn(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    optimised = optimize_for_inference(prepared(Tiny))
    x = torch.randn(1, 3, 32, 32)
    fast = optimised(x)
    assert all(len(c._packed) == 1 for c in convolutions(optimised))
    with torch.backends.mkldnn.flags(enabled=False):
        plain = optimised(x)
    torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_in_the_input(dtype, value):
    model = prepared(Tiny)
    features = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2)
    x = torch.randn(2, 3, 64, 64)
    x[1, 2, 5, 60] = value
    for network in (features, model):
        with torch.no_grad():
            stock = copy.deepcopy(network).to(dtype)(x.to(dtype))
        ours = optimize_for_inference(network, dtype)(x)
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isposinf(), stock.isposinf())
        assert stock[1].isnan().any() and stock[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["conv1.weight", "layer1.bn2.running_mean", "layer2.bn1.bias", "layer1.bn3.weight"])
def test_nan_and_infinity_in_the_state(name, value):
    model = prepared(Tiny)
    model.state_dict()[name].view(-1)[1] = value
    features = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2)
    x = torch.randn(1, 3, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            stock = copy.deepcopy(features).to(dtype)(x.to(dtype))
        assert torch.equal(optimize_for_inference(features, dtype)(x).isnan(), stock.isnan())


def test_source_is_untouched_and_may_be_training():
    model = prepared(Tiny)
    reference = model(torch.ones(2, 3, 32, 32)).detach()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    optimised = optimize_for_inference(model)
    torch.testing.assert_close(optimised(torch.ones(2, 3, 32, 32)), reference)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fused = resnet_fused.fuse(Tiny())
    kinds = [type(m) for m in fused.modules()]
    optimize_for_inference(fused)
    assert [type(m) for m in fused.modules()] == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_pickles_and_saved_models(dtype):
    optimised = optimize_for_inference(prepared(Tiny), dtype)
    x = torch.randn(2, 3, 32, 32)
    expected = optimised(x)
    file = io.BytesIO()
    torch.save(optimised, file)
    file.seek(0)
    copies = [copy.deepcopy(optimised), pickle.loads(pickle.dumps(optimised)), torch.load(file, weights_only=False)]
    other = optimize_for_inference(prepared(Tiny, seed=1), dtype)
    other(x)
    other.load_state_dict(optimised.state_dict())
    for copied in (*copies, other):
        assert torch.equal(copied(x), expected)
        with pytest.raises(RuntimeError, match="cannot be trained"):
            copied.train()


def test_no_gradients_and_no_training():
    optimised = optimize_for_inference(prepared(Tiny))
    with pytest.raises(RuntimeError, match="cannot be trained"):
        optimised.train()
    assert optimised.eval() is optimised and optimised.train(False) is optimised
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not optimised(x).requires_grad
    assert not any(p.requires_grad for p in optimised.parameters())
    assert not any(m.training for m in optimised.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert optimised(x).dtype == torch.float32


def test_inputs_are_cast():
    model = prepared(Tiny)
    x = torch.randn(1, 3, 32, 32)
    assert optimize_for_inference(model)(x.double()).dtype == torch.float32
    assert optimize_for_inference(model.bfloat16())(x).dtype == torch.bfloat16


def test_meta_device():
    optimised = optimize_for_inference(prepared(Tiny).to("meta"))
    assert optimised(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


def test_bad_inputs_say_what_is_wrong():
    model = prepared(Tiny)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        optimize_for_inference("resnet50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        optimize_for_inference(model, torch.int8)
    optimised = optimize_for_inference(model)
    with pytest.raises(TypeError, match="optimised already"):
        optimize_for_inference(optimised)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 4"):
        optimised(torch.randn(1, 4, 32, 32))
    assert optimised(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def test_what_cannot_be_traced_runs_as_it_is():
    model = prepared(Branching)
    optimised = check(model, torch.randn(1, 3, 32, 32))
    assert "TraceError" in optimised.left[""] and len(convolutions(optimised)) == 7

    class Hopeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Hopeless: TraceError"):
        optimize_for_inference(Hopeless())


def test_hooked_modules_are_not_folded():
    model = prepared(Tiny)
    seen = []
    model.layer1.bn2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    optimised = check(model, torch.randn(1, 3, 32, 32))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in optimised.modules()) == 1 and len(seen) == 3


def test_later_changes_of_the_source_are_not_seen():
    model = prepared(Tiny)
    x = torch.randn(1, 3, 32, 32)
    optimised = optimize_for_inference(model)
    expected = optimised(x)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(optimised(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_folding_rounds_once(dtype):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3).double(), randomise_norms(nn.BatchNorm2d(6)).double().eval()
    weight, bias = folded.fold(conv, bn, dtype)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    exact = conv.weight * scale.view(-1, 1, 1, 1), (conv.bias - bn.running_mean) * scale + bn.bias
    for mine, gold in zip((weight, bias), exact, strict=True):
        assert mine.dtype == dtype
        assert (
            (mine.double() - gold).abs() <= gold.abs() * torch.finfo(dtype).eps * (1 if dtype != torch.float64 else 4)
        ).all()


def test_torch_compile_runs_the_plain_path():
    optimised = optimize_for_inference(prepared(Tiny))
    x = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(optimised.network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), optimised(x))
