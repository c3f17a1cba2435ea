"""``resnet-fused tune --mode infer`` for folded convolutions, on a GPU that is not there: what wins, what is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_cases import narrow_network
from folded_cases import as_on_a_gpu, question
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import (
    cli,
    clock,
    folded_gpu,
    models,
    optimize_for_inference,
    routes,
    tables,
    tune,
    tune_folded,
    tune_routes,
)
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.folded_gpu import PROVIDERS, Layer, Provider
from resnet_fused.tune_folded import Trial, collect

pytest.importorskip("rich", reason="the command's table needs rich")
pytest.importorskip("triton", reason="the command names Triton's kernels")
FP32 = torch.float32


class MadeUpClock:
    """The providers named in ``fast`` take 10 µs in turn and a little more, the others 100."""

    fast: tuple[str, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self.prepared = 0

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        self.prepared += 1
        us = 10.0 if call.args[0] in self.fast else 100.0  # type: ignore[attr-defined]
        return lambda: us + self.prepared


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The user's, not there yet."""
    as_on_a_gpu(monkeypatch, {"cudnn": AtenKernels()})
    monkeypatch.setattr(clock, "Clock", MadeUpClock)
    monkeypatch.setattr(tune, "gpu_to_measure", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune_folded, "SAMPLES", 1)
    monkeypatch.setattr(MadeUpClock, "fast", ("passes",))
    monkeypatch.setitem(models.BUILDERS, "resnet50", narrow_network)
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
    routes.reload()
    yield tmp_path / "mine.json"
    monkeypatch.undo()
    routes.reload()


def folded_routes(table: Path) -> dict[str, routes.Entry]:
    return {key: entry for key, entry in routes.read(table).items() if key.startswith("folded ")}


def run(*arguments: str) -> int:
    return cli.main(
        [
            "tune",
            "--only",
            "routes",
            "--mode",
            "infer",
            "--batch",
            "2",
            "--image-size",
            "64",
            "--dtype",
            "fp32",
            *arguments,
        ]
    )


def test_what_was_measured_is_what_runs(table, monkeypatch, capsys):
    assert run() == 0
    found = folded_routes(table)
    shown = capsys.readouterr().out
    assert {entry.choice for entry in found.values()} == {"passes"}
    assert all({"stock", "passes", "cudnn", "space_to_depth"} >= {e.choice, *e.others} for e in found.values())
    assert f"{len(found)} of {len(found)} folded convolutions" in shown
    ran: list[str] = []
    for name, provider in PROVIDERS.items():

        def counted(*args, name=name, provider=provider):
            ran.append(name)
            return provider.run(*args)

        monkeypatch.setitem(PROVIDERS, name, Provider(provider.applies, counted, provider.spreads))
    optimised = optimize_for_inference(narrow_network(), FP32)
    optimised(torch.randn(2, 3, 64, 64))
    assert ran == ["passes"] * 20
    optimised(torch.randn(2, 3, 96, 64))  # which nobody measured
    assert ran[20:] == ["stock"] * 20


def test_stock_stays_where_it_is_the_fastest(table, monkeypatch):
    monkeypatch.setattr(MadeUpClock, "fast", ("stock",))
    asked = question("3x3", "all", FP32)
    entry = tune_folded.tune(asked, MadeUpClock(torch.device("cpu")), table, print)
    assert (entry.choice, set(entry.others)) == ("stock", {"passes", "cudnn"})
    assert routes.read(table) == {asked.key: entry}


def test_training_has_no_folded_convolutions(table, monkeypatch):
    monkeypatch.setattr(tune_routes, "ADD_RELU_SHAPE", (8, 4, 4))
    assert run("--mode", "train") == 0
    assert routes.read(table) and not folded_routes(table)


def test_alike_convolutions_are_measured_once(table, monkeypatch):
    network = optimize_for_inference(narrow_network(), cuda_graph=True)
    monkeypatch.setattr(network, "_recorded", None)  # a graph would call no hooks
    found = collect(network, torch.randn(2, 3, 32, 32))
    names = [question.name for question in found]
    assert len(set(names)) == len(names) < 20
    assert names[:3] == ["2x3x32x32 8x3x7x7/2:b", "2x8x8x8 4x8x1x1/1:br", "2x4x8x8 4x4x3x3/1:br"]
    assert "2x4x8x8 16x4x1x1/1:b+r" in names
    assert not any(module._forward_pre_hooks for module in network.modules())


# Wrong providers


def planted(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Tensor], name: str = "passes") -> None:
    monkeypatch.setitem(PROVIDERS, name, Provider(lambda x, layer: True, run, PROVIDERS[name].spreads))


