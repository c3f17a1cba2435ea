"""What ``examples/train.py`` reads: its pictures, their order, and input that it refuses in one line."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from train_runs import (
    PICTURES,
    RUN,
    STEPS,
    TEST_PICTURES,
    checkpoint,
    losses,
)

pytest.importorskip("rich", reason="train.py shows its progress with rich")
Image = pytest.importorskip("PIL.Image", reason="folders of pictures are read with pillow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two pictures each, 20×30 and 40×12."""
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i, size in enumerate(((30, 20), (12, 40))):
                Image.new("RGB", size, (50 * label, 100 * i, 7)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


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
    for content in (b"no gzip", gzip.compress(bytes(1000))[:-9]):
        (folder / "empty" / "train-images-idx3-ubyte.gz").write_bytes(content)
        assert "train-images-idx3-ubyte.gz: damaged" in message(folder / "empty")
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
    for other_order in (order(epoch=2), order(seed=1)):
        assert [[index for _, index in keys] for keys in other_order] != [
            [index for _, index in keys] for keys in alone
        ]
    assert list(train.training_batches(PICTURES, 4, 5, STEPS * 2, seed=0, epoch=1)) == alone[5:]
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
