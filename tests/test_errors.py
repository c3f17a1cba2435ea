"""Bad inputs: the functions name the argument, the modules say what stock PyTorch says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from chain_cases import CASES, Stem, StockAddReLU, StockBNReLU, StockConvBNReLU, StockStem, tv
from torch import Tensor, nn

import resnet_fused
from resnet_fused import functional, native

X = torch.randn(2, 4, 5, 5)
W = torch.randn(6, 4, 3, 3)
V6 = (torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6))
V4 = (torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))


def _conv(x=X, w=W, vectors=V6, **options) -> Callable[[], Tensor]:
    return lambda: functional.conv_bn_relu(x, w, *vectors, **options)


def _bn(x=X, vectors=V4, **options) -> Callable[[], Tensor]:
    return lambda: functional.bn_relu(x, *vectors, **options)


def _with(vectors: tuple, i: int, value) -> tuple:
    return (*vectors[:i], value, *vectors[i + 1 :])


BAD_CALLS = {
    "x: not a tensor": (_conv([1.0]), TypeError, r"x: .*Tensor.*list"),
    "x: 3-D": (_conv(X[0]), ValueError, r"x: .*4-D.*\(4, 5, 5\)"),
    "x: 5-D": (_bn(X[None]), ValueError, r"x: .*4-D"),
    "x: integers": (_conv(X.int()), TypeError, r"x: .*int32"),
    "x: complex": (_bn(X.to(torch.complex64)), TypeError, r"x: .*complex64"),
    "x: channels": (_conv(X[:, :3]), ValueError, r"x: expected 4 channels.*got 3"),
    "x: channels of groups": (_conv(groups=2), ValueError, r"x: expected 8 channels.*groups=2.*got 4"),
    "x: smaller than the filter": (_conv(X[..., :2, :2]), ValueError, r"x: .*smaller than the filter"),
    "weight: dtype": (_conv(w=W.double()), TypeError, r"weight: expected dtype torch.float32.*float64"),
    "weight: half": (_conv(X.bfloat16()), TypeError, r"weight: expected dtype torch.bfloat16.*float32"),
    "weight: 2-D": (_conv(w=W[..., 0, 0]), ValueError, r"weight: .*4-D"),
    "weight: device": (_conv(w=W.to("meta")), ValueError, r"weight: expected device cpu"),
    "bn_weight: shape": (_conv(vectors=V4), ValueError, r"bn_weight: expected shape \(6,\), got \(4,\)"),
    "bn_bias: shape": (_conv(vectors=_with(V6, 1, torch.ones(1, 6))), ValueError, r"bn_bias: expected shape"),
    "bn_bias: None": (_conv(vectors=_with(V6, 1, None)), ValueError, r"bn_bias: .*None"),
    "weight of bn_relu": (_bn(vectors=V6), ValueError, r"weight: expected shape \(4,\)"),
    "bias: dtype": (_bn(vectors=_with(V4, 1, torch.zeros(4).int())), TypeError, r"bias: expected dtype.*int32"),
    "running_mean: None in eval": (_bn(vectors=_with(V4, 2, None)), ValueError, r"running_mean: .*None"),
    "running_var: None in eval": (_conv(vectors=_with(V6, 3, None)), ValueError, r"running_var: .*None"),
    "running_var: shape": (_bn(vectors=_with(V4, 3, torch.ones(5))), ValueError, r"running_var: expected shape"),
    "running_var: device": (
        _bn(vectors=_with(V4, 3, torch.ones(4, device="meta"))),
        ValueError,
        r"running_var: .*device",
    ),
    "eps: negative": (_bn(eps=-1.0), ValueError, r"eps: .*>= 0.*-1"),
    "eps: NaN": (_conv(eps=float("nan")), ValueError, r"eps: .*nan"),
    "stride: zero": (_conv(stride=0), ValueError, r"stride: .*>= 1.*0"),
    "stride: three": (_conv(stride=(1, 1, 1)), ValueError, r"stride: .*pair"),
    "stride: fraction": (_conv(stride=(1.5, 1)), ValueError, r"stride: .*1\.5"),
    "padding: negative": (_conv(padding=-1), ValueError, r"padding: .*>= 0"),
    "dilation: zero": (_conv(dilation=(1, 0)), ValueError, r"dilation: .*>= 1"),
    "groups: zero": (_conv(groups=0), ValueError, r"groups: .*0"),
    "groups: no divisor": (_conv(groups=4), ValueError, r"groups: .*divisor of the 6.*4"),
    "residual: shape": (_conv(residual=X), ValueError, r"residual: expected shape \(2, 6, 3, 3\), got \(2, 4, 5, 5\)"),
    "residual: dtype": (_conv(residual=torch.ones(2, 6, 3, 3).double()), TypeError, r"residual: expected dtype"),
    "residual: identity that does not fit": (_conv(residual=X, padding=1), ValueError, r"residual: expected shape"),
    "residual of bn_add_relu": (
        lambda: functional.bn_add_relu(X, X[:1], *V4),
        ValueError,
        r"residual: expected shape \(2, 4, 5, 5\), got \(1, 4, 5, 5\)",
    ),
    "residual: None": (lambda: functional.bn_add_relu(X, None, *V4), TypeError, r"residual: expected a Tensor"),
    "a: integers": (lambda: functional.add_relu(X.long(), X), TypeError, r"a: .*int64"),
    "b: shape": (lambda: functional.add_relu(X, X[:, :1]), ValueError, r"b: expected shape"),
    "b: dtype": (lambda: functional.add_relu(X, X.half()), TypeError, r"b: expected dtype"),
    "b: device": (lambda: functional.add_relu(X, X.to("meta")), ValueError, r"b: expected device"),
    "one value per channel": (
        _conv(X[:1, :, :3, :3], training=True),
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 6, 1, 1\]\)",
    ),
    "one value per channel, bn": (_bn(X[:1, :, :1, :1], training=True), ValueError, r"more than 1 value per channel"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_functions_name_the_argument(name: str) -> None:
    call, error, pattern = BAD_CALLS[name]
    with pytest.raises(error, match=pattern):
        call()


def test_a_refused_call_leaves_the_running_statistics_alone() -> None:
    mean, var = torch.zeros(6), torch.ones(6)
    with pytest.raises(ValueError, match="residual"):
        functional.conv_bn_relu(X, W, V6[0], V6[1], mean, var, residual=X, training=True)
    assert not mean.any() and (var == 1).all()


def test_empty_batch_in_functions(backend: str) -> None:
    empty = X[:0].clone().requires_grad_()
    assert functional.conv_bn_relu(empty, W, *V6).shape == (0, 6, 3, 3)
    assert functional.bn_relu(empty, *V4).shape == empty.shape
    assert functional.bn_add_relu(empty, empty, *V4).shape == empty.shape
    functional.add_relu(empty, empty).sum().backward()
    assert empty.grad.shape == empty.shape


# Modules: whatever stock PyTorch does or says


def outcome(call: Callable[[], Tensor]) -> tuple:
    """Shape, dtype and device of the result, or type and message of the error."""
    try:
        out = call()
    except Exception as error:
        return type(error), str(error)
    return tuple(out.shape), out.dtype, out.device


def _downsample(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], int]] = {
    "ConvBNReLU": (lambda: resnet_fused.ConvBNReLU(8, 6, 3), lambda: StockConvBNReLU(8, 6, 3), 1),
    "BNReLU2d": (lambda: resnet_fused.BNReLU2d(8), lambda: StockBNReLU(8), 1),
    "BNAddReLU2d": (lambda: resnet_fused.BNAddReLU2d(8), lambda: StockBNReLU(8), 2),
    "AddReLU": (resnet_fused.AddReLU, StockAddReLU, 2),
    "BasicBlock": (lambda: resnet_fused.BasicBlock(8, 8), lambda: tv.BasicBlock(8, 8), 1),
    "BasicBlock projection": (
        lambda: resnet_fused.BasicBlock(8, 16, 2, _downsample()),
        lambda: tv.BasicBlock(8, 16, 2, _downsample()),
        1,
    ),
    "BasicBlock with a shortcut that does not fit": (
        lambda: resnet_fused.BasicBlock(8, 16, 2, _downsample(12)),
        lambda: tv.BasicBlock(8, 16, 2, _downsample(12)),
        1,
    ),
    "BasicBlock without its shortcut": (lambda: resnet_fused.BasicBlock(8, 16), lambda: tv.BasicBlock(8, 16), 1),
    "Bottleneck": (lambda: resnet_fused.Bottleneck(8, 2), lambda: tv.Bottleneck(8, 2), 1),
    "stem": (lambda: Stem(8), lambda: StockStem(8), 1),
}
x8 = torch.randn(2, 8, 6, 6)
INPUTS = {
    "right": x8,
    "wrong channels": x8[:, :5],
    "one channel": x8[:, :1],
    "3-D": x8[0],
    "2-D": x8[0, 0],
    "double": x8.double(),
    "half": x8.half(),
    "bfloat16": x8.bfloat16(),
    "int": x8.long(),
    "empty batch": x8[:0],
    "no pixels": x8[..., :0],
    "one value": x8[:1, :, :1, :1],
    "meta": x8.to("meta"),
    "None": None,
    "a list": [1.0],
}


@pytest.mark.parametrize("label", INPUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_modules_do_what_stock_does(name: str, label: str) -> None:
    make_ours, make_stock, count = PAIRS[name]
    x = INPUTS[label]
    if name == "stem" and isinstance(x, Tensor) and label != "wrong channels" and x.dim() > 2:
        x = x.narrow(-3, 0, min(3, x.shape[-3]))
    for training in (True, False):
        results = []
        for make in (make_ours, make_stock):
            torch.manual_seed(0)
            module = make().train(training)
            before = [b.clone() for b in module.buffers()]
            found = outcome(lambda module=module: module(*[x] * count))
            moved = [not torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True)]
            results.append((found, moved if not isinstance(found[0], type) else None))
        assert results[0] == results[1]


@pytest.mark.parametrize("label", ["other shape", "broadcast", "double", "int", "None", "scalar"])
@pytest.mark.parametrize("name", ["BNAddReLU2d", "AddReLU", "ConvBNReLU"])
def test_residuals_do_what_stock_does(name: str, label: str) -> None:
    make_ours, make_stock, _ = PAIRS[name]
    fit = torch.randn(2, 6, 4, 4) if name == "ConvBNReLU" else torch.randn(2, 8, 6, 6)
    residual = {
        "other shape": fit[..., 1:],
        "broadcast": fit[:1, :, :1, :1],
        "double": fit.double(),
        "int": fit.int(),
        "None": None,
        "scalar": torch.tensor(2.0),
    }[label]
    if label == "None" and name == "BNAddReLU2d":
        pytest.skip("stock has no counterpart: its residual is optional, ours is required to be a tensor")
    results = []
    for make in (make_ours, make_stock):
        torch.manual_seed(0)
        module = make()
        results.append(outcome(lambda module=module: module(x8, residual)))
    assert results[0] == results[1]


@pytest.mark.parametrize("change", ["no affine", "no statistics", "half norm", "double conv"])
@pytest.mark.parametrize("name", ["conv", "bn", "basic", "bottleneck-projection"])
def test_unusual_parameters_do_what_stock_does(name: str, change: str) -> None:
    results = []
    for module in CASES[name].pair():
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                if change == "no affine":
                    child.affine, child.weight, child.bias = False, None, None
                elif change == "no statistics":
                    child.track_running_stats = False
                    child.running_mean = child.running_var = child.num_batches_tracked = None
                elif change == "half norm":
                    child.half()
            elif isinstance(child, nn.Conv2d) and change == "double conv":
                child.double()
        inputs = [x.detach() for x in CASES[name].inputs(torch.float32, torch.contiguous_format)]
        results.append([outcome(lambda m=m, inputs=inputs: m(*inputs)) for m in (module.train(), module.eval())])
    assert results[0] == results[1]


# Backends


def test_unknown_backend() -> None:
    for call in (resnet_fused.set_backend, lambda name: resnet_fused.backend(name).__enter__()):
        with pytest.raises(ValueError, match=r"expected one of auto, aten.*got 'tpu'"):
            call("tpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name: str) -> None:
    if name in resnet_fused.available_backends():
        pytest.skip(f"{name} is available here")
    reason = resnet_fused.unavailable_backends()[name]
    with pytest.raises(RuntimeError) as error, resnet_fused.backend(name):
        pass
    assert name in str(error.value) and reason in str(error.value)


def test_the_backend_is_restored() -> None:
    from resnet_fused.backends import choose

    before = choose(X.device)
    with pytest.raises(KeyError), resnet_fused.backend("aten"):
        assert choose(X.device) == "aten"
        raise KeyError
    assert choose(X.device) == before


@pytest.mark.parametrize(
    "value, expected", [("tpu", "expected one of auto"), ("cuda", "is not available"), ("aten", "")]
)
def test_environment_variable(value: str, expected: str) -> None:
    code = "import torch, resnet_fused.backends as b; print(b.choose(torch.device('cpu')))"
    environment = {**os.environ, "RESNET_FUSED_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    if expected:
        assert done.returncode and "RESNET_FUSED_BACKEND" in done.stderr and expected in done.stderr
    else:
        assert done.returncode == 0 and done.stdout.strip() == "aten"


def test_an_unknown_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.is_loaded():
        pytest.skip(f"no compiled kernels: {native.status()}")
    monkeypatch.setenv(native.CAPABILITY_VARIABLE, "avx3")
    monkeypatch.setattr(native, "_register_fakes", lambda: None)
    with pytest.warns(
        UserWarning, match=r"RESNET_FUSED_CPU_CAPABILITY: expected one of baseline, .*got 'avx3'; ignored"
    ):
        assert native._load() == "loaded"
