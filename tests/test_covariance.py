"""The covariance plan in every mode: gradients, what is saved, who chooses it. Accuracy: test_covariance_accuracy.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from chain_cases import StockConvBNReLU, norms, run, tv
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import backends, functional
from resnet_fused.layers import run_units
from resnet_fused.plans import choice
from resnet_fused.plans.choice import choose_plans
from resnet_fused.plans.spec import Chain, Conv, Shortcut, Tail, Unit


def _projection(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


class BiasedUnits(nn.Module):
    """Two units with biased convolutions, the second one expanding and strided, around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(6, 11, 1, (2, 1)), nn.BatchNorm2d(11, momentum=None)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        units = [(self.conv1, self.bn1, F.relu), (self.conv2, self.bn2, None)]
        return run_units(x, units, residual=residual, act=F.relu)


class StockBiasedUnits(BiasedUnits):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + residual)


def _block(kind: str, inplanes: int, planes: int, stride: int = 1, project: bool = False, **kwargs):
    def make(source: object) -> nn.Module:
        torch.manual_seed(0)
        block = getattr(source, kind)
        width = planes * block.expansion
        downsample = _projection(inplanes, width, stride) if project else None
        return block(inplanes, planes, stride, downsample, **kwargs)

    return lambda: make(resnet_fused), lambda: make(tv)


def _conv(*args, **kwargs):
    return lambda: resnet_fused.ConvBNReLU(*args, **kwargs), lambda: StockConvBNReLU(*args, **kwargs)


