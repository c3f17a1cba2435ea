"""Synchronised norms and their converter where there is one process: what changes, what stays, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from stock_pairs import assert_same_step, blocks, images, networks
from torch import nn

import resnet_fused
from resnet_fused import collectives, norms, operators


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_a_plain_batch_norm(training: bool) -> None:
    ours, stock = (model.train(training) for model in networks())
    resnet_fused.convert_sync_batchnorm(ours)
    assert sum(type(module) is resnet_fused.SyncBatchNorm for module in ours.modules()) == 12
    assert_same_step(ours, stock, images())


def test_the_converter_keeps_what_a_module_has() -> None:
    model, _ = networks()
    model.bn1.register_forward_hook(lambda module, args, out: seen.append(module))
    model.layer1[0].bn1.note = "mine"
    before, seen = dict(model.named_modules()), []
    parameters, state = list(model.parameters()), model.state_dict()
    model.layer2.eval()
    converted = resnet_fused.convert_sync_batchnorm(model)
    assert converted is model
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert model.state_dict().keys() == state.keys()
    assert model.layer1[0].bn1.note == "mine" and not model.layer2[0].bn1.training and model.bn1.training
    model(images())
    assert seen == [model.bn1]
    alone = nn.BatchNorm2d(3)
    assert resnet_fused.convert_sync_batchnorm(alone) is alone and type(alone) is resnet_fused.SyncBatchNorm


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copying) -> None:
    """Unlike PyTorch's, which holds a process group that nobody can copy."""
    model = resnet_fused.convert_sync_batchnorm(nn.Sequential(resnet_fused.BNReLU2d(3), nn.BatchNorm1d(3)))
    model[1].group_name = "7"
    copied = copying(model)
    assert (copied[0].group_name, copied[1].group_name) == (collectives.WORLD, "7")
    assert "group_name='7'" in repr(copied[1]) and "group_name" not in repr(resnet_fused.BNReLU2d(3))


@pytest.mark.parametrize("kind", [resnet_fused.BNReLU2d, resnet_fused.BNAddReLU2d])
@pytest.mark.parametrize("converter", [resnet_fused.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_no_converter_drops_an_activation(converter, kind) -> None:
    model = nn.ModuleList([kind(3), nn.BatchNorm2d(3)])
    nn.init.normal_(model[0].weight)
    expected = copy.deepcopy(model[0])
    converted = converter(model)
    assert type(converted[0]) is kind and converted[0].group_name == collectives.WORLD
    assert converted.state_dict().keys() == {f"{i}.{name}" for i in "01" for name in expected.state_dict()}
    xs = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(1 + (kind is resnet_fused.BNAddReLU2d))]
    assert_same = torch.testing.assert_close
    assert_same(converted[0].double()(*xs), expected.double()(*xs))
    assert (converted[0](*xs) >= 0).all()


def test_pytorchs_norms_become_ours() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(3)))
    resnet_fused.convert_sync_batchnorm(model)
    assert [type(m) for m in model] == [resnet_fused.SyncBatchNorm] * 2 and not hasattr(model[0], "process_group")


def test_timms_norm_keeps_its_activation() -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    norm = layers.BatchNormAct2d(3)
    nn.init.normal_(norm.weight)
    expected, x = copy.deepcopy(norm), torch.randn(2, 3, 4, 5)
    resnet_fused.convert_sync_batchnorm(norm)
    assert type(norm) is norms.SyncBatchNormAct
    torch.testing.assert_close(norm(x), expected(x))
    assert (norm(x) >= 0).all()


class _Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def _patched() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize("make", [lambda: _Doubled(3), _patched, lambda: nn.LazyBatchNorm2d()])
def test_a_norm_that_does_more_is_refused_and_nothing_changed(make) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(make()))
    with pytest.raises(ValueError, match=r"^1\.0: expected a batch norm of torch\.nn, timm or resnet_fused, got "):
        resnet_fused.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="^model: "):
        resnet_fused.convert_sync_batchnorm(make())


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="expected a group that this process is in"):
        resnet_fused.SyncBatchNorm(3, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    norm = resnet_fused.SyncBatchNorm(3)
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        norm(torch.randn(3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.randn(1, 3, 1, 1))
    norm.group_name = "7"
    with pytest.raises(RuntimeError, match=r"process group '7': torch\.distributed is not initialised"):
        norm(torch.randn(2, 3, 4, 5))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        resnet_fused.convert_sync_batchnorm(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("converter", [resnet_fused.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
@pytest.mark.parametrize("before", [True, False])
def test_fuse_before_or_after(converter, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = operators.chain
    monkeypatch.setattr(operators, "chain", lambda *args: calls.append(args) or run(*args))
    _, stock = blocks()
    fused = copy.deepcopy(stock)
    fused = converter(resnet_fused.fuse(fused)) if before else resnet_fused.fuse(converter(fused))
    assert_same_step(fused, stock, torch.randn(2, 4, 7, 9, dtype=torch.float64))
    assert len(calls) == 1


def test_training_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fx has traced still goes over the processes: a call of its own stands for the norm."""
    ours, stock = networks()
    resnet_fused.convert_sync_batchnorm(ours)
    traced = torch.fx.symbolic_trace(ours)
    names = [node.name for node in traced.graph.nodes if node.target is norms.synchronised_batch_norm]
    assert len(names) == 12
    assert_same_step(traced, stock, images())
    evaluated = torch.fx.symbolic_trace(ours.eval())
    torch.testing.assert_close(evaluated(images()), stock.eval()(images()))


@pytest.mark.parametrize("converter", [resnet_fused.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_synchronised_norms_are_folded_for_inference(converter) -> None:
    ours, stock = (model.eval() for model in networks())
    fast = resnet_fused.optimize_for_inference(converter(ours))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fast.modules())
    torch.testing.assert_close(fast(images()), stock(images()))
