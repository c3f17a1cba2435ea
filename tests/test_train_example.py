"""``examples/train.py``: a run that is stopped goes on with the same bits, and what a run does is what its options say."""

from __future__ import annotations

import csv
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import SystemRandom
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("rich", reason="train.py shows its progress with rich")
Image = pytest.importorskip("PIL.Image", reason="folders of pictures are read with pillow")
EXAMPLES = Path(__file__).parent.parent / "examples"
OWN = ("train", "train_options", "image_data", "run_folder", "fashion_mnist")
PICTURES, TEST_PICTURES = 44, 13
RUN = ("--batch", "8", "--epochs", "2", "--lr", "0.02", "--log-every", "1", "--workers", "0", "--deterministic")
STEPS = 6  # of an epoch: the last batch is filled with pictures from the start of the order


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("train")
        for name in OWN:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _settings_back() -> Iterator[None]:
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def write_idx(path: Path, values: Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's four files with a few pictures of 8×8 that are brighter the higher their class."""
    folder = tmp_path_factory.mktemp("idx")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", PICTURES), ("t10k", TEST_PICTURES)):
        labels = torch.arange(count) % 10
        noise = torch.randint(60, (count, 8, 8), generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte", (noise + 20 * labels[:, None, None]).byte())
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels.byte())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two pictures each, 20×30 and 40×12."""
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i, size in enumerate(((30, 20), (12, 40))):
                Image.new("RGB", size, (50 * label, 100 * i, 7)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run; its checkpoints, over a hundred megabytes, do not stay."""
    yield tmp_path / "run"
    for path in tmp_path.rglob("checkpoint.*"):
        path.unlink()


def tiny(options: Any, data: Any, device: torch.device) -> nn.Module:
    torch.manual_seed(options.seed)
    inputs = len(data.mean) * data.size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Linear(8, data.classes))


