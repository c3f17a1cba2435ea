"""Fused units against stock PyTorch: values, gradients, running statistics, layouts, determinism."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from chain_cases import CASES, Stem, StockStem, compare, norms, run
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import resnet_fused
from resnet_fused import backends, functional
from resnet_fused.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
every_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])


def set_mode(module: nn.Module, mode: str) -> None:
    """ "mixed" freezes every other norm of a training module."""
    module.train(mode != "eval")
    if mode == "mixed":
        for norm in norms(module)[::2]:
            norm.eval()


def modes(name: str) -> list[str]:
    """ "mixed" says something new only where there are several norms."""
    return ["train", "eval", "mixed"] if len(norms(CASES[name].stock())) > 1 else ["train", "eval"]


# Accuracy


@every_case
@every_dtype
@every_format
def test_as_accurate_as_stock(backend: str, name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for mode in modes(name):
        ours, stock = CASES[name].pair()
        for module in (ours, stock):
            set_mode(module, mode)
        compare(ours, stock, CASES[name].inputs(dtype, memory_format), dtype)


@every_case
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_float64_equals_stock_with_an_ordinary_relu_mask(backend: str, name: str, mode: str) -> None:
    """Half of the ReLUs open and half shut within a channel; in float64 no sign flips."""
    case = CASES[name]
    ours, stock = (module.double() for module in case.pair(clear=False))
    for module in (ours, stock):
        set_mode(module, mode)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in case.shapes]
    a, b = run(ours, inputs), run(stock, inputs)
    assert a.keys() == b.keys()
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@every_case
def test_without_autograd(backend: str, name: str) -> None:
    ours, stock = CASES[name].pair()
    inputs = [x.detach() for x in CASES[name].inputs(torch.float32, torch.contiguous_format)]
    for mode in ("eval", "train"):
        set_mode(ours, mode)
        set_mode(stock, mode)
        before = [x.clone() for x in inputs]
        with torch.inference_mode():
            torch.testing.assert_close(ours(*inputs), stock(*inputs))
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was written over"


@every_case
def test_gradients_of_subsets(backend: str, name: str) -> None:
    """Only what asks for a gradient gets one, and it is the same as when everything asks."""
    case = CASES[name]
    ours, stock = (module.double() for module in case.pair())
    inputs = case.inputs(torch.float64, torch.channels_last)
    everything = run(stock, inputs)
    names = [key for key in everything if key.endswith("grad")]
    for wanted in names:
        for module in (ours, stock):
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(f"{key} grad" == wanted)
        for i, x in enumerate(inputs):
            x.requires_grad_(f"input {i} grad" == wanted)
        found = run(ours, inputs)
        assert [key for key in found if key.endswith("grad")] == [wanted]
        torch.testing.assert_close(found[wanted], everything[wanted], rtol=1e-9, atol=1e-11)


# gradcheck


@every_case
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_gradcheck_modules(backend: str, name: str, mode: str) -> None:
    case = CASES[name]
    ours = case.pair()[0].double()
    set_mode(ours, mode)
    inputs = case.inputs(torch.float64, torch.contiguous_format)
    count = len(inputs)
    assert gradcheck(lambda *t: ours(*t[:count]), (*inputs, *ours.parameters()), fast_mode=True)


def _vectors(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, bias, running mean, running variance in float64."""
    rand = torch.rand(4, channels, dtype=torch.float64)
    bias = torch.where(torch.arange(channels) % 3 == 1, -1.5, 1.5) + 0.1 * rand[1]
    return (0.2 + 0.1 * rand[0]).requires_grad_(), bias.requires_grad_(), 0.1 * rand[2], 0.5 + rand[3]


FUNCTIONS: dict[str, Callable[[bool], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {}


def _function(make: Callable) -> Callable:
    FUNCTIONS[make.__name__.strip("_")] = make
    return make


def _noise(*shape: int, offset: float = 0.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64).clamp(-2, 2) * 0.2 + offset).requires_grad_()


def _running(mean: Tensor, var: Tensor, training: bool) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if training else (mean, var)


@_function
def _conv_bn_relu(training: bool):
    weight, bias, mean, var = _vectors(6)
    running = _running(mean, var, training)
    options = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2, "training": training}
    return (
        lambda x, w, g, b: functional.conv_bn_relu(x, w, g, b, *running, **options),
        (_noise(2, 4, 5, 7), _noise(6, 2, 3, 3), weight, bias),
    )


@_function
def _conv_bn_residual_relu(training: bool):
    weight, bias, mean, var = _vectors(4)
    with torch.no_grad():
        bias.copy_(bias.sign() * 3)
    running = _running(mean, var, training)
    return (
        lambda x, w, g, b, r: functional.conv_bn_relu(x, w, g, b, *running, residual=r, training=training),
        (_noise(2, 3, 4, 5), _noise(4, 3, 1, 1), weight, bias, _noise(2, 4, 4, 5)),
    )


