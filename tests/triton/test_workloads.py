"""Which launches a network makes, and that a trial of each tells right from wrong."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from block_cases import narrow_network
from torch import Tensor, nn

import resnet_fused
from resnet_fused import backends, layers, models, networks
from resnet_fused.backends.triton import configs, cost, devices, tuning
from resnet_fused.backends.triton.dispatch import TritonKernels
from resnet_fused.backends.triton.recorder import Workload, without_launches
from resnet_fused.backends.triton.trial import Trial
from resnet_fused.workloads import workloads

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
H200 = devices.DEVICES["H200"]


def basic_network() -> nn.Module:
    """A ResNet of basic blocks; its first masks do not end on bytes."""
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=3)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                inputs = child.in_channels if child.in_channels == 3 else child.in_channels // 16
                geometry = child.kernel_size, child.stride, child.padding
                setattr(module, name, nn.Conv2d(inputs, child.out_channels // 16, *geometry, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features // 16))
    model.fc = nn.Linear(32, 3)
    return model


NETWORKS = {"bottleneck": lambda: resnet_fused.fuse(narrow_network()), "basic": basic_network}


def asked_by_a_real_step(network: nn.Module, dtype: torch.dtype, training: bool) -> dict[tuple, int]:
    """What a step asks of the tuning table when it runs, and how often: in training under autocast."""
    asked: dict[tuple, int] = {}

    def note(kernel: str, shape: dict[str, int], of: torch.dtype) -> None:
        key = kernel, tuple(sorted(shape.items())), of
        asked[key] = asked.get(key, 0) + 1

    x = torch.randn(2, 3, 32, 32)
    network = copy.deepcopy(network).train(training)
    with resnet_fused.backend("triton"), tuning.deciding(note):
        if training:
            networks.training_step(network, x, torch.tensor([0, 1]), dtype)
        else:
            with torch.no_grad():
                network.to(dtype)(x.to(dtype))
    return asked


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "name, dtype, training, own_conv3x3",
    [
        ("bottleneck", BF16, True, True),
        ("bottleneck", BF16, True, False),
        ("bottleneck", FP32, True, True),
        ("bottleneck", BF16, False, True),
        ("basic", BF16, True, True),
    ],
)
def test_workloads_are_what_a_step_launches(monkeypatch, name, dtype, training, own_conv3x3):
    monkeypatch.setattr(TritonKernels, "recompute_statistics", lambda self, *arguments: arguments[-2:])
    monkeypatch.setitem(backends._KERNELS, "triton", TritonKernels(own_conv3x3))
    network = NETWORKS[name]()
    found: dict[tuple, int] = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as on processors
        recorded = workloads(network, 2, 32, dtype, training, own_conv3x3)
    for workload, count in recorded.items():
        key = workload.kernel, tuple(sorted(workload.shape.items())), workload.dtype
        found[key] = found.get(key, 0) + count
    assert found == asked_by_a_real_step(network, dtype, training)


def test_launches_tell_the_table_what_they_read_and_write():
    """Launches that move other tensors have entries of their own."""
    flags: dict[str, set[str]] = {}
    for name, own_conv3x3 in itertools.product(NETWORKS, (True, False)):
        for w in workloads(NETWORKS[name](), 2, 32, BF16, True, own_conv3x3):
            on = (flag for flag, value in w.shape.items() if value and flag not in ("m", "c", "k", "h", "w", "stride"))
            flags.setdefault(w.kernel, set()).add(" ".join(on))
    assert {"pending mask c2", "pending residual mask", "stats"} <= flags["fprop1x1"]
    assert {"pending_grad residual", "masked feedback below", "masked feedback accumulate"} <= flags["dgrad1x1"]
    assert {"pending masked", "pending masked c2", "pending_grad"} <= flags["wgrad1x1"]
    assert {"pending stats", "stats"} == flags["fprop3x3"] and {"below", "pending_grad below"} == flags["dgrad3x3"]
    assert {"pending pending_grad", "pending", "pending_grad"} == flags["wgrad3x3"]
    assert {"", "residual", "residual mask"} == flags["bn_act"] and {"mask", "residual mask"} == flags["add_relu"]
    assert {"activation", "mask"} == flags["bn_backward_reduce"] and {"", "mask"} == flags["bn_backward"]


def test_float32_is_multiplied_as_in_pytorch():
    """In TF32 or not as its setting says, and in three products where statistics came from a covariance."""
    setting = torch.backends.cudnn.conv
    assert setting.fp32_precision == "tf32"
    rounded = workloads(NETWORKS["bottleneck"](), 2, 32, FP32, True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = workloads(NETWORKS["bottleneck"](), 2, 32, FP32, True)
    assert {configs.precision_of(w.shape) for w in exact} == {"ieee"} and not any(w.kernel == "gram" for w in exact)
    products = [w for w in rounded if w.kernel in configs.PRODUCTS]
    found = {(w.kernel, w.method, configs.precision_of(w.shape)) for w in products}
    plans = {"fprop_bn_act", "dgrad_bn_act", "dgrad_bn_act_below", "wgrad_bn_act", "gram"}
    assert {kernel for kernel, *_ in found} == set(configs.PRODUCTS)
    assert all(precision == ("tf32x3" if method in plans else "tf32") for _, method, precision in found)
    half = workloads(NETWORKS["bottleneck"](), 2, 32, BF16, True)
    assert {configs.precision_of(w.shape) for w in half} == {"ieee"}


@pytest.mark.parametrize("name", models.BUILDERS)
def test_every_network_has_workloads(name):
    with torch.device("meta"):
        network = models.BUILDERS[name]()
    training = workloads(network, 256, 224, BF16, True)
    assert {"fprop1x1", "pool", "bn_act"} <= {w.kernel for w in training}
    bounds = [w.roofline_seconds(H200) for w in training]
    assert all(bound > 0 for bound in bounds)
    assert 1e-3 < sum(bound * count for bound, count in zip(bounds, training.values())) < 0.2
    assert len(workloads(network, 256, 224, BF16, False)) < len(training)


def test_a_network_stays_as_it_is():
    network = basic_network().eval()
    before = {key: t.clone() for key, t in network.state_dict().items()}
    workloads(network, 2, 32, BF16, True)
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())


def test_only_meta_tensors_are_not_launched():
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    kernels = TritonKernels(True)
    expected = kernels.bn_stats(x)
    with without_launches():
        found = kernels.bn_stats(x)
        kernels.bn_stats(torch.empty_like(x, device="meta"))
    assert all(map(torch.equal, found, expected))


# Traffic and arithmetic


def only(found: dict[Workload, int], kernel: str, **flags: int) -> Workload:
    (workload,) = (w for w in found if w.kernel == kernel and all(w.shape.get(k, 0) == v for k, v in flags.items()))
    return workload


def test_traffic_and_flops():
    block = models.Bottleneck(64, 16, 2, nn.Sequential(nn.Conv2d(64, 64, 1, 2, bias=False), nn.BatchNorm2d(64)))
    found = workloads(nn.Sequential(nn.Conv2d(3, 64, 1), block), 4, 8, BF16, True)
    m, wide = 4 * 8 * 8, 4 * 4 * 4
    reduce = only(found, "fprop1x1", stats=1, stride=1)
    # x, the filter, y; mean and variance in float32
    assert reduce.traffic_bytes == 2 * (64 * m + 64 * 16 + 16 * m) + 4 * (2 * 16)
    assert reduce.flops == 2 * m * 64 * 16
    strided = only(found, "fprop1x1", stats=1, stride=2)
    assert strided.traffic_bytes == 2 * (64 * wide + 64 * 64 + 64 * wide) + 4 * (2 * 64)
    covariance = only(found, "gram", c=16)
    assert covariance.flops == wide * 16 * 17
    back = only(found, "dgrad1x1", c=16, feedback=1)
    assert back.flops == 2 * wide * (64 * 16 + 2 * 16 * 16)  # the coupling in two parts
    gradient = only(found, "wgrad1x1", c=64, k=16)
    # dy, x, dW in float32; not the filter
    assert gradient.traffic_bytes == 2 * (16 * m + 64 * m) + 4 * (16 * 64)
    assert only(found, "bn_backward_reduce", m=m).flops == 0


# Trials


@pytest.fixture(scope="module")
def of_every_method() -> list[Workload]:
    """The smallest workload of each method, in training and inference, of basic blocks and bottlenecks."""
    found: dict[tuple, Workload] = {}
    for make in NETWORKS.values():
        for training in (True, False):
            for workload in workloads(make(), 2, 32, BF16, training):
                key = workload.method, workload.kernel
                if key not in found or workload.traffic_bytes < found[key].traffic_bytes:
                    found[key] = workload
    return list(found.values())


def test_a_trial_of_every_method_is_right(of_every_method):
    assert {w.kernel for w in of_every_method} == set(configs.KERNELS)
    for workload in of_every_method:
        trial = Trial(workload, CPU)
        trial.call()  # what works in place must not spoil the inputs of the comparison
        found = trial.accuracy()
        assert found.is_right, (workload.method, workload.shape, found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=["float32", "float16"])
def test_trials_of_other_dtypes(dtype):
    for workload in list(workloads(NETWORKS["bottleneck"](), 2, 32, dtype, True))[-12:]:
        assert Trial(workload, CPU).accuracy().is_right, (workload.method, workload.shape)


class Residuals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return layers.run_add_act(x, x.mul(-0.5).requires_grad_(), torch.relu)


def test_a_residual_addition_alone():
    found = workloads(Residuals(), 2, 32, BF16, True)
    assert [(w.kernel, w.method) for w in found] == [("add_relu", "add_relu"), ("add_relu", "mask_grad")]
    assert all(Trial(w, CPU).accuracy().is_right for w in found)


def test_a_trial_launches_with_the_configuration_it_is_given(of_every_method, monkeypatch):
    (workload,) = (w for w in of_every_method if w.method == "fprop_stats" and w.kernel == "fprop1x1")
    seen = []
    chosen = tuning.choose
    monkeypatch.setattr(
        resnet_fused.backends.triton.products, "choose", lambda *question: seen.append(chosen(*question)) or seen[-1]
    )
    wide = cost.Config(32, 16, 32, 4, 1)
    trial = Trial(workload, CPU)
    assert trial.accuracy(wide).is_right and seen == [wide, wide]
    trial.call()
    assert seen[-1] != wide


@pytest.mark.parametrize(
    "method", ["fprop_stats", "dgrad", "wgrad", "gram", "bn_act_backward", "bn_act_", "fprop_bn_act"]
)
def test_a_planted_error_is_wrong(of_every_method, monkeypatch, method):
    workload = next(w for w in of_every_method if w.method == method)
    original = getattr(TritonKernels, method)

    def spoiled(self, *arguments):
        result = original(self, *arguments)
        written = arguments[0] if result is None else result[0] if isinstance(result, tuple) else result
        written[0] += 0.5
        return result

    monkeypatch.setattr(TritonKernels, method, spoiled)
    assert not Trial(workload, CPU).accuracy().is_right


@pytest.mark.parametrize("spoil", ["unwritten", "changing", "mask"])
def test_other_ways_to_be_wrong(monkeypatch, spoil):
    found = workloads(NETWORKS["bottleneck"](), 2, 32, BF16, True)
    *_, workload = (w for w in found if w.method == "fprop_bn_act")
    original, calls = TritonKernels.fprop_bn_act, []

    def spoiled(self, *arguments):
        out, mask = original(self, *arguments)
        calls.append(out)
        if spoil == "unwritten":
            out[0, 0] = torch.empty_like(out[0, 0])
        elif spoil == "changing":
            out[0, 0, 0, 0] += 2.0**-20 * out.abs().max() * len(calls) ** 8  # one unit or so in some run
        else:
            mask[0] ^= 1
        return out, mask

    monkeypatch.setattr(TritonKernels, "fprop_bn_act", spoiled)
    assert not Trial(workload, CPU).accuracy().is_right
    assert not torch.are_deterministic_algorithms_enabled()
