"""The command line: what each command prints, and what it says when it is asked wrongly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused
from resnet_fused import backends, console, images, info, networks, verify
from resnet_fused.cli import main
from resnet_fused.result_file import COLUMNS

rich = pytest.importorskip("rich", reason="the commands' tables need rich")
PIL = pytest.importorskip("PIL.Image", reason="pictures are decoded with pillow")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "noise.png"
    PIL.frombytes("RGB", (60, 40), bytes(pixels.flatten().tolist())).save(path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "three_classes.pth"
    torch.save(resnet_fused.resnet18(num_classes=3).state_dict(), path)
    return path


def test_info_names_backends_and_every_environment_variable(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for name in ("aten", "cpu", "triton", "cuda", *(row[0] for row in info.ENVIRONMENT)):
        assert name in shown


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["aten"] == "available"
    assert found["backends"]["cuda"] == backends.unavailable_backends()["cuda"]


def test_info_needs_no_rich(monkeypatch, capsys):
    monkeypatch.setattr(console, "has_rich", lambda: False)
    assert main(["info"]) == 0
    assert "RESNET_FUSED_BACKEND" in capsys.readouterr().out


def test_other_commands_say_how_to_get_rich(monkeypatch, capsys):
    monkeypatch.setattr(console, "has_rich", lambda: False)
    assert main(["verify"]) == 2
    assert "pip install resnet_fused[cli]" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"resnet_fused {resnet_fused.__version__}\n"


def test_verify_passes(capsys):
    assert main(["verify", "--model", "resnet18", "--dtype", "fp32"]) == 0
    assert "5 of 5 comparisons passed" in capsys.readouterr().out


def test_verify_notices_a_wrong_network(monkeypatch, capsys):
    right = networks.copy_of

    def scaled(name, values, num_classes, *, fused):
        model = right(name, values, num_classes, fused=fused)
        if fused:
            with torch.no_grad():
                model.layer3[0].bn2.weight[5] *= 1.01
        return model

    monkeypatch.setattr(networks, "copy_of", scaled)
    assert main(["verify", "--model", "resnet18", "--dtype", "fp32"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_reports_an_exception_as_a_failure(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(networks, "copy_of", broken)
    (found,) = verify.compare("resnet18", "train", "fp32", image_size=32)
    assert not found.passed
    assert "no such kernel" in found.problem


def test_plain_stock_is_torchvisions(monkeypatch):
    """Without torchvision the comparison is with the children called one by one; that must be the same network."""
    pytest.importorskip("timm", reason="torchvision may be missing too")
    torch.manual_seed(0)
    known = networks.stock_model("resnet18", 10).eval()
    monkeypatch.setattr(networks, "_torchvision", lambda: None)
    plain = networks.stock_model("resnet18", 10).eval()
    plain.load_state_dict(known.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), known(x))
    assert "plain" in networks.stock_source()


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_bench(mode, tmp_path, capsys):
    results = tmp_path / "rows.csv"
    arguments = ["bench", "--model", "resnet18", "--image-size", "64", "--batch", "2", "--mode", mode, "--repeats", "2"]
    arguments += ["--providers", "fused", "--results-file", str(results)]
    assert main([*arguments, "--no-memory"]) == 0
    assert "images/s" in capsys.readouterr().out
    rows = list(csv.DictReader(results.open()))
    assert [row["provider"] for row in rows] == ["stock", "fused", "fused again"]
    assert tuple(rows[0]) == COLUMNS
    assert all(float(row["p50_ms"]) > 0 and float(row["error_vs_fp64"]) < 0.1 for row in rows)


@pytest.mark.slow
def test_bench_without_the_covariance_plan(monkeypatch, tmp_path, capsys):
    """The provider of that name trains without a covariance, the one beside it with one; inference has nothing to compare."""
    from resnet_fused import backends, providers

    grams = []
    for kind in {type(backends.get(name)) for name in backends.available_backends()}:
        plain = kind.gram
        monkeypatch.setattr(
            kind, "gram", lambda *args, plain=plain, **kwargs: grams.append(1) or plain(*args, **kwargs)
        )
    setting = providers.Setting("resnet50", "train", "fp32", "cpu", 2, 64)
    source, x = networks.stock_model("resnet50"), torch.randn(2, 3, 64, 64)
    for name, expected in (("genstats", False), ("fused", True)):
        grams.clear()
        providers.build(name, source, setting).step(providers.batch_for(setting, x))
        assert bool(grams) is expected, name
    arguments = ["bench", "--model", "resnet18", "--image-size", "64", "--providers", "genstats"]
    assert main(arguments) == 2
    assert "genstats differs from fused in training only" in capsys.readouterr().err
    results = tmp_path / "rows.csv"
    arguments += ["--mode", "train", "--batch", "2", "--repeats", "1", "--no-memory", "--results-file", str(results)]
    assert main(arguments) == 0
    assert [row["provider"] for row in csv.DictReader(results.open())] == ["stock", "genstats"]


def test_bench_gives_a_wrong_answer_no_number(monkeypatch, tmp_path, capsys):
    from resnet_fused import providers

    right = providers.build

    def wrong(name, source, setting):
        made = right(name, source, setting)
        if name != "fused":
            return made
        return providers.Provider(made.network, lambda x: made.step(x) * 1.01)

    monkeypatch.setattr(providers, "build", wrong)
    results = tmp_path / "rows.csv"
    arguments = ["--model", "resnet18", "--image-size", "32", "--batch", "2", "--repeats", "1", "--providers", "fused"]
    assert main(["bench", *arguments, "--no-memory", "--results-file", str(results)]) == 1
    assert "WRONG ANSWER" in capsys.readouterr().err
    assert [row["provider"] for row in csv.DictReader(results.open())] == ["stock"]


def test_peak_memory_in_a_process_of_its_own():
    from resnet_fused import peak_memory, providers

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system keeps no resettable peak of the resident set")
    mib = peak_memory.measure("stock", providers.Setting("resnet18", "infer", "fp32", "cpu", 2, 64))
    assert mib is not None and 30 < mib < 600


def test_predict(picture, weights, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\n")
    arguments = ["--model", "resnet18", "--weights", str(weights), "--top-k", "5", "--labels", str(labels)]
    assert main(["predict", str(picture), *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(label in shown for label in ("ant", "bee", "cat"))


def test_predict_goes_on_after_an_unreadable_picture(picture, weights, tmp_path, capsys):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:60])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    paths = [str(damaged), str(text), str(tmp_path / "missing.png"), str(picture)]
    assert main(["predict", *paths, "--model", "resnet18", "--weights", str(weights)]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 3
    assert "class 0" in shown.out


def test_predict_says_that_random_weights_mean_nothing(picture, capsys):
    assert main(["predict", str(picture), "--model", "resnet18", "--random"]) == 0
    assert "RANDOM" in capsys.readouterr().err


def test_preprocessing_is_torchvisions(picture):
    torchvision = pytest.importorskip("torchvision", reason="compared with torchvision's preset")
    image = images.decode(picture)
    preset = torchvision.transforms._presets.ImageClassification(crop_size=224)
    ours, theirs = images.preprocess(image), preset(image)
    # Both round to 8 bits after resizing; a rounding may fall either way.
    assert (ours - theirs).abs().max() <= 1.01 / 255 / min(images.STD)


def test_tune_says_what_is_missing(monkeypatch, capsys):
    import importlib.util

    def said() -> str:
        assert main(["tune"]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert "Triton is not installed: pip install resnet_fused[triton]" in said()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else find_spec(name))
    assert "PyTorch sees no GPU" in said()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(backends._REASONS, "triton", "it needs an NVIDIA GPU of compute capability 8.0 or higher")
    assert "compute capability 8.0" in said()


def test_tune_never_runs_in_deterministic_mode(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.use_deterministic_algorithms(True)
    try:
        assert main(["tune"]) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert "deterministic algorithms are asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "--model", "resnet19"], "unknown model 'resnet19', did you mean 'resnet18'?"),
        (["verify", "--dtype", "int8"], "unknown dtype 'int8', expected one of fp64, fp32, bf16, fp16"),
        (["bench", "--batch", "0"], "expected a positive whole number, got '0'"),
        (["bench", "--image-size", "16"], "at least 32"),
        (["bench", "--images", "/no/such/folder"], "no such folder: /no/such/folder"),
        (["bench", "--results-file", "/no/such/folder/rows.csv"], "cannot write /no/such/folder/rows.csv"),
        (["bench", "--device", "nonsense"], "cannot use device 'nonsense'"),
        (["predict", "x.png"], "--weights is required"),
        (["predict", "x.png", "--weights", "/no/such/file.pth"], "no such file"),
        (["predict", "x.png", "--random", "--labels", "/no/such/labels"], "--labels: no such file"),
        (["tune", "--model", "resnet19"], "unknown model 'resnet19', did you mean 'resnet18'?"),
        (["tune", "--dtype", "fp64"], "unknown dtype 'fp64', did you mean 'fp16'?"),
        (["tune", "--mode", "eval"], "invalid choice: 'eval'"),
        (["predict"], "the following arguments are required: IMAGE"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_two(arguments, said, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().err
    assert code == 2
    assert said in shown
    assert len([line for line in shown.splitlines() if "RANDOM" not in line]) == 1


def test_weights_of_another_model_are_listed(picture, weights, capsys):
    assert main(["predict", str(picture), "--model", "resnet50", "--weights", str(weights)]) == 2
    assert "--weights" in capsys.readouterr().err


def test_wrong_backend_in_the_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_current", None)
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "tpu")
    assert main(["info"]) == 2
    assert "RESNET_FUSED_BACKEND: expected one of auto" in "".join(capsys.readouterr())
