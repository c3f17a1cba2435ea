"""The fused operators inside autograd: transforms, double backward, what is saved, registrations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stock_pairs import assert_same, assert_same_step, blocks, images, networks, projection, step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import resnet_fused
from resnet_fused import backends
from resnet_fused.backends import Conv
from resnet_fused.layers import run_stem, run_units
from resnet_fused.plans.spec import Chain, Shortcut, Tail, Unit


def _noise(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(requires_grad)


# Transforms


@pytest.mark.parametrize("project", [True, False])
def test_per_sample_gradients(project: bool) -> None:
    found = []
    xs = _noise(3, 4, 7, 9)
    for block in blocks(project=project):
        block.eval()
        state = {name: t.detach() for name, t in block.state_dict().items()}
        parameters = {name: state.pop(name) for name, _ in block.named_parameters()}

        def loss(parameters, x, block=block, state=state):
            return functional_call(block, (parameters, state), (x[None],)).square().sum()

        found.append(vmap(grad(loss), (None, 0))(parameters, xs))
    assert_same(*found)


@pytest.mark.parametrize("module", ["block", "network", "bn", "bn-add", "add"])
def test_jvp(module: str) -> None:
    results = []
    for ours in (True, False):
        model, args = _differentiated(module, ours)
        tangents = tuple(torch.ones_like(x) * 0.3 for x in args)
        out, tangent = jvp(model, args, tangents)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(*map(forward_ad.make_dual, args, tangents)))
        results.append({"out": out, "tangent": tangent, "dual": dual.primal, "dual tangent": dual.tangent})
    assert_same(*results)
    assert results[0]["tangent"].abs().max() > 0


def _differentiated(name: str, ours: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if name == "network":
        return networks()[0 if ours else 1].eval(), (images(),)
    if name == "block":
        return blocks()[0 if ours else 1].eval(), (_noise(2, 4, 7, 9),)
    a, b = _noise(2, 4, 5, 5), _noise(2, 4, 5, 5)
    if name == "add":
        return (resnet_fused.AddReLU() if ours else lambda a, b: F.relu(a + b)), (a, b)
    bn = nn.BatchNorm2d(4).double().eval()
    if name == "bn":
        return (resnet_fused.BNReLU2d(4).double().eval() if ours else lambda x: F.relu(bn(x))), (a,)
    return (resnet_fused.BNAddReLU2d(4).double().eval() if ours else lambda x, r: F.relu(bn(x) + r)), (a, b)


@pytest.mark.parametrize("how", ["reentrant", "early stop", "to the end"])
def test_checkpointing(how: str) -> None:
    """The same gradients and statistics; but an early stop spares the last chain its second update."""
    results = []
    for model in networks():
        for stage in (model.layer1, model.layer2):
            forward = stage.forward
            stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=how == "reentrant")
        with set_checkpoint_early_stop(how == "early stop"):
            found = step(model, images())
        results.append({name: t for name, t in found.items() if how != "early stop" or "grad" in name})
    assert_same(*results)


# Double backward


def _gradgrad(kind: str, training: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if kind == "stem":
        conv, bn = nn.Conv2d(2, 3, 3, 2, 1, bias=False).double(), nn.BatchNorm2d(3).double().train(training)
        inputs = (_noise(2, 2, 9, 9, requires_grad=True),)
        return (lambda x: run_stem(x, conv, bn, F.relu, nn.MaxPool2d(3, 2, 1))), inputs
    if kind == "add":
        inputs = (_noise(2, 3, 4, 4, requires_grad=True), _noise(2, 3, 4, 4, requires_grad=True))
        return resnet_fused.AddReLU(), inputs
    if kind == "bn-add":
        inputs = (_noise(2, 3, 4, 4, requires_grad=True), _noise(2, 3, 4, 4, requires_grad=True))
        return resnet_fused.BNAddReLU2d(3).double().train(training), inputs
    if kind == "bias":
        conv, bn = nn.Conv2d(2, 3, 3).double(), nn.BatchNorm2d(3).double().train(training)
        return (lambda x: run_units(x, [(conv, bn, F.relu)])), (_noise(2, 2, 6, 6, requires_grad=True),)
    block = blocks(project=kind == "projection")[0].train(training)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(block, {"conv1.weight": weight}, (x,))

    return run, (_noise(2, 4, 5, 5, requires_grad=True), block.conv1.weight.detach().requires_grad_())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["identity", "projection", "stem", "bias", "bn-add", "add"])
def test_gradcheck_and_gradgradcheck(kind: str, training: bool) -> None:
    run, inputs = _gradgrad(kind, training)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty(training: bool) -> None:
    results = []
    for model in networks():
        x = images().requires_grad_()
        out = model.train(training)(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad is not None
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad})
    assert_same(*results)


def test_double_backward_counts_a_shared_filter_once() -> None:
    conv, first, second = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for module in (conv, first, second):
        module.double()
    x = _noise(2, 3, 5, 5)

    def ours(x: Tensor) -> Tensor:
        return run_units(x, [(conv, first, F.relu), (conv, second, F.relu)])

    def stock(x: Tensor) -> Tensor:
        return F.relu(second(conv(F.relu(first(conv(x))))))

    gradients = []
    for run in (ours, stock):
        for create_graph in (False, True):
            out = run(x).square().sum()
            gradients.append(torch.autograd.grad(out, conv.weight, create_graph=create_graph)[0].detach())
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[-1])


# Which gradients, which statistics


_FROZEN: dict[str, Callable[[str], bool]] = {
    "filters": lambda name: "conv" in name or "downsample.0" in name,
    "norms": lambda name: "bn" in name or "downsample.1" in name,
    "all but layer4": lambda name: not name.startswith(("layer4", "fc")),
    "all": lambda name: True,
    "first filters": lambda name: "conv1" in name,
    "norm weights": lambda name: "bn" in name and name.endswith("weight"),
    "downsample": lambda name: "downsample" in name,
    "main path": lambda name: "downsample" not in name,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("frozen", _FROZEN)
@pytest.mark.parametrize("training", [True, False])
def test_subset_of_gradients(frozen: str, training: bool) -> None:
    ours, stock = networks()
    for model in (ours, stock):
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not _FROZEN[frozen](name))
    assert_same_step(ours, stock, images())
    if frozen != "all":
        for model in (ours, stock):
            model.zero_grad()
            model(images()).square().sum().backward()
        assert_same(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, stock)))


@pytest.mark.parametrize("which", ["bn1", "bn2", "bn", "downsample.1"])
def test_frozen_statistics_in_training(which: str) -> None:
    ours, stock = networks()
    for model in (ours, stock):
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and which in name:
                module.eval()
    assert_same_step(ours, stock, images())


def test_momentum_none_and_zero() -> None:
    for momentum in (None, 0.0, 1.0):
        ours, stock = networks()
        for module in (*ours.modules(), *stock.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for seed in range(2):
            assert_same_step(ours, stock, images(seed=seed))


def test_buffers_may_change_between_forward_and_backward() -> None:
    results = []
    for model in networks():
        out = model(images())
        model(images(seed=7))
        out.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()))
    assert_same(*results)

    ours, stock = (m.eval() for m in networks())
    expected = step(stock, images())
    out = ours(images())
    for buffer in ours.buffers():
        buffer.add_(1)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"{name} grad"])


def test_changed_filters_between_forward_and_backward_raise() -> None:
    for model in networks():
        out = model(images())
        with torch.no_grad():
            model.layer1[0].conv2.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


_EDITED = ["conv1.weight", "layer1.0.bn1.weight", "layer2.0.downsample.1.running_var", "layer3.0.bn2.bias"]


@pytest.mark.parametrize("name", _EDITED)
def test_edits_are_seen_at_once(name: str) -> None:
    ours, stock = (m.eval() for m in networks())
    with torch.no_grad():
        before = ours(images())
        for edit in (lambda t: t.data.add_(0.3), lambda t: t.mul_(1.5), lambda t: t.copy_(t.abs() + 0.1)):
            for model in (ours, stock):
                edit(model.state_dict(keep_vars=True)[name])
            torch.testing.assert_close(ours(images()), stock(images()))
    assert not torch.allclose(before, ours(images()))


def test_inference_mode_and_anomaly_mode() -> None:
    ours, stock = (m.eval() for m in networks())
    with torch.inference_mode():
        torch.testing.assert_close(ours(images()), stock(images()))
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_step(ours.train(), stock.train(), images())


def test_input_is_never_written() -> None:
    ours, _ = blocks(project=False)
    x = _noise(2, 4, 5, 5)
    before = x.clone()
    ours(x)
    with torch.no_grad():
        ours.eval()(x)
    assert torch.equal(x, before)


# Memory


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    found: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), x)}
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return sum(found.values())


def test_saves_less_than_stock() -> None:
    ours, stock = networks((2, 2, 2, 2), dtype=torch.float32)
    x = images(size=64, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert _saved_bytes(ours, x) < 0.75 * _saved_bytes(stock, x)


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zero" in str(func) and isinstance(out, Tensor):
            self.zeros.append(tuple(out.shape))
        return out


def test_no_zero_filled_gradients_for_what_is_saved() -> None:
    ours, _ = blocks()
    out = ours(_noise(2, 4, 9, 9, requires_grad=True))
    with _Recorded() as recorded:
        out.sum().backward()
    assert not [shape for shape in recorded.zeros if len(shape) == 4]


# The operators' registrations

_CHAINS = {
    "conv": ((4,), Shortcut.NONE, Tail.RELU),
    "identity": ((3, 3), Shortcut.IDENTITY, Tail.RELU),
    "tensor": ((4, 5), Shortcut.TENSOR, Tail.RELU),
    "projection": ((4, 5), Shortcut.PROJECTION, Tail.RELU),
    "no relu": ((4, 5), Shortcut.PROJECTION, Tail.NONE),
    "stem": ((4,), Shortcut.NONE, Tail.RELU_MAXPOOL),
    "bn": ((), Shortcut.TENSOR, Tail.RELU),
}


def _unit(inside: int, outside: int, kernel: int, training: bool) -> Unit:
    vectors = [torch.rand(outside) + 0.5 for _ in range(4)]
    weight = torch.randn(outside, inside, kernel, kernel).requires_grad_() if kernel else None
    conv = Conv((1, 1), (kernel // 2, kernel // 2)) if kernel else None
    gamma, beta = vectors[0].requires_grad_(), vectors[1].requires_grad_()
    return Unit(weight, None, gamma, beta, vectors[2], vectors[3], conv, training, True, 1e-5)


def _chain(name: str, training: bool) -> tuple[Tensor, Tensor | None, Chain]:
    widths, shortcut, tail = _CHAINS[name]
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    units, inside = [], 3
    for outside in widths:
        units.append(_unit(inside, outside, 3, training))
        inside = outside
    units = units or [_unit(3, 3, 0, training)]
    if shortcut == Shortcut.PROJECTION:
        units.append(_unit(3, inside, 1, training))
    residual = torch.randn(2, inside, 5, 6).requires_grad_() if shortcut == Shortcut.TENSOR else None
    return x, residual, Chain(tuple(units), shortcut, tail)


_CHECKED = [(name, True, "auto") for name in _CHAINS]
_CHECKED += [("projection", False, "auto"), ("stem", False, "auto"), ("projection", True, "aten")]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "training", "chosen"), _CHECKED)
def test_opcheck_chain(name: str, training: bool, chosen: str) -> None:
    x, residual, chain = _chain(name, training)
    with resnet_fused.backend(chosen):
        backend = backends.choose(x.device)
    parameters, running, spec, eps = chain.flatten()
    args = (x, residual, parameters, running, spec, eps, "", True, backend)
    torch.library.opcheck(torch.ops.resnet_fused.chain.default, args)

    detached = [t.detach() for t in parameters]
    with torch.no_grad():
        out, *saved = torch.ops.resnet_fused.chain(x, residual, parameters, running, spec, eps, "", True, backend)
    for need in (True, False):
        needs = [need, residual is not None, *[True] * len(parameters)]
        args = (torch.ones_like(out), x.detach(), detached, saved, spec, eps, "", needs, backend)
        torch.library.opcheck(torch.ops.resnet_fused.chain_backward.default, args)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_opcheck_add_relu(layout: torch.memory_format, backend: str) -> None:
    a, b = (torch.randn(2, 3, 5, 6).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.resnet_fused.residual_add_relu.default, (a, b, True, backend))
    with torch.no_grad():
        _, mask = torch.ops.resnet_fused.residual_add_relu(a, b, True, backend)
    grad_out = torch.ones(2, 3, 5, 6).contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.resnet_fused.residual_add_relu_backward.default, (grad_out, mask, backend))


def test_projection_alone_needs_gradients() -> None:
    shortcut = projection(4, 4, 1).double()
    main = projection(4, 4, 1).double().requires_grad_(False)
    x = _noise(2, 4, 5, 5)
    ours = run_units(x, [(main[0], main[1], None)], projection=(shortcut[0], shortcut[1]), act=F.relu)
    stock = F.relu(main(x) + shortcut(x))
    gradients = [torch.autograd.grad(out.sum(), [*shortcut.parameters()]) for out in (ours, stock)]
    assert_same(*(dict(enumerate(found)) for found in gradients))
