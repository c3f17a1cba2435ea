"""Which provider runs a folded convolution on a GPU, and that each is right: by formulas here, cuDNN's functions being fakes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from folded_cases import DTYPES, EPILOGUES, GEOMETRIES, as_on_a_gpu, check, check_network, question
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import backends, cuda_graphs, folded, folded_gpu, optimize_for_inference, routes
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.folded import FoldedConv2d
from resnet_fused.folded_gpu import PROVIDERS, Layer

FORMULAS = {"cudnn": AtenKernels()}


class AnyProduct(AtenKernels):
    def fprop_bn_act(self, products, shift, residual, relu, save_mask):
        (p,) = products
        bias = shift.to(p.a.dtype)
        return folded_gpu.plain(p.a, p.weight, bias, p.conv, residual, relu), torch.empty(0)


ALL = FORMULAS | {"triton": AnyProduct(), "cuda": AnyProduct()}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch):
    as_on_a_gpu(monkeypatch, FORMULAS)
    yield
    routes.reload()


def conv(size: int = 1, relu: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> FoldedConv2d:
    made = nn.Conv2d(8, 16, size, padding=size // 2, bias=bias).to(dtype)
    return FoldedConv2d(made, folded.fold(made, None), relu)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The providers that ran, by name."""
    found: list[str] = []
    for name, provider in PROVIDERS.items():

        def run(*args, name=name, provider=provider):
            found.append(name)
            return provider.run(*args)

        monkeypatch.setitem(PROVIDERS, name, folded_gpu.Provider(provider.applies, run, provider.spreads))
    return found


def choose(monkeypatch: pytest.MonkeyPatch, name: str | None) -> list[str]:
    """Makes ``name`` what was measured; returns the keys that are asked for."""
    keys: list[str] = []
    monkeypatch.setattr(routes, "measured", lambda key: keys.append(key) or name)
    return keys


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_providers(geometry, epilogue, dtype):
    cudnn = {"cudnn"} if EPILOGUES[epilogue][2] and dtype != torch.float64 else set()
    check(geometry, epilogue, dtype, cudnn | ({"space_to_depth"} if geometry == "stem" else set()))


@pytest.mark.parametrize(
    "name, runs, dtype",
    [
        pytest.param(name, runs, dtype, marks=[] if i == j else pytest.mark.slow)
        for i, (name, runs) in enumerate({"stock": 20, "space_to_depth": 1, "passes": 20, "cudnn": 15}.items())
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_a_network(monkeypatch, name, dtype, runs):
    # Without a ReLU are the stem, whose ReLU is behind the pooling, and the four projections.
    check_network(monkeypatch, name, dtype, 0 if name == "cudnn" and dtype == torch.float64 else runs)


def test_what_was_measured_runs(monkeypatch, ran):
    keys = choose(monkeypatch, "passes")
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    expected = layer(x)
    for _ in range(2):
        assert torch.equal(layer(x), expected)
    layer(x, torch.randn(2, 16, 5, 4))
    layer(torch.randn(1, 8, 3, 4))
    assert ran == ["passes"] * 5
    assert [key.split()[:5] for key in keys] == [
        ["folded", "float32", "m2^6", "5x4", "16x8x1x1/1:br"],
        ["folded", "float32", "m2^6", "5x4", "16x8x1x1/1:b+r"],
        ["folded", "float32", "m2^4", "3x4", "16x8x1x1/1:br"],
    ]


@pytest.mark.parametrize("name", [None, "space_to_depth", "triton", "a provider of another version"])
def test_what_was_not_measured_or_does_not_apply_is_stock(monkeypatch, ran, name):
    choose(monkeypatch, name)
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias).relu())
    assert ran == ["stock"]


def test_a_new_table_is_read(monkeypatch, ran):
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    choose(monkeypatch, None)
    layer(x)
    choose(monkeypatch, "passes")
    layer(x)
    routes.reload()
    layer(x)
    assert ran == ["stock", "stock", "passes"]


def test_geometry_and_epilogue_are_in_the_key():
    x = torch.Size((2, 8, 5, 4))
    keys = {
        made.layer().key(x, has_residual)
        for made in (conv(), conv(relu=False), conv(bias=False), conv(3), conv(dtype=torch.bfloat16))
        for has_residual in (False, True)
    }
    assert len(keys) == 10
    padded, unpadded = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
    described = [FoldedConv2d(c, folded.fold(c, None)).layer().describe(False) for c in (padded, unpadded)]
    assert described == ["8x8x3x3/1:b", "8x8x3x3/1p0,0:b"]