# name: (ours, stock), shapes of the inputs, units of the chain that follow the covariance plan under "auto"
CASES = {
    "conv": (_conv(7, 19, 1), [(2, 7, 5, 6)], 1),
    "conv-no-relu": (_conv(8, 24, 1, relu=False), [(2, 8, 5, 6)], 1),
    "conv-strided": (_conv(7, 19, 1, (2, 3)), [(2, 7, 5, 6)], 1),
    "conv-residual": (_conv(7, 19, 1, 2), [(2, 7, 5, 6), (2, 19, 3, 3)], 1),
    "biased": ((BiasedUnits, StockBiasedUnits), [(2, 5, 5, 4), (2, 11, 3, 4)], 1),
    "bottleneck": (_block("Bottleneck", 12, 3), [(2, 12, 5, 6)], 1),
    "bottleneck-projection": (_block("Bottleneck", 7, 5, project=True), [(2, 7, 5, 6)], 2),
    "bottleneck-strided": (_block("Bottleneck", 9, 4, 2, project=True), [(2, 9, 5, 6)], 2),
    "bottleneck-narrowing-projection": (_block("Bottleneck", 20, 4, 2, project=True), [(2, 20, 5, 6)], 1),
    "bottleneck-grouped": (_block("Bottleneck", 16, 4, groups=2), [(2, 16, 5, 6)], 1),
    "bottleneck-dilated": (_block("Bottleneck", 12, 3, dilation=2), [(2, 12, 5, 6)], 1),
    "bottleneck-wide": (_block("Bottleneck", 16, 4, base_width=128), [(2, 16, 5, 6)], 1),
    "basic-projection": (_block("BasicBlock", 6, 13, 2, project=True), [(2, 6, 5, 6)], 1),
}
every_case = pytest.mark.parametrize("name", CASES)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and stock in float64 with norms that are not the identity."""
    (make_ours, make_stock), _, _ = CASES[name]
    ours, stock = make_ours().double(), make_stock().double()
    resnet_fused.testing.randomise_norms(stock, torch.Generator().manual_seed(3))
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def inputs_of(name: str) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in CASES[name][1]]


def set_mode(module: nn.Module, mode: str) -> None:
    """ "last" freezes the last norm, "others" all the others, as "first" the first."""
    module.train(mode != "eval")
    found = norms(module)
    for norm in {"last": found[-1:], "others": found[:-1], "first": found[:1]}.get(mode, []):
        norm.eval()


MODES = ["train", "eval", "last", "others", "first"]


def unit(out: int, inside: int, filter_size: int = 1, training: bool = True, **geometry) -> Unit:
    weight = torch.randn(out, inside // geometry.get("groups", 1), filter_size, filter_size)
    gamma, beta, mean, var = (torch.rand(out) + 0.5 for _ in range(4))
    parameters = [t.requires_grad_() for t in (weight, gamma, beta)]
    return Unit(parameters[0], None, *parameters[1:], mean, var, Conv(**geometry), training, True, 1e-5)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@every_case
@pytest.mark.parametrize("wish", choice.CHOICES)
@pytest.mark.parametrize("mode", MODES)
def test_float64_equals_stock(backend: str, name: str, mode: str, wish: str) -> None:
    ours, stock = pair(name)
    set_mode(ours, mode), set_mode(stock, mode)
    with resnet_fused.covariance(wish):
        for _ in range(2):  # running statistics over two steps
            a, b = run(ours, inputs_of(name)), run(stock, inputs_of(name))
        assert_same(a, b)


@every_case
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend: str, name: str, mode: str) -> None:
    ours, _ = pair(name)
    set_mode(ours, mode)
    inputs = inputs_of(name)
    count = len(inputs)
    assert gradcheck(lambda *t: ours(*t[:count]), (*inputs, *ours.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", ["bottleneck-strided", "basic-projection", "conv-residual"])
@pytest.mark.parametrize("mode", ["train", "last"])
def test_gradcheck_every_entry_of_the_jacobian(backend: str, name: str, mode: str) -> None:
    ours, _ = pair(name)
    set_mode(ours, mode)
    inputs = [x.detach()[:, :, :3, :4].clone().requires_grad_() for x in inputs_of(name)[:1]]
    residual = [torch.randn(2, 19, 2, 2, dtype=torch.float64)] if name == "conv-residual" else []
    assert gradcheck(lambda x, *_: ours(x, *residual), (*inputs, *ours.parameters()))


@pytest.mark.parametrize("name", ["conv-strided", "bottleneck-projection"])
def test_double_backward(backend: str, name: str) -> None:
    ours, _ = pair(name)
    assert gradgradcheck(lambda *t: ours(t[0]), (*inputs_of(name), *ours.parameters()), fast_mode=True)


@every_case
@pytest.mark.parametrize("mode", ["train", "eval", "last"])
def test_gradients_of_subsets(backend: str, name: str, mode: str) -> None:
    """Each tensor alone, and everything but it: the gradients that are asked for, and no other."""
    ours, stock = pair(name)
    set_mode(ours, mode), set_mode(stock, mode)
    inputs = inputs_of(name)
    everything = run(stock, inputs)
    names = [key for key in everything if key.endswith("grad")]
    for alone in names:
        for wanted in ([alone], [key for key in names if key != alone]):
            for key, parameter in ours.named_parameters():
                parameter.requires_grad_(f"{key} grad" in wanted)
            for i, x in enumerate(inputs):
                x.requires_grad_(f"input {i} grad" in wanted)
            found = run(ours, inputs)
            assert [key for key in found if key.endswith("grad")] == wanted
            for key in wanted:
                torch.testing.assert_close(found[key], everything[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["conv", "bottleneck-strided", "basic-projection"])
def test_norms_of_different_eps_and_momentum(backend: str, name: str) -> None:
    ours, stock = pair(name)
    for i, (a, b) in enumerate(zip(norms(ours), norms(stock), strict=True)):
        a.eps = b.eps = (1e-5, 0.3, 1e-2)[i % 3]
        a.momentum = b.momentum = (None, 0.7, 0.01)[i % 3]
    for _ in range(3):
        a, b = run(ours, inputs_of(name)), run(stock, inputs_of(name))
    assert_same(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_and_nested_blocks(backend: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    make = [_block("Bottleneck", 6, 3, 2, project=True), _block("Bottleneck", 12, 3)]
    ours = nn.Sequential(make[0][0](), nn.Sequential(make[1][0]())).double()
    stock = nn.Sequential(make[0][1](), nn.Sequential(make[1][1]())).double()
    ours.load_state_dict(stock.state_dict())
    checkpointed = copy.deepcopy(ours)
    checkpointed.forward = lambda x: checkpoint(  # type: ignore[method-assign]
        lambda t: nn.Sequential.forward(checkpointed, t), x, use_reentrant=use_reentrant
    )
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = run(stock, [x])
    assert_same(run(ours, [x]), expected)
    found = run(checkpointed, [x])
    # A checkpoint runs the forward twice, and so does stock's: the running statistics move twice.
    assert_same(
        {k: v for k, v in found.items() if k in expected and ("grad" in k or k == "out")},
        {k: v for k, v in expected.items() if "grad" in k or k == "out"},
    )


def test_one_value_per_channel_is_refused_as_in_stock(backend: str) -> None:
    ours, stock = pair("conv")
    x = torch.randn(1, 7, 1, 1, dtype=torch.float64)
    messages = []
    for module in (ours, stock):
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            module(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# The traps of autograd


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(project: bool, training: bool, backend: str) -> None:
    x = torch.randn(2, 6, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    units = [unit(4, 6, training=training), unit(9, 4, training=training)]
    if project:
        units.append(unit(9, 6, training=training))
    shortcut = Shortcut.PROJECTION if project else Shortcut.NONE
    chain = choose_plans(Chain(tuple(units), shortcut, Tail.RELU))
    assert [u.covariance for u in chain.units[1:]] == [True] * (1 + project)
    parameters, running, spec, eps = chain.flatten()
    args = (x, None, parameters, running, spec, eps, True, backend)
    torch.library.opcheck(torch.ops.resnet_fused.chain.default, args)
    with torch.no_grad():
        out, *saved = torch.ops.resnet_fused.chain(*args)
    for need in (True, False):
        needs = [need, False, *[True] * len(parameters)]
        detached = [t.detach() for t in parameters]
        args = (torch.ones_like(out), x.detach(), detached, saved, spec, eps, needs, backend)
        torch.library.opcheck(torch.ops.resnet_fused.chain_backward.default, args)


def test_transforms_take_the_plain_path(backend: str) -> None:
    """torch.func.grad, jvp and fx: an operator with an autograd formula fails, is silently wrong, or loses its backward."""
    ours, stock = (module.eval() for module in pair("bottleneck-projection"))
    x = inputs_of("bottleneck-projection")[0].detach()
    results = []
    for module in (ours, stock):
        gradient = torch.func.grad(lambda t, m=module: m(t).square().sum())(x)
        tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
        results.append({"grad": gradient, "jvp": tangent})
    assert_same(*results)
    traced = torch.fx.symbolic_trace(ours)
    y = x.clone().requires_grad_()
    traced(y).sum().backward()
    z = x.clone().requires_grad_()
    stock(z).sum().backward()
    torch.testing.assert_close(y.grad, z.grad)


def test_no_zero_filled_gradients_for_what_is_saved(backend: str) -> None:
    ours, _ = pair("bottleneck-projection")
    out = ours(inputs_of("bottleneck-projection")[0])
    with torch.profiler.profile(record_shapes=True) as profile:
        out.sum().backward()
    filled = [e for e in profile.events() if e.name == "aten::zeros" and len(e.input_shapes[0]) == 4]
    assert not filled


def test_autocast_casts_the_input_and_the_filters_alone(backend: str) -> None:
    """Batch norm's parameters and running statistics stay float32, and so do all gradients."""
    ours = resnet_fused.Bottleneck(8, 4, 1, _projection(8, 16, 1))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    kernels = type(backends.get(backend))
    patch = mock.patch.object(kernels, "fprop_bn_act", autospec=True, side_effect=kernels.fprop_bn_act)
    with patch as fprop, torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    _, products, shift, *_ = fprop.call_args.args
    for product in products:
        assert (out.dtype, product.a.dtype, product.weight.dtype) == (torch.bfloat16,) * 3
        assert (product.scale.dtype, shift.dtype) == (torch.float32,) * 2
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in [x, *ours.parameters()])