def right(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return folded_gpu.plain(x, layer.weight, layer.bias, layer.conv, residual, layer.relu)


def drops_nan(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """As ``fmax(0, y)`` does."""
    return right(x, layer, residual).nan_to_num(0.0, float("inf"), float("-inf"))


def saturates(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    y = right(x, layer, residual)
    return torch.where(y.isinf(), torch.finfo(y.dtype).max, y)


def infinity_is_nan(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    """As a product of it with a zero is."""
    y = right(x, layer, residual)
    return torch.where(y.isinf(), float("nan"), y)


def spreads_nan(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    y = right(x, layer, residual)
    return torch.where(y.isfinite(), y + 0 * F.max_pool2d(y, 3, 1, 1), y)


def a_tile_wrong(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    y = right(x, layer, residual)
    y[-1, -1, -1, -1] += 0.25
    return y


def without_residual(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return right(x, layer, None)


def another_shape(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    return right(x, layer, residual)[:, :, :-1]


def no_engine(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
    raise RuntimeError("GET was unable to find an engine\nto execute this computation")


@pytest.mark.parametrize(
    "wrong, told",
    [
        (drops_nan, "wrong: NaN is lost"), (saturates, "wrong: an infinity is lost"),
        (infinity_is_nan, "wrong: an infinity is lost"),
        (spreads_nan, "wrong: NaN or an infinity where stock has a number"), (a_tile_wrong, "wrong: error"),
        (without_residual, "wrong: error"), (another_shape, "gives (2, 24, 4, 7)"),
        (no_engine, "fails: RuntimeError: GET was unable to find an engine"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_wrong_is_told(table, monkeypatch, wrong, told, dtype):
    trial = Trial(question("pointwise", "all", dtype))
    x, residual = trial.x.clone(), trial.residual.clone()
    assert trial.wrong(trial.names()) == {}
    planted(monkeypatch, wrong)
    found = trial.wrong(trial.names())
    assert set(found) == {"passes"} and found["passes"].startswith(told)
    assert torch.equal(trial.x, x) and torch.equal(trial.residual, residual)


def test_cudnn_is_left_out_where_it_drops_nan(table, monkeypatch, capsys):
    monkeypatch.setattr(MadeUpClock, "fast", ("cudnn",))
    monkeypatch.setattr(
        torch, "cudnn_convolution_relu", lambda x, w, b, *geometry: F.conv2d(x, w, b, *geometry).nan_to_num(0).relu()
    )
    assert run() == 0
    shown = capsys.readouterr().err
    assert "2x8x16x16 4x8x1x1/1:br: cudnn wrong: NaN is lost" in shown
    choices = {key.split()[4]: entry for key, entry in folded_routes(table).items()}
    assert choices["4x8x1x1/1:br"].choice == "stock" and "cudnn" not in choices["4x8x1x1/1:br"].others
    assert choices["16x4x1x1/1:b+r"].choice == "cudnn"  # of add_relu, which keeps it


def test_space_to_depth_may_spread_by_a_pixel_and_not_further(table, monkeypatch):
    trial = Trial(question("stem", "all", FP32))
    assert trial.wrong(["space_to_depth"]) == {}
    monkeypatch.setitem(
        PROVIDERS, "space_to_depth", Provider(lambda *_: True, PROVIDERS["space_to_depth"].run, spreads=False)
    )
    assert trial.wrong(["space_to_depth"]) == {"space_to_depth": "wrong: NaN or an infinity where stock has a number"}

    def further(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        y = right(x, layer, residual)
        return torch.where(y.isfinite(), y + 0 * F.max_pool2d(y, 5, 1, 2), y)

    monkeypatch.setitem(PROVIDERS, "space_to_depth", Provider(lambda *_: True, further, spreads=True))
    assert "space_to_depth" in trial.wrong(["space_to_depth"])


def test_an_illegal_access_is_no_providers_fault(table, monkeypatch):
    def spoilt(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    planted(monkeypatch, spoilt)
    with pytest.raises(torch.AcceleratorError):
        Trial(question("pointwise", "all", FP32)).wrong(["passes"])


def test_an_interrupt_keeps_what_is_done(table, monkeypatch, capsys):
    prepare = MadeUpClock.prepare

    def interrupted(self, call):
        if self.prepared == 7:
            raise KeyboardInterrupt
        return prepare(self, call)

    timer = MadeUpClock(torch.device("cpu"))
    monkeypatch.setattr(MadeUpClock, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_folded.tune_network(optimize_for_inference(narrow_network()), torch.randn(2, 3, 32, 32), timer, table)
    assert 0 < len(folded_routes(table)) < 7
    assert "folded convolutions" in capsys.readouterr().out
