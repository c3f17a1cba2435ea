"""Chains on measured routes: a processor stands in for the GPU, and formulas for its kernels."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import BLOCKS, block, check_block, compare, narrow_network
from chain_cases import Stem, StockStem, hold_clear
from route_cases import LazyKernels, Pretended, Recording, convolutions, forget, formulas, mixtures, pretend, signatures
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import resnet_fused
from resnet_fused import backends, operators, routes, tables
from resnet_fused.backends import recast, routed
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.operands import Conv
from resnet_fused.plans.spec import Chain, Shortcut, Tail

GENSTATS = " without covariance"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    yield from pretend(monkeypatch, formulas())


# Answers


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_mixture(name: str, training: bool, gpu: Pretended) -> None:
    """In float64, where an operand that is lost or formed twice shows in the first digit."""
    for i, choice in enumerate(mixtures(name, [routed.CUDNN, routed.TRITON])):
        gpu.choice = choice + GENSTATS * (i % 2)
        gpu.ran.clear()
        check_block(name, training, torch.float64, "auto")
        assert gpu.ran == [gpu.choice]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bottleneck-strided", "basic-strided"])
def test_half_and_single_precision(name: str, dtype: torch.dtype, gpu: Pretended) -> None:
    convs = signatures(name)
    ways = [routed.CUDNN, routed.TRITON, routed.EXTENSION, routed.CUDNN]
    gpu.choice = routed.name_of(dict(zip(convs, ways)))
    for training in (True, False):
        check_block(name, training, dtype, "auto")


def deep_stem(channels: int = 3, filter_size: int = 7) -> tuple[nn.Module, nn.Module]:
    stock, ours = StockStem(), Stem()
    for model in (stock, ours):
        model.conv1 = nn.Conv2d(channels, 17, filter_size, 2, filter_size // 2, bias=False)
    hold_clear(stock)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "channels, filter_size, height, width, deep",
    [(3, 7, 34, 38, True), (3, 5, 34, 38, True), (1, 3, 18, 22, True), (3, 7, 33, 38, False), (5, 7, 34, 38, False)],
)
def test_the_stem_as_space_to_depth(
    channels: int, filter_size: int, height: int, width: int, deep: bool, training: bool, gpu: Pretended
) -> None:
    ours, stock = deep_stem(channels, filter_size)
    gpu.choice = f"routed 17x{channels}x{filter_size}x{filter_size}/2=space_to_depth"
    applied = []
    kernels = backends.providers()[routed.SPACE_TO_DEPTH]
    kernels.applies = lambda *args: applied.append(recast.SpaceToDepth.applies(*args)) or applied[-1]
    x = 0.5 * torch.randn(2, channels, height, width)
    for dtype in (torch.float64, torch.bfloat16):
        compare(copy.deepcopy(ours), copy.deepcopy(stock), x, training, dtype, "auto")
    assert set(applied) == {deep} and len(gpu.ran) == 2


def test_a_network_with_every_provider(gpu: Pretended) -> None:
    stock = narrow_network()
    resnet_fused.networks.hold_clear_of_kinks(stock)
    ours = resnet_fused.fuse(copy.deepcopy(stock))
    convs = dict.fromkeys(convolutions(stock), "triton")
    convs["8x3x7x7/2"] = "space_to_depth"
    gpu.choice = routed.name_of(convs)
    compare(ours, stock, torch.randn(2, 3, 64, 64), True, torch.float64, "auto")
    assert gpu.ran == [gpu.choice] * 6  # stem, five blocks


# Faults that these tests must see


class WrongProvider(routed.RoutedKernels):
    """The weight gradient asks another provider than its route says, which forms nothing that is pending."""

    def wgrad(self, dy, x, weight, conv):
        y = x.y if not isinstance(x, torch.Tensor) else x
        return AtenKernels().wgrad(dy, y, weight, conv)


class LostOperand(routed.RoutedKernels):
    """An operand that is pending goes as it lies in memory to whom does not form it."""

    def fprop_stats(self, x, weight, conv):
        return super().fprop_stats(getattr(x, "y", x), weight, conv)


class LostResidual(routed.RoutedKernels):
    def dgrad(self, dy, x, weight, conv, residual=None, mask=None):
        return super().dgrad(dy, x, weight, conv, residual, None)


@pytest.mark.parametrize("fault", [WrongProvider, LostOperand, LostResidual])
def test_faults_of_routing_are_seen(fault: type, gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.choice = routed.name_of(dict.fromkeys(signatures("bottleneck"), "triton"))
    monkeypatch.setattr(routed, "RoutedKernels", fault)
    with pytest.raises(AssertionError):
        check_block("bottleneck", True, torch.float64, "auto")


@pytest.mark.parametrize("name", ["_before", "_first"])
def test_a_filter_off_by_one_is_seen(name: str, gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(recast, name)
    monkeypatch.setattr(recast, name, lambda weight: right(weight) - 1)
    ours, stock = deep_stem()
    gpu.choice = "routed 17x3x7x7/2=space_to_depth"
    with pytest.raises((AssertionError, RuntimeError)):
        compare(ours, stock, 0.5 * torch.randn(2, 3, 34, 38), True, torch.float64, "auto")


# What runs


def test_each_convolution_runs_where_its_route_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[str, str, str]] = []
    names = [routed.CUDNN, routed.TRITON, routed.EXTENSION, routed.SPACE_TO_DEPTH]
    way = dict(zip(signatures("bottleneck-strided"), names, strict=True))
    for gpu in pretend(monkeypatch, {name: Recording(noted, name) for name in names}):
        for choice in (routed.name_of(way) + GENSTATS, routed.name_of(way)):
            gpu.choice = choice
            noted.clear()
            block(resnet_fused, *BLOCKS["bottleneck-strided"])(torch.randn(2, 24, 7, 6)).sum().backward()
            assert all(way[conv] == provider for provider, _, conv in noted)
            plain = {conv for _, _, conv in noted}
            # The covariance plan has products in place of its convolutions.
            assert plain == (set(way) if choice.endswith(GENSTATS) else set(list(way)[:2]))
            assert {method for _, method, _ in noted} >= {"fprop_stats", "dgrad", "dgrad_below", "wgrad"}


def test_the_covariance_plan_runs_where_pending_operands_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products come from one provider, whatever the routes of the block's convolutions are."""
    asked = []

    class Noting(LazyKernels):
        def __init__(self, name: str) -> None:
            self.name = name

        def gram(self, a, conv):
            asked.append(self.name)
            return super().gram(a, conv)

    conv1, conv2, conv3 = signatures("bottleneck")
    for gpu in pretend(monkeypatch, {name: Noting(name) for name in ("cudnn", "triton", "cuda")}):
        for way, expected in (
            ({}, "cudnn"),
            ({conv1: "cuda"}, "cuda"),
            ({conv3: "cuda", conv2: "triton"}, "triton"),
            ({conv3: "cudnn", conv1: "triton"}, "triton"),
        ):
            gpu.choice = routed.name_of(way)
            asked.clear()
            check_block("bottleneck", True, torch.float64, "auto")
            assert asked == [expected]