@pytest.mark.parametrize(
    "wish, size, expected",
    [("triton", 1, "triton"), ("triton", 3, "passes"), ("cuda", 3, "cuda"), ("aten", 1, "stock"), ("cpu", 1, "stock")],
)
def test_backends_of_the_user(monkeypatch, ran, wish, size, expected):
    monkeypatch.setattr(backends, "providers", lambda: ALL)
    monkeypatch.setattr(backends, "_current", wish)
    choose(monkeypatch, "passes")
    layer, x = conv(size, dtype=torch.bfloat16), torch.randn(2, 8, 5, 4).bfloat16()
    y = layer(x)  # contiguous: made channels_last before the provider is chosen
    assert ran == [expected]
    stock = F.conv2d(x, layer.weight, layer.bias, padding=size // 2).relu()
    torch.testing.assert_close(y, stock, rtol=0.02, atol=0.01)


def test_odd_channels_are_not_the_extensions(monkeypatch, ran):
    monkeypatch.setattr(backends, "providers", lambda: ALL)
    monkeypatch.setattr(backends, "_current", "cuda")
    made = nn.Conv2d(7, 16, 1).bfloat16()
    FoldedConv2d(made, folded.fold(made, None))(torch.randn(1, 7, 4, 4).bfloat16())
    assert ran == ["passes"]


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (16, 1, 1), (2, 16, 5, 4)])
def test_residuals_that_stock_broadcasts_or_promotes(monkeypatch, ran, shape):
    choose(monkeypatch, "passes")
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    residual = torch.randn(shape, dtype=torch.float64 if len(shape) == 4 and shape[0] == 2 else torch.float32)
    y = layer(x, residual)
    expected = (F.conv2d(x, layer.weight, layer.bias) + residual).relu()
    assert torch.equal(y, expected) and y.dtype == expected.dtype and ran == ["stock"]


def test_a_residual_is_not_written_over(monkeypatch):
    layer, x, residual = conv(), torch.randn(2, 8, 5, 4), torch.randn(2, 16, 5, 4)
    layer.reuse_residual = True
    for name in ("stock", "cudnn", "passes"):
        before = residual.clone()
        choose(monkeypatch, name)
        routes.reload()
        layer(x, residual)
        assert torch.equal(residual, before)


def test_inputs_that_stock_refuses(monkeypatch):
    choose(monkeypatch, "passes")
    layer = conv(3)
    with pytest.raises(RuntimeError, match=r"to have 8 channels, but got 4"):
        layer(torch.randn(1, 4, 8, 8))
    with pytest.raises(RuntimeError, match="dtype|type"):
        layer(torch.randn(1, 8, 8, 8).double())
    assert layer(torch.randn(0, 8, 6, 6)).shape == (0, 16, 6, 6)
    assert layer(torch.randn(8, 6, 6)).shape == (16, 6, 6)


def test_gradients_and_transforms_run_stock(monkeypatch, ran):
    choose(monkeypatch, "passes")
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    layer(x.clone().requires_grad_()).sum().backward()
    torch.func.vmap(layer)(x[None])
    assert ran == []
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert ran == ["passes"]


def test_deterministic_algorithms_are_not_cudnns_epilogue(monkeypatch):
    choose(monkeypatch, "cudnn")
    layer, x = conv(), torch.randn(2, 8, 5, 4)
    expected = layer(x)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.testing.assert_close(layer(x), expected)


# What layers make once


def test_vectors_are_made_once_and_follow_the_weights(monkeypatch):
    choose(monkeypatch, "passes")
    layer, x = conv(dtype=torch.bfloat16), torch.randn(2, 8, 5, 4).bfloat16()
    layer(x)
    first = layer.layer()
    assert first.shift.dtype == torch.float32 and first.shift is first.shift and layer.layer() is first
    layer.to(torch.bfloat16)
    assert layer.layer() is first  # nothing moved
    other = conv(dtype=torch.bfloat16)
    layer.load_state_dict(other.state_dict())
    assert layer._layer is None
    assert torch.equal(layer(x), other(x))
    layer.bias.zero_()
    assert not layer.layer().shift.any()
    layer.double()
    assert layer._layer is None and layer.layer().shift.dtype == torch.float64
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert made._layer is None and torch.equal(made(x.double()), layer(x.double()))


def test_the_deep_filter_is_made_once(monkeypatch):
    made, _ = (
        [],
        monkeypatch.setattr(
            "resnet_fused.backends.recast.deep_filter",
            lambda w, of=folded_gpu.recast.deep_filter: made.append(w) or of(w),
        ),
    )
    choose(monkeypatch, "space_to_depth")
    stem = nn.Conv2d(3, 8, 7, 2, 3)
    layer = FoldedConv2d(stem, folded.fold(stem, None), True)
    x = torch.randn(1, 3, 16, 16)
    for _ in range(2):
        torch.testing.assert_close(layer(x), stem(x).relu())
    assert len(made) == 1


def test_nothing_that_a_recording_makes_is_kept(monkeypatch):
    layer = conv(dtype=torch.bfloat16).layer()
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda: True)
    assert layer.shift is not layer.shift
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda: False)
    assert layer.shift is layer.shift


def test_layers_made_in_inference_mode(monkeypatch):
    choose(monkeypatch, "passes")
    x = torch.randn(2, 3, 8, 8)
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    with torch.inference_mode():
        optimised = optimize_for_inference(source)
        expected = optimised(x)
    assert torch.equal(optimised(x), expected)


def test_a_wrong_provider_is_found(monkeypatch):
    def without_bias(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        return folded_gpu.plain(x, layer.weight, None, layer.conv, residual, layer.relu)

    monkeypatch.setitem(PROVIDERS, "passes", folded_gpu.Provider(lambda x, layer: True, without_bias))
    with pytest.raises(AssertionError):
        check("pointwise", "all", torch.float32, {"cudnn"})
    assert question("pointwise", "all", torch.float32).name == "2x16x5x7 24x16x1x1/1:b+r"
