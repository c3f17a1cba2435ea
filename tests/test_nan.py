"""NaN and infinity go where they go in stock PyTorch: every operator, block and a whole network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from chain_cases import CASES, norms, tv
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import functional

VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def results(call: Callable[..., Tensor], tensors: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``call(**tensors)``; the running statistics afterwards."""
    leaves = {
        name: t.clone(memory_format=torch.preserve_format).requires_grad_(not name.startswith("running"))
        for name, t in tensors.items()
    }
    out = call(**leaves)
    out.backward(gradient)
    found = {"out": out.detach()}
    return found | {name: t.grad if t.requires_grad else t for name, t in leaves.items()}


def assert_same_pattern(ours: dict[str, Tensor], stock: dict[str, Tensor], infinities: bool = True) -> None:
    """NaN in the same places, and (``infinities``) infinity in the same places.

    Running statistics are compared by what is finite: whether the mean of an infinity is infinite or NaN depends on the
    order of the sum, also between stock PyTorch's own devices.
    """
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        found = ours[name]
        if "running" in name:
            assert torch.equal(found.isfinite(), expected.isfinite()), f"{name}: finite values"
            continue
        count = f"{int(found.isnan().sum())} NaN of {found.numel()}, stock has {int(expected.isnan().sum())}"
        assert torch.equal(found.isnan(), expected.isnan()), f"{name}: {count}"
        if infinities:
            assert torch.equal(found == math.inf, expected == math.inf), f"{name}: +inf"
            assert torch.equal(found == -math.inf, expected == -math.inf), f"{name}: -inf"