def test_stock_modules_run_where_nothing_was_measured(gpu: Pretended) -> None:
    model = block(resnet_fused, *BLOCKS["bottleneck"])
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            forward = module.forward
            module._conv_forward = lambda *args, f=module._conv_forward: calls.append(1) or f(*args)
            assert module.forward == forward  # else it is not plain, and stock modules run for that reason
    x = torch.randn(2, 32, 7, 6)
    for choice in (None, routes.STOCK, "routed 1x1x1x1/1=nowhere", "gone", ""):
        calls.clear()
        gpu.choice = choice
        model(x).sum().backward()
        resnet_fused.AddReLU()(x, x)
        assert (len(calls), gpu.ran) == (3, [])
    gpu.choice = "routed"
    model(x)
    resnet_fused.AddReLU()(x, x)
    assert (len(calls), gpu.ran) == (3, ["routed", "routed"])


def test_what_is_asked(gpu: Pretended) -> None:
    """Everything on which a choice depends, and the batch only by its power of two; asked once."""
    model = block(resnet_fused, *BLOCKS["basic"])

    def asked(x: torch.Tensor) -> list[str]:
        gpu.asked.clear()
        model(x)
        return list(gpu.asked)

    x = torch.randn(2, 16, 8, 8)
    (key,) = asked(x)
    conv, torch_version = "16x16x3x3/1", ".".join(torch.__version__.split(".")[:2])
    assert key == (f"train float32 m2^7 8x8 [{conv}:r {conv}:] identity relu sm_90 132 torch{torch_version}")
    assert asked(x) == []
    assert asked(torch.randn(3, 16, 8, 8)) == [key.replace("m2^7", "m2^8")]
    assert asked(torch.randn(4, 16, 8, 8)) == [key.replace("m2^7", "m2^8")]
    assert asked(torch.randn(2, 16, 8, 4)) == [key.replace("m2^7 8x8", "m2^6 8x4")]
    with torch.no_grad():
        assert asked(x) == [key.replace("train", "forward")]
    model.bn1.eval()
    assert asked(x) == [key.replace(f"[{conv}:r", f"[{conv}:fr")]
    model.double()
    assert asked(x.double()) == [key.replace(f"[{conv}:r", f"[{conv}:fr").replace("float32", "float64")]
    routes.reload()
    assert len(asked(x.double())) == 1