@_function
def _conv_bn_identity_relu(training: bool):
    weight, bias, mean, var = _vectors(4)
    with torch.no_grad():
        bias.copy_(bias.sign() * 3)
    running = _running(mean, var, training)
    return (
        lambda x, w, g, b: functional.conv_bn_relu(x, w, g, b, *running, residual=x, padding=1, training=training),
        (_noise(2, 4, 4, 5), _noise(4, 4, 3, 3), weight, bias),
    )


@_function
def _bn_relu(training: bool):
    weight, bias, mean, var = _vectors(5)
    running = _running(mean, var, training)
    return (
        lambda x, g, b: functional.bn_relu(x, g, b, *running, training=training),
        (_noise(2, 5, 3, 5), weight, bias),
    )


@_function
def _bn_add_relu(training: bool):
    weight, bias, mean, var = _vectors(5)
    with torch.no_grad():
        bias.copy_(bias.sign() * 3)
    running = _running(mean, var, training)
    return (
        lambda x, r, g, b: functional.bn_add_relu(x, r, g, b, *running, training=training),
        (_noise(2, 5, 3, 5), _noise(2, 5, 3, 5), weight, bias),
    )


@_function
def _add_relu(training: bool):
    signs = torch.where(torch.rand(2, 5, 3, 5, dtype=torch.float64) < 0.5, -2.0, 2.0)
    return (lambda a, b: functional.add_relu(a, b + signs), (_noise(2, 5, 3, 5), _noise(2, 5, 3, 5)))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck_functional(backend: str, name: str, training: bool) -> None:
    function, inputs = FUNCTIONS[name](training)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@every_format
@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_as_accurate_as_stock(
    backend: str, dtype: torch.dtype, memory_format: torch.memory_format, training: bool
) -> None:
    torch.manual_seed(3)
    x, residual = (torch.randn(3, 17, 7, 9).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    filters = (torch.randn(17, 17, 3, 3) * 0.1).to(dtype)
    vectors = [torch.rand(17) + 0.5, torch.randn(17), torch.randn(17) * 0.1, torch.rand(17) + 0.5]

    def stock(x: Tensor, filters: Tensor | None, residual: Tensor | None, vectors: list[Tensor]) -> Tensor:
        weight, bias, mean, var = vectors
        y = x if filters is None else F.conv2d(x, filters, padding=1)
        y = F.batch_norm(y, mean, var, weight, bias, training, 0.3, 1e-3)
        return F.relu(y if residual is None else y + residual)

    options = {"training": training, "momentum": 0.3, "eps": 1e-3}
    cases = {
        "conv_bn_relu": (filters, None, lambda v: functional.conv_bn_relu(x, filters, *v, padding=1, **options)),
        "conv_bn_relu with residual": (
            filters,
            residual,
            lambda v: functional.conv_bn_relu(x, filters, *v, residual=residual, padding=1, **options),
        ),
        "bn_relu": (None, None, lambda v: functional.bn_relu(x, *v, **options)),
        "bn_add_relu": (None, residual, lambda v: functional.bn_add_relu(x, residual, *v, **options)),
    }
    for name, (w, r, ours) in cases.items():
        a, b, gold = (copy.deepcopy(vectors) for _ in range(3))
        gold = [v.double() for v in gold]
        out, reference = ours(a), stock(x, w, r, b)
        exact = stock(x.double(), None if w is None else w.double(), None if r is None else r.double(), gold)
        assert_as_accurate(out, reference, exact, ulps=4, name=name)
        for which, ours_v, stock_v, gold_v in zip(("mean", "var"), a[2:], b[2:], gold[2:], strict=True):
            # The raw output is rounded to dtype before its statistics are taken; both sides share that.
            assert_as_accurate(ours_v, stock_v, gold_v, ulps=4, name=f"{name}: running {which}")
    exact = F.relu(x.double() + residual.double())
    assert_as_accurate(functional.add_relu(x, residual), F.relu(x + residual), exact, name="add_relu")


# Running statistics


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("name", ["conv-bias", "bn", "stem", "basic-projection", "bottleneck-projection"])
def test_running_statistics_over_several_steps(backend: str, name: str, momentum: float | None, eps: float) -> None:
    case = CASES[name]
    ours, stock = (module.double() for module in case.pair())
    for norm in norms(ours) + norms(stock):
        norm.momentum, norm.eps = momentum, eps
    for step in range(4):
        inputs = [torch.randn(shape, dtype=torch.float64) * (1 + step) + step for shape in case.shapes]
        for module in (ours, stock):
            module(*inputs)
    for (key, a), b in zip(ours.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    ours.eval(), stock.eval()
    torch.testing.assert_close(ours(*inputs), stock(*inputs), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), copy.deepcopy(ours).buffers(), strict=True))