def test_buffers_may_change_before_the_backward(backend: str) -> None:
    """Training moves the running statistics at once; frozen ones may be edited, and the saved copies count."""
    for mode in ("train", "eval"):
        ours, stock = pair("bottleneck-projection")
        set_mode(ours, mode), set_mode(stock, mode)
        x, y = (inputs_of("bottleneck-projection")[0] for _ in range(2))
        stock(y).sum().backward()
        out = ours(x)
        with torch.no_grad():
            for norm in norms(ours):
                norm.running_mean.add_(1)
                norm.running_var.mul_(2)
        out.sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


def test_an_edit_through_data_is_seen_at_once(backend: str) -> None:
    """``p.data`` edits leave no version: nothing derived from a filter or a statistic may be kept between calls."""
    ours, stock = (module.eval() for module in pair("bottleneck-projection"))
    x = inputs_of("bottleneck-projection")[0].detach()
    ours(x)
    for module in (ours, stock):
        module.conv3.weight.data.mul_(1.5)
        module.bn3.running_var.data.add_(0.7)
        module.downsample[1].weight.data.neg_()
    torch.testing.assert_close(ours(x), stock(x))


# What is saved


def saved_by(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Every tensor that the forward hands to autograd, parameters left out."""
    own = {p.data_ptr() for p in module.parameters()}
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(*inputs)
    return [t for t in found if t.data_ptr() not in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_bottleneck_saves_its_input_two_raw_outputs_bits_and_moments(backend: str, dtype: torch.dtype) -> None:
    ours = resnet_fused.Bottleneck(32, 8).to(dtype)
    x = torch.randn(2, 32, 6, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    moments = torch.float64 if dtype == torch.float32 else torch.float32
    expected = [
        ("x", (2, 32, 6, 5), dtype),
        ("statistics", (2, 8 + 8 + 32), torch.float32),
        ("y1", (2, 8, 6, 5), dtype),
        ("y2", (2, 8, 6, 5), dtype),
        ("moments", (8 + 36,), moments),
        ("mask", (2 * 32 * 30 // 8,), torch.uint8),
    ]
    found = [(tuple(t.shape), t.dtype) for t in saved_by(ours, [x])]
    assert found == [(shape, kind) for _, shape, kind in expected]


def test_a_projection_adds_only_its_moments(backend: str) -> None:
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    block = resnet_fused.Bottleneck(16, 8, 2, _projection(16, 32, 2))
    shapes = [tuple(t.shape) for t in saved_by(block, [x])]
    assert shapes == [(2, 16, 6, 6), (2, 80), (2, 8, 6, 6), (2, 8, 3, 3), (8 + 36,), (16 + 136,), (2 * 32 * 9 // 8,)]


def test_nothing_is_saved_beside_autograd(backend: str) -> None:
    """The context of the block's node holds no tensor but the saved ones."""
    out = resnet_fused.Bottleneck(32, 8)(torch.randn(2, 32, 4, 4, requires_grad=True))
    node = out.grad_fn
    kept = [value for key, value in vars(node).items() if key != "saved_tensors"]
    assert not any(isinstance(t, Tensor) for value in kept for t in (value if isinstance(value, list) else [value]))


def test_frozen_statistics_save_no_moments(backend: str) -> None:
    block = resnet_fused.Bottleneck(32, 8).eval()
    shapes = [tuple(t.shape) for t in saved_by(block, [torch.randn(2, 32, 4, 4, requires_grad=True)])]
    assert (8 + 36,) not in shapes and len(shapes) == 5


# Choice


def planned(*units: Unit, shortcut: Shortcut = Shortcut.NONE, tail: Tail = Tail.RELU) -> list[bool]:
    return [u.covariance for u in choose_plans(Chain(units, shortcut, tail)).units]


def test_expanding_pointwise_convolutions_are_chosen() -> None:
    assert planned(unit(32, 8)) == [True]
    assert planned(unit(32, 8, stride=(2, 2))) == [True]
    for other in (unit(8, 8), unit(8, 32), unit(32, 8, 3), unit(32, 8, groups=4), unit(32, 8, padding=(1, 1))):
        assert planned(other) == [False]
    assert planned(unit(1024, 256)) == [True]
    assert planned(unit(1024, 257)) == [False]
    assert planned(unit(32, 8), tail=Tail.RELU_MAXPOOL) == [False]
    # Inside a path an activation would be kept in place of a raw output.
    assert planned(unit(32, 8), unit(64, 32)) == [False, True]
    assert planned(unit(16, 8, 3), unit(16, 8), shortcut=Shortcut.PROJECTION) == [False, True]


def test_the_choice_does_not_depend_on_the_batch() -> None:
    """Neither in the modules nor in what they are asked to run: one exported graph serves every batch."""
    block = resnet_fused.Bottleneck(16, 4)
    specs = []
    with mock.patch.object(torch.ops.resnet_fused, "chain", wraps=torch.ops.resnet_fused.chain) as operator:
        for n, size in ((1, 3), (2, 8), (64, 4)):
            block(torch.randn(n, 16, size, size))
            specs.append(operator.call_args.args[4])
    assert specs[0] == specs[1] == specs[2]


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    with resnet_fused.covariance("never"):
        assert planned(unit(32, 8)) == [False]
        with resnet_fused.covariance("always"):
            assert planned(unit(8, 8)) == planned(unit(8, 32)) == planned(unit(1024, 257)) == [True]
            assert planned(unit(32, 8, groups=4)) == planned(unit(32, 8, 3)) == [False]
        assert planned(unit(32, 8)) == [False]
    assert planned(unit(32, 8)) == [True]
    with pytest.raises(ValueError, match="set_covariance: expected one of auto, always, never, got 'off'"):
        resnet_fused.set_covariance("off")
    monkeypatch.setattr(choice, "_current", None)
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "never")
    assert planned(unit(32, 8)) == [False]
    monkeypatch.setattr(choice, "_current", None)
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "perhaps")
    with pytest.raises(ValueError, match="RESNET_FUSED_COVARIANCE"):
        planned(unit(32, 8))