def test_the_users_backend_counts_more_than_a_route(gpu: Pretended) -> None:
    gpu.choice = "routed"
    with resnet_fused.backend("aten"):
        block(resnet_fused, *BLOCKS["basic"])(torch.randn(2, 16, 8, 8))
    assert gpu.ran == ["aten"] and not gpu.asked


def test_covariance_never_counts_more_than_a_route(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    grams = []
    original = AtenKernels.gram
    monkeypatch.setattr(AtenKernels, "gram", lambda *args: grams.append(1) or original(*args))
    model, x = block(resnet_fused, *BLOCKS["bottleneck"]), torch.randn(2, 32, 7, 6)
    for wish, choice, expected in (
        ("auto", "routed", 1),
        ("auto", f"routed{GENSTATS}", 0),
        ("never", "routed", 0),
        ("always", f"routed{GENSTATS}", 1),
    ):
        grams.clear()
        gpu.choice = choice
        with resnet_fused.covariance(wish):
            model(x)
        assert len(grams) == expected, (wish, choice)


def test_no_covariance_in_a_graph_that_would_have_to_wait(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas look at values to find the channels that a covariance cannot tell; a kernel may do without."""

    class Waiting(LazyKernels):
        def __init__(self, waits: bool) -> None:
            self.reads_back = lambda dtype: waits

    recomputed, grams = [], []
    original, gram = AtenKernels.recompute_statistics, AtenKernels.gram
    noted = lambda self, *args: recomputed.append(self) or original(self, *args)  # noqa: E731
    monkeypatch.setattr(LazyKernels, "recompute_statistics", noted)
    monkeypatch.setattr(AtenKernels, "gram", lambda *args: grams.append(1) or gram(*args))
    providers = backends.providers()
    model, x = block(resnet_fused, *BLOCKS["bottleneck"]), torch.randn(2, 32, 7, 6)
    for captured, waits, expected in ((False, True, 1), (True, True, 0), (True, False, 1)):
        monkeypatch.setattr(operators, "_is_captured", lambda x, captured=captured: captured)
        providers["triton"] = Waiting(waits)
        for choice in ("routed", "routed 64x64x1x1/1=cuda", "routed 64x64x1x1/1=triton"):
            grams.clear()
            gpu.choice = choice
            forget()
            model(x)
            assert len(grams) == expected
    assert len(recomputed) == 6 and all(isinstance(kernels, Waiting) for kernels in recomputed)


def test_a_backward_runs_as_its_forward_after_a_reload(gpu: Pretended) -> None:
    noted: list[tuple[str, str, str]] = []
    backends.providers()["cuda"] = Recording(noted, "cuda")
    gpu.choice = routed.name_of(dict.fromkeys(signatures("bottleneck"), "cuda"))
    out = block(resnet_fused, *BLOCKS["bottleneck"])(torch.randn(2, 32, 7, 6))
    gpu.choice = None
    forget()
    noted.clear()
    out.sum().backward()
    assert {method for _, method, _ in noted} == {"dgrad", "dgrad_below", "wgrad"}


# Compilers


def test_a_compiled_block_takes_the_entry_without_a_shape(gpu: Pretended) -> None:
    gpu.choice = routed.name_of(dict.fromkeys(signatures("bottleneck"), "triton"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = block(resnet_fused, *BLOCKS["bottleneck"])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 32, 7, 6)
        found, expected = (m(x.clone().requires_grad_()) for m in (compiled, model))
        torch.testing.assert_close(found, expected)
        for out in (found, expected):
            out.square().sum().backward()
        for a, b in zip(compiled.parameters(), model.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    assert f"'{gpu.choice}'" in graph.code
    assert {" m2^" in key for key in gpu.asked} == {True, False}  # eager asks for the shape


def test_a_compiled_block_without_a_route_is_stock(gpu: Pretended) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = block(resnet_fused, *BLOCKS["basic"])
    torch.compile(model, fullgraph=True, backend=counter)(torch.randn(2, 16, 8, 8))
    assert "resnet_fused" not in counter.graphs[0].code


def test_an_exported_block_keeps_its_route(gpu: Pretended) -> None:
    gpu.choice = routed.name_of(dict.fromkeys(signatures("basic"), "triton"))
    model, x = block(resnet_fused, *BLOCKS["basic"]).eval(), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = model(x)
        saved = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,)), saved)
        saved.seek(0)
        choice, gpu.choice = gpu.choice, None
        forget()
        loaded = torch.export.load(saved).module()
        torch.testing.assert_close(loaded(x), expected)
    assert f"'{choice}'" in loaded.code


# Names and tables


def test_names() -> None:
    ways = {"64x256x1x1/1": "triton", "64x64x3x3/2": "cuda", "32x1x3x3/1g32": "cudnn"}
    assert routed.parse(routed.name_of(ways)) == ways
    assert routed.parse("routed") == {}
    assert routed.signature((8, 4, 3, 1), Conv((2, 1), (1, 0), (2, 2), 2)) == "8x4x3x1/2,1g2d2,2"
    assert routed.signature((8, 4, 1, 1), Conv()) == "8x4x1x1/1"
    for choice in ("routed a=b", f"routed a=b{GENSTATS}", routes.STOCK):
        assert routes.route_of(choice).choice == choice


@pytest.mark.parametrize("name", ["route", "routed 64x64x1x1/1", "routed =triton", "routed 64x64x1x1/1=", ""])
def test_wrong_names(name: str) -> None:
    for function in (routed.parse if name else backends.get, backends.get):
        with pytest.raises(ValueError):
            function(name)


def test_a_route_to_no_provider_says_which_there_are(gpu: Pretended) -> None:
    with pytest.raises(ValueError, match="64x64x1x1/1: expected one of cudnn, .*, got 'nix'"):
        backends.get("routed 64x64x1x1/1=nix")
    with pytest.raises(ValueError, match="64x64x1x1/1: expected one of cudnn, .*, got 'nix'"):
        x = torch.randn(2, 8, 4, 4)
        unit = operators.plan.Unit(None, None, *torch.ones(4, 8), None, True, True, 1e-5)
        chain = Chain((replace(unit, relu=False),), Shortcut.NONE, Tail.RELU)
        operators.chain(x, None, chain, routes.Route("routed 64x64x1x1/1=nix"))


def test_tables_of_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(path))
    routes.reload()
    assert routes.measured("a") is None
    routes.add(path, {"a": routes.Entry("routed x=cuda", 2.5, {"stock": 3.0}), "b": routes.Entry("stock", 1.0, {})})
    assert routes.measured("a") is None  # nothing changes in a process
    routes.add(path, {"b": routes.Entry("routed", 0.5, {"stock": 1.0})})
    assert routes.read(path) == {
        "a": routes.Entry("routed x=cuda", 2.5, {"stock": 3.0}),
        "b": routes.Entry("routed", 0.5, {"stock": 1.0}),
    }
    routes.reload()
    assert (routes.measured("a"), routes.measured("b"), routes.measured("c")) == ("routed x=cuda", "routed", None)
    monkeypatch.undo()
    routes.reload()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_calls_without_an_entry_are_stock(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "of_chain", lambda *question: routes.Route(routes.STOCK))
    monkeypatch.setattr(routes, "of_add_relu", lambda a: routes.Route(routes.STOCK))
    monkeypatch.delattr(operators, "chain")
    monkeypatch.delattr(operators, "add_relu")
    conv, bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3).train(training)
    ours, x = copy.deepcopy(bn), torch.randn(4, 3, 9, 9)
    vectors = ours.weight, ours.bias, ours.running_mean, ours.running_var
    found = resnet_fused.functional.conv_bn_relu(x, conv.weight, *vectors, training=training, momentum=0.3)
    assert torch.equal(found, bn(conv(x)).relu())
    assert torch.equal(ours.running_mean, bn.running_mean) and torch.equal(ours.running_var, bn.running_var)
    assert torch.equal(resnet_fused.functional.add_relu(found, found), (found + found).relu())


def test_one_section_of_a_table_leaves_the_other(tmp_path: Path) -> None:
    path, entry = tmp_path / "table.json", routes.Entry("stock", 2.0, {"cuda": 3.0})
    tables.write(path, "entries", {"k": {"config": [64, 64, 32, 4, 3], "us": 1}})
    routes.add(path, {"a": entry})
    routes.add(path, {"b": entry})
    assert routes.read(path) == {"a": entry, "b": entry}
    assert list(tables.parse(path.read_text(encoding="utf-8"))["entries"]) == ["k"]