def test_frozen_norms_keep_their_statistics(backend: str) -> None:
    ours, _ = CASES["bottleneck-projection"].pair()
    set_mode(ours, "mixed")
    before = [norm.running_mean.clone() for norm in norms(ours)]
    ours(*CASES["bottleneck-projection"].inputs(torch.float32, torch.channels_last))
    moved = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms(ours), before, strict=True)]
    assert moved == [norm.training for norm in norms(ours)]


@pytest.mark.parametrize("ratio", [30, 1000])
@every_format
def test_statistics_far_from_zero(backend: str, ratio: float, memory_format: torch.memory_format) -> None:
    """Mean over deviation 1000: E[x²] − E[x]² would lose every digit of the variance in float32."""
    torch.manual_seed(4)
    x = (torch.randn(4, 19, 17, 13) + ratio).contiguous(memory_format=memory_format)

    def vectors(dtype: torch.dtype) -> list[Tensor]:
        return [t(19, dtype=dtype) for t in (torch.ones, torch.zeros, torch.zeros, torch.ones)]

    a, b, gold = vectors(torch.float32), vectors(torch.float32), vectors(torch.float64)
    out = functional.bn_relu(x, *a, training=True, momentum=1.0)
    stock = F.relu(F.batch_norm(x, b[2], b[3], b[0], b[1], True, 1.0))
    exact = F.relu(F.batch_norm(x.double(), gold[2], gold[3], gold[0], gold[1], True, 1.0))
    assert_as_accurate(out, stock, exact, ulps=4)
    assert_as_accurate(a[2], b[2], gold[2], name="running mean")
    assert_as_accurate(a[3], b[3], gold[3], ulps=8, name="running variance")


# Layouts and determinism


@pytest.mark.parametrize("name", ["bn", "bn-add", "add"])
@every_format
def test_layout_is_preserved_without_a_convolution(backend: str, name: str, memory_format: torch.memory_format) -> None:
    ours, _ = CASES[name].pair()
    inputs = CASES[name].inputs(torch.float32, memory_format)
    out = ours(*inputs)
    assert out.stride() == inputs[0].stride()
    out.sum().backward()
    assert all(x.grad.stride() == x.stride() for x in inputs)


@pytest.mark.parametrize("name", ["conv", "stem", "basic", "bottleneck-projection"])
@every_format
def test_convolutions_give_channels_last(backend: str, name: str, memory_format: torch.memory_format) -> None:
    ours, _ = CASES[name].pair()
    out = ours(*CASES[name].inputs(torch.float32, memory_format))
    assert out.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_results_do_not_depend_on_strides(backend: str, name: str) -> None:
    """Sliced, transposed and expanded inputs, and an upstream gradient in another layout."""
    case = CASES[name]
    ours, stock = (module.double() for module in case.pair())
    inputs = case.inputs(torch.float64, torch.contiguous_format)
    expected = run(stock, inputs)
    variants = {
        "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    for label, change in variants.items():
        views = [change(x.detach()).requires_grad_() for x in inputs]
        out = ours.zero_grad() or ours(*views)
        torch.testing.assert_close(out, expected["out"], rtol=1e-9, atol=1e-11, msg=lambda m, s=label: f"{s}: {m}")
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        direction = change(direction.to(torch.bfloat16).double())
        out.backward(direction)
        for i, x in enumerate(views):
            torch.testing.assert_close(x.grad, expected[f"input {i} grad"], rtol=1e-9, atol=1e-11)
        for key, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[f"{key} grad"], rtol=1e-9, atol=1e-11)
    ours(inputs[0][:1].expand_as(inputs[0]), *inputs[1:])


def test_expanded_gradient(backend: str) -> None:
    """``sum().backward()`` hands over a gradient of stride zero."""
    for name in ("bn", "bn-add", "add", "basic", "stem"):
        ours, stock = (module.double() for module in CASES[name].pair())
        a, b = (CASES[name].inputs(torch.float64, torch.channels_last) for _ in range(2))
        ours(*a).sum().backward()
        stock(*b).sum().backward()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@every_case