def test_a_backward_follows_the_plan_of_its_forward(backend: str) -> None:
    ours, stock = pair("bottleneck-projection")
    x, y = inputs_of("bottleneck-projection")[0], inputs_of("bottleneck-projection")[0]
    out = ours(x)
    with resnet_fused.covariance("never"):
        out.sum().backward()
    stock(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_fused_networks_follow_it(source: str, backend: str) -> None:
    if source == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        stock = timm.create_model("resnet26", num_classes=5)
    else:
        stock = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=5)
    stock = stock.double()
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    kernels = type(backends.get(backend))
    with mock.patch.object(kernels, "gram", autospec=True, side_effect=kernels.gram) as gram:
        a = run(ours, [x.clone().requires_grad_()])
    # Bottlenecks of the first three stages, and the projections of the first two; the others have too many channels.
    assert gram.call_count == (3 if source == "torchvision" else 6) + 2
    b = run(stock, [x.clone().requires_grad_()])
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


# Planted errors


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-strided", "conv-strided", "basic-projection"])
@pytest.mark.parametrize("plant", ["mask", "coupling", "moments", "stride"])
def test_a_planted_error_is_found(backend: str, monkeypatch: pytest.MonkeyPatch, plant: str, name: str) -> None:
    kernels = type(backends.get(backend))
    wgrad, dgrad, gram = kernels.wgrad_bn_act, kernels.dgrad_bn_act, kernels.gram
    planted: dict[str, Callable] = {
        "mask": lambda self, grad, mask, operands: wgrad(self, grad, None, operands),
        "coupling": lambda self, grad, mask, weight, conv, feedback, acc=None: dgrad(
            self, grad, mask, weight, conv, None, acc
        ),
        "moments": lambda self, a, conv: (gram(self, a, conv)[0], gram(self, a, conv)[1] * 1.001),
        "stride": lambda self, a, conv: gram(self, a, Conv()),
    }
    if plant == "stride" and "strided" not in name:
        pytest.skip("nothing strides here")
    if plant == "mask" and name == "basic-projection":
        pytest.skip("both norms of the sum share the mask of the other plan's kernels; covered by the others")
    method = {"mask": "wgrad_bn_act", "coupling": "dgrad_bn_act"}.get(plant, "gram")
    monkeypatch.setattr(kernels, method, planted[plant])
    ours, stock = pair(name)
    with pytest.raises(AssertionError):
        assert_same(run(ours, inputs_of(name)), run(stock, inputs_of(name)))


def test_functional_uses_it(backend: str) -> None:
    kernels = type(backends.get(backend))
    x, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(24, 8, 1, 1, requires_grad=True)
    vectors = [torch.ones(24), torch.zeros(24), torch.zeros(24), torch.ones(24)]
    with mock.patch.object(kernels, "fprop_bn_act", autospec=True, side_effect=kernels.fprop_bn_act) as fprop:
        functional.conv_bn_relu(x, weight, *vectors, training=True)
    assert fprop.call_count == 1