@pytest.fixture
def small_network(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kind of network does not matter: one that trains in a moment."""
    monkeypatch.setattr(train, "network", tiny)


def rows(path: Path, but: str) -> list[dict[str, str]]:
    """The rows of a table without a column of times."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != but} for row in csv.DictReader(file)]


def losses(output: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(output / "losses.csv", "images_per_s")]


def checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same_run(output: Path, whole: Path) -> None:
    """Tables, network, EMA and momenta agree to the bit."""
    assert rows(output / "losses.csv", "images_per_s") == rows(whole / "losses.csv", "images_per_s")
    assert rows(output / "evaluation.csv", "trained_s") == rows(whole / "evaluation.csv", "trained_s")
    one, other = checkpoint(output), checkpoint(whole)
    assert one.pop("settings") == other.pop("settings")
    assert one.pop("trained_s") > 0 and other.pop("trained_s") > 0
    assert one.pop("schedule") == other.pop("schedule")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(train: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ResNet-18 trained without a stop."""
    output = tmp_path_factory.mktemp("whole")
    assert train.main(["--data", str(data), "--output", str(output), *RUN]) == 0
    yield output
    (output / "checkpoint.pt").unlink()


def start(*arguments: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(EXAMPLES / "train.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_rows(process: subprocess.Popen[str], output: Path, count: int) -> None:
    path = output / "losses.csv"
    begin = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begin < 120, f"no {count} rows in two minutes"
        time.sleep(0.01)


def test_a_killed_run_goes_on_to_the_same_bits(train: ModuleType, data: Path, whole: Path, output: Path) -> None:
    arguments = ("--data", data, "--output", output, *RUN, "--checkpoint-every", "3")
    process = start(*arguments, "--workers", "1")
    kill_at = SystemRandom().randint(1, 2 * STEPS - 2)
    wait_for_rows(process, output, kill_at)
    process.kill()
    process.communicate()
    assert len(losses(output)) >= kill_at
    assert train.main([str(argument) for argument in arguments]) == 0
    assert_same_run(output, whole)


def stop_at_step(train: ModuleType, patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal while a step is being made."""
    make_step = train.Training._train_step

    def make_and_send(self: Any, batches: Any) -> None:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        make_step(self, batches)

    patch.setattr(train.Training, "_train_step", make_and_send)


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, STEPS, 2 * STEPS])
def test_a_signal_ends_the_run_behind_its_step(
    train: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    """At the end of an epoch the evaluation is made by the run that goes on."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = ["--data", str(data), *RUN, "--log-every", "5", "--output"]
    assert train.main([*arguments, str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_at_step(train, patch, step, number)
        assert train.main([*arguments, str(run)]) == 128 + number
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    state = checkpoint(run)
    assert (state["step"], state["epoch"]) == (len(losses(run)), (step - 1) // STEPS) == (step, (step - 1) // STEPS)
    assert train.main([*arguments, str(run)]) == 0
    assert_same_run(run, whole)


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_run_in_pieces(train: ModuleType, data: Path, tmp_path: Path, dtype: str) -> None:
    arguments = ["--data", str(data), *RUN, "--accumulate", "2", "--dtype", dtype, "--output"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    piece = [*arguments, str(tmp_path / "run")]
    for steps, workers in (("1", "0"), ("2", "1"), ("4", "2")):
        assert train.main([*piece, "--max-steps", steps, "--workers", workers]) == 0
        assert checkpoint(tmp_path / "run")["step"] == int(steps)
    assert train.main(piece) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert train.main(piece) == 0  # there is nothing left to do
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert bool(checkpoint(tmp_path / "run")["scaler"]) == (dtype == "fp16")


@pytest.mark.usefixtures("small_network")
def test_rows_behind_the_checkpoint_are_made_again(train: ModuleType, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), *RUN, "--output"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    assert train.main([*arguments, str(run), "--max-steps", "8"]) == 0
    for name, lines in (("losses.csv", "2,9,1.5,0.1,3\n2,10,1.25,0"), ("evaluation.csv", "2,12,0")):
        with open(run / name, "a", encoding="utf-8") as file:
            file.write(lines)  # a process was killed while it wrote
    assert train.main([*arguments, str(run)]) == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.usefixtures("small_network")
def test_never_resume_starts_anew(train: ModuleType, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path / "run"), *RUN]
    assert train.main([*arguments, "--max-steps", "8"]) == 0
    first = losses(tmp_path / "run")
    assert train.main([*arguments, "--max-steps", "2", "--resume", "never"]) == 0
    assert losses(tmp_path / "run") == first[:2]
    assert checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.usefixtures("small_network")
def test_ema_rates_and_accuracies_are_what_they_say(
    train: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    save = train.RunFolder.save

    def keep(self: Any, state: dict[str, Any]) -> None:
        save(self, state)
        states.append(checkpoint(tmp_path / "run"))

    monkeypatch.setattr(train.RunFolder, "save", keep)
    options = ["--ema-decay", "0.75", "--warmup", "0.25", "--checkpoint-every", "1", "--weight-decay", "0"]
    assert train.main(["--data", str(data), "--output", str(tmp_path / "run"), *RUN, *options]) == 0
    made = {state["step"]: state for state in states}
    expected = made[1]["network"]["1.weight"].double()
    for step in range(2, 2 * STEPS + 1):
        expected = 0.75 * expected + 0.25 * made[step]["network"]["1.weight"].double()
    torch.testing.assert_close(made[2 * STEPS]["ema"]["module.1.weight"].double(), expected, rtol=1e-5, atol=1e-6)

    table = rows(tmp_path / "run" / "losses.csv", "images_per_s")
    rates = [float(row["lr"]) for row in table]
    cosine = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    assert rates == pytest.approx([0.02 * factor for factor in (0.25, 0.5, 0.75, *cosine)])
    assert [(row["epoch"], row["step"]) for row in table] == [(str(1 + i // STEPS), str(i + 1)) for i in range(12)]

    loaded = train.load(data, None, 0)
    model = tiny(train.parsed(["--output", "x"], ""), loaded, torch.device("cpu")).eval()
    for row in rows(tmp_path / "run" / "evaluation.csv", "trained_s"):
        state = made[int(row["step"])]
        for prefix, weights in (
            ("", state["network"]),
            ("ema_", {k[7:]: v for k, v in state["ema"].items() if "." in k}),
        ):
            model.load_state_dict(weights)
            x = torch.stack([loaded.test[(0, i)][0] for i in range(TEST_PICTURES)])
            y = torch.tensor(loaded.test.labels)
            answers = model((x / 255 - loaded.mean[0]) / loaded.deviation[0])
            assert float(row[f"{prefix}accuracy"]) == pytest.approx(float((answers.argmax(1) == y).double().mean()))
            assert float(row[f"{prefix}loss"]) == pytest.approx(F.cross_entropy(answers, y).item(), rel=1e-4)


def test_stock_starts_with_the_same_losses(train: ModuleType, data: Path, whole: Path, output: Path) -> None:
    arguments = ["--data", str(data), "--output", str(output), *RUN, "--stock", "--max-steps", "2"]
    assert train.main(arguments) == 0
    first = losses(whole)[:2]
    assert losses(output) == pytest.approx(first, rel=1e-4)
    # Not the same network: rounding parts the two.
    assert losses(output) != first


def without_norm(options: Any, data: Any, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, data.classes))


def test_accumulated_batches_are_a_whole_one(
    train: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "network", without_norm)
    arguments = ["--data", str(data), *RUN, "--output"]
    assert train.main([*arguments, str(tmp_path / "whole")]) == 0
    assert train.main([*arguments, str(tmp_path / "halves"), "--batch", "4", "--accumulate", "2"]) == 0
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    weights = [checkpoint(tmp_path / name)["network"]["1.weight"] for name in ("whole", "halves")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_network")
def test_weights_of_norms_and_biases_do_not_decay(train: ModuleType, data: Path, tmp_path: Path) -> None:
    options = train.parsed(["--data", str(data), "--output", str(tmp_path / "run"), "--weight-decay", "0.5"], "")
    training = train.Training(options, train.World(0, 1, torch.device("cpu")))
    decay = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in training.network.named_parameters()} == {
        "1.weight": 0.5, "1.bias": 0, "2.weight": 0, "2.bias": 0, "3.weight": 0.5, "3.bias": 0,
    }  # fmt: skip


def refused(train: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and message, which has to be one line."""
    capsys.readouterr()
    try:
        code = train.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err
    assert message.startswith("train.py: ") and message.count("\n") == 1, message
    return code, message


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named(
    train: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    path = folder / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    arguments = ("--data", folder, "--output", folder / "run", "--size", "32", "--batch", "2", "--workers", workers)
    code, message = refused(train, capsys, *arguments)
    assert code == 1 and str(path) in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], ["--data", "no such folder", "nowhere"]),
        (["--model", "resnet19"], ["resnet19", "resnet18"]),
        (["--batch", "0"], ["--batch", "positive"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--ema-decay", "1.5"], ["--ema-decay", "from 0 to 1", "1.5"]),
        (["--workers", "-1"], ["--workers", "-1"]),
        (["--device", "gpu"], ["--device", "gpu"]),
    ],
)
def test_bad_arguments(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code, message = refused(train, capsys, "--output", tmp_path / "run", *arguments)
    assert code == 2
    assert all(word in message for word in words), message


def test_bad_data(train: ModuleType, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(path: Path, *arguments: str) -> str:
        code, text = refused(train, capsys, "--data", path, "--output", folder / "run", *arguments)
        assert code == 2
        return text

    assert "--size" in message(data, "--size", "32")
    (folder / "empty").mkdir()
    assert "train-images-idx3-ubyte" in message(folder / "empty")
    assert "--sync-bn with --stock" in message(data, "--sync-bn", "--stock")
    (folder / "val" / "bird").mkdir()
    assert "bird" in message(folder)
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    assert "no pictures" in message(folder)
    (folder / "file").write_text("")
    code, text = refused(train, capsys, "--data", data, "--output", folder / "file")
    assert code == 2 and "--output" in text


@pytest.mark.usefixtures("small_network")
def test_a_run_does_not_go_on_as_another(
    train: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(data), "--output", str(run), *RUN]
    assert train.main([*arguments, "--max-steps", "2"]) == 0
    code, message = refused(train, capsys, *arguments, "--lr", "0.5", "--stock")
    assert code == 2 and "lr 0.02, not 0.5" in message and "stock False, not True" in message
    (run / "losses.csv").write_text("epoch,step\n1,1\n")
    code, message = refused(train, capsys, *arguments)
    assert code == 2 and "losses.csv" in message and "2 rows, got 1" in message
    for damaged in (b"", b"nothing of the kind", (run / "checkpoint.pt").read_bytes()[:-100]):
        (run / "checkpoint.pt").write_bytes(damaged)
        code, message = refused(train, capsys, *arguments)
        assert code == 2 and "checkpoint.pt: no checkpoint" in message


@pytest.mark.usefixtures("small_network")
def test_a_loss_that_is_no_number_ends_the_run(
    train: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", data, "--output", tmp_path / "run", *RUN, "--warmup", "0", "--checkpoint-every", "1")
    code, message = refused(train, capsys, *arguments, "--lr", "1e38")
    assert code == 1 and "step " in message and "--lr" in message
    finite = losses(tmp_path / "run")
    assert all(map(math.isfinite, finite))
    assert f"step {len(finite) + 1}:" in message
    assert checkpoint(tmp_path / "run")["step"] == len(finite)


def test_pictures_and_their_order(train: ModuleType, data: Path, folder: Path) -> None:
    image_data = sys.modules["image_data"]
    loaded = train.load(data, None, 3)
    again, other = train.load(data, None, 3), train.load(data, None, 4)
    keys = [(epoch, i) for epoch in range(2) for i in range(PICTURES)]
    assert all(torch.equal(loaded.train[key][0], again.train[key][0]) for key in keys)
    assert not all(torch.equal(loaded.train[key][0], other.train[key][0]) for key in keys)
    assert not all(torch.equal(loaded.train[0, i][0], loaded.train[1, i][0]) for i in range(PICTURES))

    def order(**place: int) -> list[list[tuple[int, int]]]:
        return list(train.training_batches(PICTURES, 4, 0, STEPS * 2, **{"seed": 0, "epoch": 1, **place}))

    alone = order()
    assert {index for keys in alone for _, index in keys} == set(range(PICTURES))
    assert [len(keys) for keys in alone] == [4] * STEPS * 2
    assert alone[-1] == alone[0], "filled from the start of the order"
    assert order(epoch=2) != alone and order(seed=1) != alone
    assert list(train.training_batches(PICTURES, 4, 5, 12, seed=0, epoch=1)) == alone[5:]
    halves = [list(train.training_batches(PICTURES, 4, 0, STEPS, seed=0, epoch=1, rank=i, ranks=2)) for i in (0, 1)]
    assert [keys for pair in zip(*halves, strict=True) for keys in pair] == alone
    shares = [list(train.test_batches(TEST_PICTURES, 4, rank, 3)) for rank in range(3)]
    assert sorted(i for share in shares for keys in share for _, i in keys) == list(range(TEST_PICTURES))

    pictures = train.load(folder, 16, 0)
    assert pictures.train.labels == pictures.test.labels == [0, 0, 1, 1]
    for key in ((0, 0), (0, 1), (1, 3)):
        for part in (pictures.train, pictures.test):
            image, label = part[key]
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
            assert image.float().mean((1, 2)).tolist() == [50 * label, 100 * (key[1] % 2), 7]

    stripes = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    crop = image_data.central_crop(stripes, 56)
    assert crop.shape == (1, 56, 56) and crop[0, 0].tolist() == list(range(4, 60))
    seen = {
        tuple(image_data.padded_crop(stripes[:, :8, 1:9], image_data.draws(0, i))[0, 4].tolist()) for i in range(200)
    }
    rows = [[0] * max(0, -k) + list(range(1, 9))[max(0, k) : 8 + k] + [0] * max(0, k) for k in range(-4, 5)]
    empty = {(0,) * 8}  # none: the fifth row of a crop is a row of the picture
    assert seen - empty == {tuple(row) for row in rows} | {tuple(reversed(row)) for row in rows}


def test_cifar(train: ModuleType, tmp_path: Path) -> None:
    image = torch.arange(3072).remainder(251).byte()
    for name, label in (*((f"data_batch_{i}", i) for i in range(1, 6)), ("test_batch", 9)):
        (tmp_path / f"{name}.bin").write_bytes(bytes([label]) + (image + label).numpy().tobytes())
    loaded = train.load(tmp_path, None, 0)
    assert loaded.train.labels == [1, 2, 3, 4, 5] and loaded.test.labels == [9]
    assert torch.equal(loaded.test[0, 0][0], (image + 9).view(3, 32, 32))
    assert (loaded.classes, loaded.size, len(loaded.mean)) == (10, 32, 3)
    (tmp_path / "data_batch_3.bin").write_bytes(b"123")
    with pytest.raises(train.UsageError, match="data_batch_3.bin"):
        train.load(tmp_path, None, 0)
