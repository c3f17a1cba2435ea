"""float32 in TF32, where PyTorch's setting allows it: not worse than stock PyTorch in TF32, against float64.

Processors multiply float32 as it is. Here the interpreter rounds what it multiplies (``interpreter.repair``), the launchers are
told to do as on a GPU, and stock's convolutions round their operands too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from block_cases import BLOCKS, check_block
from covariance_cases import Case, three
from interpreter import round_to_tf32
from test_covariance_accuracy import SWEEP, check, flagged_by
from test_workloads import NETWORKS
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

import resnet_fused
from resnet_fused.backends.operands import Conv
from resnet_fused.backends.triton import configs, conv3x3, cross_products, devices, dispatch, launching, products, trial
from resnet_fused.backends.triton.launching import product_precision
from resnet_fused.workloads import workloads

pytestmark = pytest.mark.one_in(10)

FP32 = torch.float32
SETTING = torch.backends.cudnn


def rounded(t: Tensor) -> Tensor:
    return torch.from_numpy(round_to_tf32(t.detach().numpy())) if t.dtype == FP32 else t.detach()


class RoundedConvolution(torch.autograd.Function):
    """What stock does on a GPU: each of the three products rounds its operands."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *options) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return _conv2d(rounded(x), rounded(weight), None, *options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = conv2d_input(x.shape, rounded(weight), rounded(grad), *ctx.options)
        return dx, conv2d_weight(rounded(x), weight.shape, rounded(grad), *ctx.options), *(None,) * len(ctx.options)


_conv2d = F.conv2d


def conv2d(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    assert bias is None
    return RoundedConvolution.apply(x, weight, stride, padding, dilation, groups)


def as_on_a_gpu(x: Tensor, exact: bool) -> str:
    return "ieee" if x.dtype != FP32 else "tf32x3" if exact else "tf32"


def tell_launchers(monkeypatch: pytest.MonkeyPatch, precision) -> None:
    for module in (products, cross_products, conv3x3, dispatch):
        monkeypatch.setattr(module, "product_precision", precision)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch):
    tell_launchers(monkeypatch, as_on_a_gpu)
    monkeypatch.setattr(F, "conv2d", conv2d)
    with resnet_fused.backend("triton"):
        yield


# The setting


@pytest.fixture
def _setting():
    before = SETTING.conv.fp32_precision
    yield
    SETTING.conv.fp32_precision = before


def test_the_setting_of_pytorch_counts(_setting):
    x = torch.empty(1, device="meta")
    assert [product_precision(x, exact) for exact in (False, True)] == ["tf32", "tf32x3"]  # PyTorch's default
    with SETTING.flags(enabled=True, allow_tf32=False):
        assert [product_precision(x, exact) for exact in (False, True)] == ["ieee", "ieee"]
    for precision, expected in (("ieee", "ieee"), ("tf32", "tf32")):
        SETTING.conv.fp32_precision = precision
        assert product_precision(x, False) == expected
    assert product_precision(x.bfloat16(), False) == product_precision(x.half(), True) == "ieee"
    assert product_precision(torch.empty(1), False) == "ieee"  # processors have no TF32


@pytest.mark.parametrize(("arch", "expected"), [(75, "ieee"), (80, "tf32"), (90, "tf32"), (120, "tf32")])
def test_what_a_gpu_has(monkeypatch, arch, expected):
    monkeypatch.setattr(launching, "describe", lambda device: devices.DEVICES["H200"].__class__(**fields(arch)))
    x = SimpleNamespace(dtype=FP32, is_meta=False, is_cuda=True, device=torch.device("cuda"))
    assert product_precision(x, False) == expected


def fields(arch: int) -> dict:
    return vars(devices.DEVICES["H200"]) | {"arch": arch}


# The interpreter


def test_the_interpreter_rounds(monkeypatch):
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, errors = torch.randn(16, 16, 1, 1), {}
    gold = _conv2d(x.double(), weight.double())
    for precision in ("ieee", "tf32x3", "tf32"):
        tell_launchers(monkeypatch, lambda x, exact: precision)  # noqa: B023
        errors[precision] = (products.fprop(x, weight, Conv(), False)[0] - gold).abs().max().item()
    assert errors["ieee"] < 4e-6 and errors["tf32x3"] < 8e-6 and 1e-4 < errors["tf32"] < 1e-2
    assert torch.equal(rounded(torch.tensor([1 + 2**-11, 1 + 2**-12])), torch.tensor([1 + 2**-10, 1.0]))
    assert rounded(torch.tensor([float("inf"), float("nan")])).isfinite().sum() == 0


# Accuracy

HARD = [key for key in SWEEP if key[0] != "γ"]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("point", HARD, ids=["-".join(point) for point in HARD])
def test_the_covariance_plan(tf32, point):
    case = SWEEP[point]
    check(Case(**vars(case) | {"rows": (2, 12, 12), "channels": (16, 64)}), FP32)


def test_one_product_would_not_do_where_statistics_come_from_a_covariance(tf32, monkeypatch):
    """A gradient with a mean: what is taken from ``dzᵀA`` is larger than what stays."""
    tell_launchers(monkeypatch, lambda x, exact: as_on_a_gpu(x, False))
    with pytest.raises(AssertionError, match="dweight: error"):
        check(Case(gradient_mean=10, rows=(2, 12, 12), channels=(16, 64)), FP32)


@pytest.mark.parametrize(("case", "expected"), [(Case(), 0), (Case(mean=1), 0), (Case(delta=1e-4), 64)])
def test_which_channels_are_flagged(tf32, case, expected):
    """Those that Cov, summed in float32, cannot tell as well as stock's rounded products: κ > 512, not κ > 2⁴⁴."""
    case = Case(**vars(case) | {"rows": (2, 12, 12), "channels": (16, 64)})
    assert flagged_by(lambda: three(case, FP32)[0], dispatch.TritonKernels) == [expected]


def test_the_tuner_expects_of_tf32_what_it_can_give(monkeypatch):
    """And of three products what float32 gives."""
    tell_launchers(monkeypatch, as_on_a_gpu)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        found = list(workloads(NETWORKS["bottleneck"](), 2, 32, FP32, True))
    for precision in ("tf32", "tf32x3"):
        kernels = ("fprop1x1", "dgrad1x1", "wgrad1x1")
        some = [w for w in found if w.kernel in kernels and configs.precision_of(w.shape) == precision]
        smallest = {w.kernel: w for w in sorted(some, key=lambda w: -w.flops)}
        assert set(smallest) == set(kernels)
        accuracies = [trial.Trial(workload, torch.device("cpu")).accuracy() for workload in smallest.values()]
        assert all(accuracy.is_right for accuracy in accuracies)
        assert (max(accuracy.ours for accuracy in accuracies) > 1e-5) == (precision == "tf32")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tf32, name, training):
    check_block(name, training, FP32, "triton")


def test_nan_and_inf_stay_what_they_are(tf32):
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1], x[0, 5, 2, 2] = float("nan"), float("inf")
    weight = torch.randn(32, 16, 1, 1)
    found = products.fprop(x, weight, Conv(), False)[0]
    stock = _conv2d(rounded(x), rounded(weight))
    assert torch.equal(found.isnan(), stock.isnan()) and torch.equal(found.isinf(), stock.isinf())
