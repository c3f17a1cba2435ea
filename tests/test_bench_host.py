"""``benchmarks/bench_host.py``: what is counted is what a block launches."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_bench_scripts import imported

pytest.importorskip("rich", reason="the scripts' tables need rich")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("bench_host", monkeypatch)


def test_rows(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(script, "CALLS", 1)
    path = tmp_path / "rows.csv"
    threads = torch.get_num_threads()
    assert script.main(["--device", "cpu", "--repeats", "2", "--results-file", str(path)]) == 0
    torch.set_num_threads(threads)
    assert "an upper bound" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert tuple(rows[0]) == script.COLUMNS
    assert {row["op"] for row in rows} == set(script.BLOCKS) and {row["mode"] for row in rows} == {"forward", "train"}
    for row in rows:
        times, launches = float(row["host_us"] or 0), int(row["launches"] or 0)
        assert (times > 0) != (launches > 0)  # nothing is timed that was only counted
        assert (row["device"] == "meta") == ("counted" in row["provider"])


def test_stock_modules_are_counted(script: ModuleType) -> None:
    model = script.stock_of("bottleneck")
    seen = script.counted(model, (1, 32, 4, 4), torch.bfloat16, "forward", None)
    assert dict(seen) == {"pytorch": 3 + 3 + 3 + 1}  # convolutions, batch norms, ReLUs, the addition


@pytest.mark.parametrize("own_conv3x3", [True, False])
def test_launches_of_triton_are_the_recorders(own_conv3x3: bool, script: ModuleType) -> None:
    """In inference a block is nothing but workloads, one launch each; ``workloads`` counts them in another way."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    from resnet_fused.backends.triton.dispatch import TritonKernels
    from resnet_fused.backends.triton.recorder import Recorder, without_launches
    from resnet_fused.workloads import _Plans

    make, shape = script.BLOCKS["bottleneck"]
    model = make().eval()
    seen = script.counted(model, shape, torch.bfloat16, "forward", TritonKernels(own_conv3x3))
    recorder = Recorder(own_conv3x3)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with _Plans(recorder), without_launches(), torch.no_grad():
        model.to("meta", torch.bfloat16)(x)
    assert seen["triton"] == sum(recorder.counts.values()) == 3


def test_the_backend_that_is_named_is_counted(script: ModuleType) -> None:
    """Without Triton every convolution but the 3×3's gradients is an operator of the extension."""
    kernels = script.counted_backends()["cuda without Triton"]
    make, shape = script.BLOCKS["basic"]
    calls = []
    for name in ("conv_stats", "conv_bn_act"):
        original = script.RESULTS[name]
        script.RESULTS[name] = lambda *args, name=name, original=original: calls.append(name) or original(*args)
    seen = script.counted(make(), shape, torch.bfloat16, "train", kernels)
    assert seen["triton"] == 0 and seen["extension"] > 10
    assert calls and set(calls) == {"conv_stats"}