def without_infinities(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Infinities as NaN: all that an infinite weight, running mean or gradient leaves to compare.

    The gradient is formed as ``a·dz + b·(x − mean) + c``, the weight in a, b and c: inf − inf is NaN where stock, which
    multiplies by the weight last, has an infinity. The covariance plan sums the first term over the channels before the
    second is taken from it, and finds ``Σ dz·(y − mean)`` as a sum over channels too.
    """
    return {name: torch.where(t.isinf(), math.nan, t) for name, t in tensors.items()}


def _plant(t: Tensor, value: float) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    index = tuple(size // 2 for size in t.shape)
    t[index] = value
    return t


def _stock(function: str, training: bool) -> Callable[..., Tensor]:
    def call(x, weight=None, residual=None, gamma=None, beta=None, running_mean=None, running_var=None):
        if function == "add_relu":
            return F.relu(x + residual)
        y = F.conv2d(x, weight, padding=1) if weight is not None else x
        y = F.batch_norm(y, running_mean, running_var, gamma, beta, training)
        return F.relu(y if residual is None else y + residual)

    return call


def _ours(function: str, training: bool) -> Callable[..., Tensor]:
    def call(x, weight=None, residual=None, gamma=None, beta=None, running_mean=None, running_var=None):
        vectors = (gamma, beta, running_mean, running_var)
        if function == "add_relu":
            return functional.add_relu(x, residual)
        if function == "bn_relu":
            return functional.bn_relu(x, *vectors, training=training)
        if function == "bn_add_relu":
            return functional.bn_add_relu(x, residual, *vectors, training=training)
        return functional.conv_bn_relu(x, weight, *vectors, residual=residual, padding=1, training=training)

    return call


FUNCTIONS = {
    "conv_bn_relu": ("weight",),
    "conv_bn_add_relu": ("weight", "residual"),
    "bn_relu": (),
    "bn_add_relu": ("residual",),
    "add_relu": ("residual",),
}


@every_dtype
@every_value
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(backend: str, function: str, value: float, dtype: torch.dtype) -> None:
    names = FUNCTIONS[function]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x, residual, gradient = (
            torch.randn(3, 9, 6, 7).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
        )
        tensors = {"x": x, "weight": torch.randn(9, 9, 3, 3).to(dtype), "residual": residual}
        tensors = {key: t for key, t in tensors.items() if key == "x" or key in names}
        if function != "add_relu":
            tensors |= {"gamma": torch.rand(9) + 0.5, "beta": torch.randn(9)}
            tensors |= {"running_mean": torch.randn(9) * 0.1, "running_var": torch.rand(9) + 0.5}
        for training in (True, False):
            for where in (*tensors, "gradient"):
                planted = {key: _plant(t, value) if key == where else t for key, t in tensors.items()}
                upstream = _plant(gradient, value) if where == "gradient" else gradient
                ours = results(_ours(function, training), planted, upstream)
                stock = results(_stock(function, training), planted, upstream)
                if where == "gamma" and training and math.isinf(value):
                    ours, stock = without_infinities(ours), without_infinities(stock)
                try:
                    assert_same_pattern(ours, stock)
                except AssertionError as error:
                    raise AssertionError(f"{where}, training={training}, {memory_format}: {error}") from error


def module_results(module: nn.Module, inputs: list[Tensor], gradient: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    module.zero_grad(set_to_none=True)
    out = module(*inputs)
    out.backward(gradient(out))
    found = {"out": out.detach()}
    found |= {f"input {i} grad": x.grad for i, x in enumerate(inputs)}
    found |= {f"{name} grad": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers() if b.is_floating_point()}


def plant_in(module: nn.Module, where: str, value: float) -> bool:
    """Plant in the middle convolution or norm of the module; False where it has none."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    found = norms(module)
    middle = lambda children: children[len(children) // 2]  # noqa: E731
    with torch.no_grad():
        if where == "conv weight" and convs:
            weight = middle(convs).weight
            weight[tuple(s // 2 for s in weight.shape)] = value
        elif where == "norm weight" and found:
            middle(found).weight[1] = value
        elif where == "norm bias" and found:
            middle(found).bias[1] = value
        elif where == "running mean" and found:
            middle(found).running_mean[1] = value
        elif where == "running variance" and found:
            middle(found).running_var[1] = value
        else:
            return False
    return True


PLACES = [
    "input",
    "residual",
    "gradient",
    "conv weight",
    "norm weight",
    "norm bias",
    "running mean",
    "running variance",
]


def any_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each gradient whether it holds a NaN at all; the output stays as it is.

    In bfloat16 a deep network's pre-activations fall on either side of a ReLU's kink by one rounding, and a NaN passes
    where the ReLU does: stock's own two layouts then differ in single elements of a filter's gradient.
    """
    return {
        name: t if name == "out" or "running" in name else torch.where(t.isnan().any(), math.nan, 0.0)
        for name, t in tensors.items()
    }


def compare_module(
    ours: nn.Module, stock: nn.Module, inputs: list[Tensor], where: str, value: float, coarse: bool = False
) -> None:
    if where == "input":
        inputs = [_plant(inputs[0].detach(), value), *inputs[1:]]
    elif where == "residual":
        inputs = [*inputs[:-1], _plant(inputs[-1].detach(), value)]
    elif where != "gradient":
        assert plant_in(ours, where, value) and plant_in(stock, where, value)

    def gradient(out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        made = torch.randn(out.shape, generator=generator).to(out.dtype)
        return _plant(made, value) if where == "gradient" else made

    gold = copy.deepcopy(stock).double()
    found, expected = module_results(ours, inputs, gradient), module_results(stock, inputs, gradient)
    if where in ("norm weight", "conv weight", "running mean", "gradient") and math.isinf(value):
        found, expected = without_infinities(found), without_infinities(expected)
    if coarse:
        found, expected = any_nan(found), any_nan(expected)
    # Infinities beyond one operator depend on the order of a convolution's sums, which its layout decides.
    try:
        assert_same_pattern(found, expected, infinities=False)
    except AssertionError:
        if inputs[0].dtype != torch.bfloat16 or coarse:
            raise
        exact = module_results(
            gold, [x.detach().double() for x in inputs], lambda out: gradient(out.bfloat16()).double()
        )
        assert_between(found, exact, expected)


def assert_between(found: dict[str, Tensor], exact: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    """NaN at least where stock has it in float64, and at most where stock has it in the same dtype.

    oneDNN's bfloat16 convolution of an odd number of channels lets a NaN into the neighbouring pixel, at each convolution.
    """
    for name in found:
        bad, least, most = (~side[name].isfinite() for side in (found, exact, stock))
        assert (least <= bad).all() and (bad <= most).all(), name


def has_place(name: str, where: str) -> bool:
    if where == "residual":
        return len(CASES[name].shapes) == 2
    return where in ("input", "gradient") or plant_in(CASES[name].stock(), where, 0.0)


@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", CASES)
def test_modules(backend: str, name: str, value: float, dtype: torch.dtype) -> None:
    inputs = CASES[name].inputs(dtype, torch.channels_last)
    for where in PLACES:
        if not has_place(name, where):
            continue
        if (name, where) == ("conv-bias", "norm weight") and math.isinf(value):
            continue  # the bias is taken out of the mean, so shift = bias − scale·mean may be the other infinity
        for training in (True, False):
            ours, stock = (module.to(dtype).train(training) for module in CASES[name].pair())
            try:
                compare_module(ours, stock, inputs, where, value)
            except AssertionError as error:
                raise AssertionError(f"{where}, training={training}: {error}") from error


@pytest.mark.one_in(8)
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_resnet18(backend: str, value: float, training: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source = tv.resnet18(num_classes=5).state_dict()
    x = torch.randn(2, 3, 64, 64).to(dtype)
    for where in PLACES:
        if where == "residual":
            continue
        pair = []
        for builder in (resnet_fused.resnet18, tv.resnet18):
            module = builder(num_classes=5)
            module.load_state_dict(source)
            pair.append(module.to(dtype).train(training))
        try:
            compare_module(*pair, [x], where, value, coarse=dtype == torch.bfloat16)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
