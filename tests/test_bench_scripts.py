"""The scripts under ``benchmarks/`` that train and that weigh, with tiny settings."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich", reason="the scripts' tables need rich")
FOLDER = Path(__file__).parent.parent / "benchmarks"


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(FOLDER))  # as for a script: they import one another
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def script(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_idx(path: Path, values: Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    raw = bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Ten training and six test pictures, as torchvision's datasets lay them out."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count, suffix in (("train", 10, ""), ("t10k", 6, ".gz")):
        write_idx(raw / f"{part}-images-idx3-ubyte{suffix}", torch.randint(256, (count, 28, 28), dtype=torch.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte{suffix}", (torch.arange(count) % 3).byte())
    return tmp_path / "data"


@pytest.mark.slow
def test_training(idx_folder: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    common = ["--network", "resnet18", "--seeds", "3", "--batch", "4", "--results", str(tmp_path)]
    arguments = [*common, "--steps", "2", "--data", str(idx_folder), "--providers", "stock", "fused"]
    shown = script("bench_training", *arguments)
    assert "resnet18" in shown and "points to stock" in shown
    losses, finished = read(tmp_path / "training_losses.csv"), read(tmp_path / "training_accuracy.csv")
    assert [(row["provider"], row["step"]) for row in losses] == [
        (provider, step) for provider in ("stock", "fused") for step in "01"
    ]
    # The same weights and the same batch: the first losses differ by rounding only.
    first = {row["provider"]: float(row["loss"]) for row in losses if row["step"] == "0"}
    assert first["fused"] == pytest.approx(first["stock"], rel=1e-3)
    assert [row["provider"] for row in finished] == ["stock", "fused"]
    for row in finished:
        assert (row["dataset"], row["seed"], row["size"], row["test_images"]) == ("idx files", "3", "32", "6")
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["step_s"]) > 0
        own = [float(entry["loss"]) for entry in losses if entry["provider"] == row["provider"]]
        assert float(row["final_loss"]) == pytest.approx(sum(own) / 2, rel=1e-3)
    assert (tmp_path / "training_curves.png").stat().st_size > 0

    bench_training = imported("bench_training", monkeypatch)
    assert bench_training.main([*arguments, "stock_nchw"]) == 0  # only what is missing is run
    assert "2 of 3 runs" in capsys.readouterr().out
    assert [row["provider"] for row in read(tmp_path / "training_accuracy.csv")] == ["stock", "fused", "stock_nchw"]
    (tmp_path / "training_curves.png").unlink()
    assert bench_training.main(["--plot", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "training_curves.png").stat().st_size > 0
    assert (
        bench_training.main([*common, "--steps", "3", "--data", str(idx_folder)]) == 2
    )  # averages of one setting only
    assert "steps 2" in capsys.readouterr().err


def test_training_runs_on_digits_too(monkeypatch):
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    data = imported("labelled_images", monkeypatch).load("digits")
    assert (data.name, len(data.train_x) + len(data.test_x), int(data.train_x.max())) == ("digits", 1797, 255)
    x = data.batch(data.train_x[:200], 48, torch.channels_last)
    assert x.shape == (200, 3, 48, 48) and x.is_contiguous(memory_format=torch.channels_last)
    assert abs(float(x.mean())) < 0.1


def test_training_schedule_and_batches(monkeypatch):
    bench_training = imported("bench_training", monkeypatch)
    rates = [bench_training.learning_rate(step, 300) for step in range(300)]
    assert max(rates) == rates[14] == 1 and 0 < rates[0] < rates[7] and 0 < rates[-1] < 1e-3
    one, again, other = (bench_training.batches(10, 4, 5, seed) for seed in (0, 0, 1))
    assert len(one) == 5 and all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))
    assert len(torch.cat(one[:2]).unique()) == 8  # an epoch shows no image twice


@pytest.mark.slow
def test_memory(tmp_path: Path):
    path = tmp_path / "memory.csv"
    sizes = ["--batch", "2", "--size", "32", "--dtype", "fp32", "--results-file", str(path)]
    shown = script("bench_memory", "--network", "resnet18", "--detail", *sizes)
    assert "2×64×8×8" in shown and "kept for backward" in shown
    stock, fused = read(path)
    assert (stock["provider"], fused["provider"], stock["saved_ratio"]) == ("stock", "fused", "1.0000")
    ratio = int(stock["saved_bytes"]) / int(fused["saved_bytes"])
    assert float(fused["saved_ratio"]) == pytest.approx(ratio, abs=1e-3)
    if sys.platform == "linux":
        # Eleven million gradients in fp32 are part of the peak.
        assert all(float(row["rss_peak_mib"]) > 40 > float(row["rss_forward_mib"]) for row in (stock, fused))


def test_kept_bytes_are_storages_counted_once_without_parameters(monkeypatch):
    bench_memory = imported("bench_memory", monkeypatch)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x.flatten(1)).relu()
            return y * y + 0 * x.new_zeros(1000).requires_grad_()[:5].sigmoid()

    x, target = torch.randn(2, 3, 2, 2), torch.zeros(2, dtype=torch.long)
    kept = bench_memory.kept_for_backward(Network(), x, target, torch.float32)
    # The input; ReLU's output, saved three times; sigmoid's output; log_softmax's output; labels and their total weight.
    assert sum(count * key[0] for key, count in kept.items()) == 96 + 40 + 20 + 40 + 16 + 4


@pytest.mark.parametrize("name", ["bench_training", "bench_memory"])
def test_unknown_network(name: str, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        imported(name, monkeypatch).main(["--network", "resnet51"])
    assert ended.value.code == 2
    assert "unknown network 'resnet51', did you mean 'resnet50'?" in capsys.readouterr().err


def test_predicted_launches(monkeypatch, capsys, tmp_path: Path):
    pytest.importorskip("triton", reason="its kernels are described in Triton")
    bench_triton = imported("bench_triton", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = tmp_path / "rows.csv"
    arguments = ["--model", "resnet18", "--batch", "8", "--results-file", str(rows)]
    assert bench_triton.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "PREDICTED by the cost model for an H200: nothing was measured" in shown
    lines = [
        line.split()
        for line in shown.splitlines()
        if line.split()[:1] and line.split()[0] in sum(bench_triton.FAMILIES.values(), ())
    ]
    assert {line[0] for line in lines} >= {"fprop3x3", "dgrad3x3", "wgrad3x3", "gram", "bn_act", "pool_backward"}
    assert all(line[-1] == "predicted" and 0 < float(line[-2]) <= 1 for line in lines)
    assert not rows.exists()
    assert bench_triton.main(["--family", "conv3x3", "--mode", "infer", "--gpu", "A100", "--batch", "8"]) == 0
    shown = capsys.readouterr().out
    assert "for an A100" in shown and "fprop3x3" in shown and "fprop1x1" not in shown
    with pytest.raises(SystemExit) as ended:
        bench_triton.main(["--gpu", "H300"])
    assert ended.value.code == 2
    assert "--gpu: expected one of A100, H100, H200, B200, got 'H300'" in capsys.readouterr().err
