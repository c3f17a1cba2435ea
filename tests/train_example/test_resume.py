"""``examples/train.py``: a run that is stopped goes on with the same bits, and what it does is what its options say."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import SystemRandom
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_runs import (
    EXAMPLES,
    RUN,
    STEPS,
    TEST_PICTURES,
    assert_same_run,
    checkpoint,
    losses,
    rows,
    start,
    tiny,
    wait_for_rows,
)

pytest.importorskip("rich", reason="train.py shows its progress with rich")


@pytest.fixture(scope="module")
def whole(train: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A ResNet-18 trained without a stop."""
    output = tmp_path_factory.mktemp("whole")
    assert train.main(["--data", str(data), "--output", str(output), *RUN]) == 0
    yield output
    (output / "checkpoint.pt").unlink()


def test_a_killed_run_goes_on_to_the_same_bits(train: ModuleType, data: Path, whole: Path, output: Path) -> None:
    arguments = ("--data", data, "--output", output, *RUN, "--checkpoint-every", "3")
    process = start(EXAMPLES / "train.py", *arguments, "--workers", "1")
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
@pytest.mark.parametrize("step", [1, 3, STEPS, 2 * STEPS])
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
    assert train.main([*arguments, str(run), "--max-steps", "6"]) == 0
    for name, lines in (("losses.csv", "2,7,1.5,0.1,3\n2,8,1.25,0"), ("evaluation.csv", "2,8,0")):
        with open(run / name, "a", encoding="utf-8") as file:
            file.write(lines)  # a process was killed while it wrote
    assert train.main([*arguments, str(run)]) == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.usefixtures("small_network")
def test_never_resume_starts_anew(train: ModuleType, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path / "run"), *RUN]
    assert train.main([*arguments, "--max-steps", "6"]) == 0
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
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([0.02 * factor for factor in (1 / 3, 2 / 3, *cosine)])
    assert [(row["epoch"], row["step"]) for row in table] == [
        (str(1 + i // STEPS), str(i + 1)) for i in range(2 * STEPS)
    ]

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
