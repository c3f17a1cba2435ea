"""``benchmarks/check_gpu.py`` without a GPU: what has a meaning there runs, and the checks of a GPU with a pretended one.

A check that cannot fail is none: each is shown something that is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from block_cases import narrow_network
from test_bench_scripts import imported
from torch import nn

import resnet_fused
from resnet_fused import backends, networks
from resnet_fused.backends.aten import AtenKernels

pytest.importorskip("rich", reason="the scripts' tables need rich")
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """With a narrow network in place of a ResNet."""
    monkeypatch.delitem(sys.modules, "step_answers", raising=False)
    module = imported("check_gpu", monkeypatch)

    def network(self: Any, fused: bool = True, clear: bool = True) -> nn.Module:
        torch.manual_seed(0)
        model = narrow_network()
        model.fc = nn.Linear(48, 10)
        if clear:
            networks.hold_clear_of_kinks(model)
        model = resnet_fused.fuse(model) if fused else model
        return networks.in_layout(model, torch.channels_last).train()

    monkeypatch.setattr(module.Setting, "network", network)
    yield module
    torch._dynamo.reset()


def test_on_a_processor(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    quick = [name for name in script.CHECKS if name not in ("fall-back ladder", "torch.compile", "autocast")]
    assert script.main(["--device", "cpu", "--small", "--backend", "aten", "--only", *quick]) == 0
    shown = capsys.readouterr().out
    assert "2 ok, 0 FAILED" in shown
    assert shown.count("left out") == len(quick) - 2 and "CUDA graphs need a GPU" in shown


@pytest.mark.slow
def test_all_of_it_on_a_processor(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--device", "cpu", "--small"]) == 0
    assert "0 FAILED" in capsys.readouterr().out


def test_a_wrong_backend(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    wgrad = AtenKernels.wgrad
    monkeypatch.setattr(AtenKernels, "wgrad", lambda *args: wgrad(*args) * 1.001)
    assert script.main(["--device", "cpu", "--small", "--backend", "aten", "--only", "odd inputs"]) == 1
    shown = capsys.readouterr()
    assert "0 ok, 1 FAILED" in shown.out and "weight is off by" in shown.out and "FAILED: odd inputs, aten" in shown.err


def test_an_exception_is_a_failure_and_a_lost_gpu_ends_the_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(setting: Any) -> str:
        raise RuntimeError("no such kernel\nand more")

    def lost(setting: Any) -> str:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(script, "CHECKS", {"a": broken, "b": lost, "c": lambda setting: "seen"})
    setting = script.Setting(CPU, True)
    assert script.run(["a", "c"], ["aten"], setting) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
    assert script.run(["b", "c"], ["aten"], setting) == 1
    assert "0 ok, 1 FAILED, 1 not run" in capsys.readouterr().out


def test_wrong_arguments(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    for arguments, told in ((["--only", "nothing"], "unknown check"), (["--backend", "tpu"], "got 'tpu'")):
        with pytest.raises(SystemExit) as ended:
            script.main(["--device", "cpu", *arguments])
        assert ended.value.code == 2 and told in capsys.readouterr().err


# A GPU is pretended: a replay calls again what was captured


@pytest.fixture
def gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = call()
        return (lambda: result.copy_(call())), result

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(script, "captured", captured)
    monkeypatch.setattr(script.Setting, "needs_gpu", lambda self, why: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "memory_allocated": lambda device: 2**20,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return script


GRAPHS = ["training as a graph", "inference as a graph", "side stream"]


@pytest.mark.parametrize("name", [*GRAPHS, "TF32"])
def test_what_needs_a_gpu(name: str, gpu: ModuleType) -> None:
    state, told = gpu.outcome(gpu.CHECKS[name], gpu.Setting(CPU, True), "aten")
    assert (state, bool(told)) == ("ok", True), told


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_graph_may_do_wrong(name: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that notices how often it was called gives other bits."""
    calls = []
    original = AtenKernels.fprop

    def fprop(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args) * (1 + 1e-3 * (len(calls) > 40))

    monkeypatch.setattr(AtenKernels, "fprop", fprop)
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: conv2d(*args) + 1e-6 * len(calls))
    state, told = gpu.outcome(gpu.CHECKS[name], gpu.Setting(CPU, True), "aten")
    assert state == "FAILED" and "other bits" in told


def test_a_leak(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out = iter((2**20, 2**20 + 512))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(handed_out))
    state, told = gpu.outcome(gpu.memory, gpu.Setting(CPU, True), "aten")
    assert (state, told) == ("FAILED", "+512 bytes after seven steps")


def test_tf32_that_stock_does_not_use(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fprop = AtenKernels.fprop
    monkeypatch.setattr(AtenKernels, "fprop", lambda *args: (fprop(*args) * 1024).round() / 1024)
    before = torch.backends.cudnn.conv.fp32_precision
    state, told = gpu.outcome(gpu.tf32, gpu.Setting(CPU, True), "aten")
    assert state == "FAILED" and told.startswith("ieee: ")
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_second_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gpu, "worst_share", lambda device, dtypes: asked.append(device) or 0.5)
    for count, expected in ((1, ("left out", "there is one GPU")), (2, ("ok", "0.50 of the limit"))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert gpu.outcome(gpu.second_gpu, gpu.Setting(CPU, True), "aten") == expected
    assert asked == [torch.device("cuda", 1)]


def test_losses_that_do_not_fall(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    state, told = script.outcome(script.autocast, script.Setting(CPU, True), "aten")
    assert state == "FAILED" and "bfloat16: losses" in told


def test_a_graph_without_fused_operators(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    network = script.Setting.network
    monkeypatch.setattr(script.Setting, "network", lambda self: network(self, fused=False))
    assert script.outcome(script.compiled, script.Setting(CPU, True), "aten") == (
        "FAILED",
        "no fused operator in the graph",
    )


def test_the_ladder(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"aten": (0, ""), "cuda": (1, f"RuntimeError: {backends.unavailable_backends()['cuda']}"), "triton": (0, "")}
    reasons = {"cuda": backends.unavailable_backends()["cuda"]}

    def run(command: list[str], env: dict[str, str], **kwargs: Any) -> SimpleNamespace:
        assert "odd inputs" in command
        code, told = done[env[backends.ENVIRONMENT_VARIABLE]]
        return SimpleNamespace(returncode=code, stdout="", stderr=told)

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(backends, "unavailable_backends", lambda: reasons)
    setting = script.Setting(CPU, True)
    assert script.outcome(script.ladder, setting, "aten") == ("ok", "aten ran, cuda said why not, triton ran")
    done["triton"] = (1, "odd inputs is off")
    assert script.outcome(script.ladder, setting, "aten") == ("FAILED", "triton: odd inputs is off")
    done["triton"], done["cuda"] = (0, ""), (0, "")
    assert script.outcome(script.ladder, setting, "aten")[0] == "FAILED"
