"""What users do to a ResNet besides calling it: each row works on the fused network as on torchvision's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from stock_pairs import assert_same, assert_same_step, blocks, images, networks, step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils

import resnet_fused
from resnet_fused.testing import import_torchvision

torchvision = import_torchvision()
RESNET18 = (2, 2, 2, 2)


def test_network_is_fused_and_agrees(fused_calls: list[str]) -> None:
    ours, stock = networks(RESNET18)
    assert_same_step(ours, stock, images())
    assert fused_calls == ["NONE"] + ["IDENTITY"] * 2 + ["PROJECTION", "IDENTITY"] * 3
    assert_same_step(ours.eval(), stock.eval(), images())


def test_names_and_their_order_are_stock() -> None:
    ours, stock = networks(RESNET18)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        assert [name for name, _ in getattr(ours, kind)()] == [name for name, _ in getattr(stock, kind)()]


# Saving and loading


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_a_file(saved: object, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def _saved_whole(model: nn.Module) -> nn.Module:
    return _through_a_file(model, weights_only=False)


def _safe_load(model: nn.Module) -> nn.Module:
    copied, _ = networks()
    copied.load_state_dict(_through_a_file(model.state_dict(), weights_only=True))
    return copied


def _safetensors(model: nn.Module) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    copied, _ = networks()
    copied.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    return copied


def _meta_device(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        copied = resnet_fused.ResNet(resnet_fused.BasicBlock, (1, 1, 1, 1), num_classes=10)
    assert copied(torch.empty(2, 3, 40, 40, device="meta")).shape == (2, 10)
    copied.load_state_dict(model.state_dict(), assign=True)
    return copied


@pytest.mark.parametrize("copying", [copy.deepcopy, _pickled, _saved_whole, _safe_load, _safetensors, _meta_device])
def test_copies_give_the_same_results(copying: Callable[[nn.Module], nn.Module]) -> None:
    ours, stock = networks()
    copied = copying(ours).train()
    assert_same_step(copied, stock, images())
    if copying is not _meta_device:
        ours.conv1.weight.data.zero_()
        assert copied.conv1.weight.abs().max() > 0


# Tracing and export


@pytest.mark.parametrize("training", [True, False])
def test_fx_trace(training: bool) -> None:
    ours, stock = (m.train(training) for m in networks(RESNET18))
    traced, expected = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(stock)
    nodes = [[(n.op, n.name, n.target) for n in t.graph.nodes if n.op != "call_function"] for t in (traced, expected)]
    assert nodes[0] == nodes[1]
    assert [n.name for n in traced.graph.nodes] == [n.name for n in expected.graph.nodes]
    assert_same_step(traced, stock, images())


def test_feature_extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours, stock = networks(RESNET18)
    assert get_graph_node_names(ours) == get_graph_node_names(stock)
    taps = ["relu", "layer1.0.add", "layer2.0.bn2", "layer3", "layer4.1.relu_1", "flatten"]
    assert_same(create_feature_extractor(ours, taps)(images()), create_feature_extractor(stock, taps)(images()))


def test_intermediate_layer_getter(fused_calls: list[str]) -> None:
    from torchvision.models._utils import IntermediateLayerGetter

    taps = {name: name for name in ("conv1", "bn1", "maxpool", "layer1", "layer4")}
    ours, stock = networks()
    assert_same(IntermediateLayerGetter(ours, taps)(images()), IntermediateLayerGetter(stock, taps)(images()))
    assert len(fused_calls) == 4


def test_jit_trace() -> None:
    ours, stock = (m.eval() for m in networks())
    traced = torch.jit.trace(ours, images())
    assert "resnet_fused::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images(3, seed=5)), stock(images(3, seed=5)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict: bool) -> None:
    ours, stock = (m.eval() for m in networks())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (images(4),), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (1, 5):
        torch.testing.assert_close(loaded(images(n)), stock(images(n)))


def test_onnx_export() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx_reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    ours, stock = (m.eval() for m in blocks())
    x = torch.randn(2, 4, 7, 9)
    ours, stock = ours.float(), stock.float()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(ours, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    proto = program.model_proto
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert {"Conv", "Relu"} <= {node.op_type for node in proto.graph.node}
    x = torch.randn(3, 4, 7, 9)
    (out,) = onnx_reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), stock(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compile_fullgraph(training: bool) -> None:
    ours, stock = (m.train(training) for m in networks())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for _ in range(2):
        assert_same(step(compiled, images(), ours), step(stock, images()))
    (graph,) = counter.graphs
    assert graph.code.count("torch.ops.resnet_fused.chain") == 5  # the stem and a block of each stage
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(3)), stock(images(3)))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_inductor() -> None:
    ours, stock = blocks()
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert_same(step(torch.compile(ours, fullgraph=True), x, ours), step(stock, x))


# Layouts, dtypes, determinism


def test_channels_last_and_contiguous_agree() -> None:
    results = []
    for model_format in (torch.channels_last, torch.contiguous_format):
        for input_format in (torch.channels_last, torch.contiguous_format):
            ours, stock = (m.to(memory_format=model_format) for m in networks())
            results.append(step(ours, images().contiguous(memory_format=input_format)))
            assert_same(results[-1], step(stock, images().contiguous(memory_format=input_format)))
    sliced = torch.cat([images(), images()], dim=3)[..., ::2]
    assert_same(step(networks()[0], sliced), step(networks()[1], sliced))


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    a, b = (torch.cat([d[n].double().flatten() for n in exact if n.endswith("grad")]) for d in (found, exact))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, fused_calls: list[str]) -> None:
    exact = step(networks()[1], images())
    results = []
    for model in networks(dtype=torch.float32):
        with torch.autocast("cpu", dtype=dtype):
            results.append(step(model, images(dtype=torch.float32)))
    ours, stock = results
    assert len(fused_calls) == 5
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}
    assert ours["out"].dtype == dtype and ours["conv1.weight grad"].dtype == torch.float32
    assert _error(ours, exact) <= 1.5 * _error(stock, exact) + 1e-3


def test_grad_scaler() -> None:
    found = []
    for model in networks():
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(images()).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(dict(model.state_dict()))
    assert_same(*found)


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(networks(dtype=torch.float32)[0], images(dtype=torch.float32)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


# Changed networks: what is fused no longer is called, module by module


def test_averaged_model_and_update_bn() -> None:
    found = []
    for model in networks():
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(2):
            optimizer.zero_grad()
            model(images(seed=seed)).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
        swa_utils.update_bn([images(seed=3), images(seed=4)], averaged)
        found.append(dict(averaged.state_dict()) | {"out": averaged.eval()(images())})
    assert_same(*found)


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_is_noticed(training: bool, fused_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = (nn.SyncBatchNorm.convert_sync_batchnorm(m).train(training) for m in networks())
    calls: list[nn.Module] = []
    forward = nn.SyncBatchNorm.forward

    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", counted)
    expected = step(stock, images())
    stock_calls = len(calls)
    assert_same(step(ours, images()), expected)
    assert (
        stock_calls == 12 and len(calls) == 12 and len(fused_calls) == 5
    )  # tests/test_distributed.py has several ranks


_PATCHED = ["conv1", "bn1", "relu", "maxpool", "layer1.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample"]


@pytest.mark.parametrize("name", _PATCHED)
def test_patched_forward_is_called(name: str) -> None:
    results = []
    for model in networks():
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda x, forward=forward: forward(x) * 0.5
        results.append(step(model, images()))
    assert_same(*results)


_OTHER_NORMS = {
    "group": lambda channels: nn.GroupNorm(2, channels),
    "frozen": torchvision.ops.misc.FrozenBatchNorm2d,
    "no affine": partial(nn.BatchNorm2d, affine=False),
    "no running statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "identity": lambda channels: nn.Identity(),
    "momentum None": partial(nn.BatchNorm2d, momentum=None),
    "eps": partial(nn.BatchNorm2d, eps=0.1),
}


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("norm", _OTHER_NORMS)
def test_other_norms(norm: str, project: bool, fused_calls: list[str]) -> None:
    ours, stock = blocks(_OTHER_NORMS[norm], project)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    for training in (True, True, False):
        assert_same_step(ours.train(training), stock.train(training), x)
    assert len(fused_calls) == (3 if norm in ("momentum None", "eps", "frozen") else 0)


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_network_with_norm_layer(norm: str, fused_calls: list[str]) -> None:
    ours, stock = networks(norm_layer=_OTHER_NORMS[norm], zero_init_residual=True)
    assert_same_step(ours, stock, images())
    assert len(fused_calls) == (5 if norm == "frozen" else 0)


def _prune(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "weight", amount=0.5)


_REPARAMETRISED = [torch.nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm, _prune]


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", _REPARAMETRISED)
@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "layer2.0.downsample.0"])
def test_reparametrised_filters(change: Callable[[nn.Module], object], name: str, fused_calls: list[str]) -> None:
    ours, stock = networks()
    for model in (ours, stock):
        torch.manual_seed(0)
        change(model.get_submodule(name))
    assert_same_step(ours, stock, images())
    assert len(fused_calls) == 4
    if change is _prune:
        prune.remove(ours.get_submodule(name), "weight")
        prune.remove(stock.get_submodule(name), "weight")
        assert_same_step(ours, stock, images())
        assert len(fused_calls) == 9


_HOOKED = ["conv1", "bn1", "relu", "maxpool", "layer1.0.relu", "layer2.0.downsample", "layer3.0.bn2", "layer4"]


@pytest.mark.parametrize("name", _HOOKED)
def test_forward_hooks(name: str) -> None:
    seen: list[list[Tensor]] = [[], []]
    results = []
    for model, record in zip(networks(), seen, strict=True):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, record=record: record.append(args[0].clone()))
        module.register_forward_hook(lambda _, args, out: out * 0.5)
        results.append(step(model, images()))
    assert_same(*results)
    assert len(seen[0]) > 0
    assert_same(*(dict(enumerate(record)) for record in seen))


@pytest.mark.parametrize("method", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "layer2.0.downsample", "layer2.0.downsample.0", "layer4"])
def test_backward_hooks(name: str, method: str) -> None:
    results = []
    for model in networks():
        calls: list[Tensor] = []

        def hook(module: nn.Module, *grads, calls=calls):
            calls.append(grads[-1][0].clone())
            return (grads[0][0] * 0.5,)

        getattr(model.get_submodule(name), method)(hook)
        results.append(step(model, images()) | {f"call {i}": g for i, g in enumerate(calls)})
    assert "call 0" in results[0]
    assert_same(*results)


def test_global_hooks_see_every_module() -> None:
    called = []
    for model in networks():
        names = {module: name for name, module in model.named_modules()}
        called.append([])
        record = called[-1]
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, *_, names=names, record=record: record.append(names[m])
        )
        with handle:
            model(images())
    assert sorted(called[0]) == sorted(called[1]) and "layer2.0.downsample" in called[0]


def test_distributed_data_parallel() -> None:
    ours, stock = networks()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert_same(step(nn.parallel.DistributedDataParallel(ours), images(), ours), step(stock, images()))
    finally:
        torch.distributed.destroy_process_group()