def test_same_bits_on_every_run(backend: str, name: str) -> None:
    ours, _ = CASES[name].pair(clear=False)
    inputs = [torch.randn(shape, requires_grad=True) for shape in CASES[name].shapes]
    first, second = run(copy.deepcopy(ours), inputs), run(copy.deepcopy(ours), inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif("cpu" not in resnet_fused.available_backends(), reason="the compiled kernels are not built")
def test_cpu_backend_has_the_same_bits_for_any_number_of_threads() -> None:
    ours, _ = CASES["bn"].pair(clear=False)
    x = torch.randn(16, 35, 29, 31).contiguous(memory_format=torch.channels_last).requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with resnet_fused.backend("cpu"):
                results.append(run(copy.deepcopy(ours), [x]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@every_case
@every_dtype
def test_backends_agree(name: str, dtype: torch.dtype) -> None:
    if len(resnet_fused.available_backends()) < 2:
        pytest.skip("only one backend is available")
    ours, _ = CASES[name].pair()
    ours = ours.to(dtype)
    inputs = CASES[name].inputs(dtype, torch.channels_last)
    results = []
    for which in ("aten", "cpu"):
        with resnet_fused.backend(which):
            results.append(run(copy.deepcopy(ours), inputs))
    tolerance = 40 * torch.finfo(dtype).eps
    for key, value in results[0].items():
        other = results[1][key]
        peers = [
            t for k, t in results[0].items() if t.dim() == value.dim() and k.endswith("grad") == key.endswith("grad")
        ]
        scale = max(t.double().abs().max().item() for t in peers)
        assert (value.double() - other.double()).abs().max().item() <= tolerance * scale, key


def test_backward_runs_on_the_backend_of_its_forward() -> None:
    ours, _ = CASES["bn"].pair()
    x = CASES["bn"].inputs(torch.float32, torch.channels_last)[0]
    for name in resnet_fused.available_backends():
        with resnet_fused.backend(name):
            out = ours(x)
        out.sum().backward()


# Planted errors: the comparison must notice


def _drop_mask(kernels: type) -> dict[str, Callable]:
    reduce, apply = kernels.bn_act_backward_reduce, kernels.bn_act_backward

    def reduce_without_mask(self, grad, x, mask, mean, scale, shift, relu, want_activation):
        return reduce(self, grad, x, None, mean, scale, shift, False, want_activation)

    def apply_without_mask(self, grad, x, mask, mean, scale, shift, relu, coefficients, inplace=False):
        return apply(self, grad, x, None, mean, scale, shift, False, coefficients, inplace)

    return {"bn_act_backward_reduce": reduce_without_mask, "bn_act_backward": apply_without_mask}


def _drop_centre(kernels: type) -> dict[str, Callable]:
    apply = kernels.bn_act_backward

    def apply_without_centre(self, grad, x, mask, mean, scale, shift, relu, coefficients, inplace=False):
        return apply(self, grad, x, mask, torch.zeros_like(mean), scale, shift, relu, coefficients, inplace)

    return {"bn_act_backward": apply_without_centre}


def _unbiased_variance(kernels: type) -> dict[str, Callable]:
    stats = kernels.bn_stats

    def unbiased(self, x):
        mean, var = stats(self, x)
        count = x.numel() // x.shape[1]
        return mean, var * (count / (count - 1))

    return {"bn_stats": unbiased}


@pytest.mark.parametrize("plant", [_drop_mask, _drop_centre, _unbiased_variance])
@pytest.mark.parametrize("name", ["bn", "basic", "bottleneck-projection"])
def test_a_planted_error_is_found(backend: str, monkeypatch: pytest.MonkeyPatch, plant: Callable, name: str) -> None:
    kernels = type(backends.get(backend))
    for method, wrong in plant(kernels).items():
        monkeypatch.setattr(kernels, method, wrong)
    ours, stock = CASES[name].pair()
    for norm in norms(ours) + norms(stock):
        norm.bias.data.add_(0.25)
    inputs = [(x.detach() + 0.5).requires_grad_() for x in CASES[name].inputs(torch.float32, torch.channels_last)]
    with pytest.raises(AssertionError):
        compare(ours, stock, inputs, torch.float32)


def test_a_naive_variance_is_found(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(self, x):
        mean = x.mean((0, 2, 3))
        return mean, (x * x).mean((0, 2, 3)) - mean * mean

    monkeypatch.setattr(type(backends.get(backend)), "bn_stats", naive)
    with pytest.raises(AssertionError):
        test_statistics_far_from_zero(backend, 1000, torch.channels_last)


def test_stem_ties_fall_as_in_stock(backend: str) -> None:
    """Equal activations in one window: the gradient goes to the first, as torch's max pooling has it."""
    torch.manual_seed(5)
    stock = StockStem(8)
    ours = Stem(8)
    ours.load_state_dict(stock.state_dict())
    x = torch.randint(-1, 2, (2, 3, 1, 1)).float().expand(2, 3, 21, 23).contiguous().requires_grad_()
    ours, stock = ours.double().eval(), stock.double().eval()
    a, b = run(ours, [x.detach().double().requires_grad_()]), run(stock, [x.detach().double().requires_grad_()])
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-11)
