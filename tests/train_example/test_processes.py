"""``examples/train.py`` as several processes under torchrun, on a processor."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
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
    wait_for_rows,
)

pytest.importorskip("rich", reason="train.py shows its progress with rich")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="processes without GPUs need gloo"),
]

THREE = """
import sys
import torch
import train

def network(options, data, device):
    torch.manual_seed(0)
    layers = [torch.nn.Flatten()]
    for inputs in (64, 600, 600, 600):  # more than DDP's first bucket holds
        layers += [torch.nn.Linear(inputs, 600), torch.nn.BatchNorm1d(600), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(600, data.classes))

train.network = network
sys.exit(train.main(sys.argv[1:]))
"""


def together(script: Path, processes: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """The script under torchrun."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), script, *arguments)


def test_processes_that_train_together_go_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Three, because the order of two summands does not matter; stopped by a signal to torchrun."""
    script = tmp_path / "three.py"
    script.write_text(THREE)
    arguments = ["--data", data, *RUN, "--batch", "2", "--accumulate", "2", "--output"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    first = together(script, 3, *arguments, whole)
    assert first.wait(200) == 0, first.communicate()[0]
    stopped = together(script, 3, *arguments, run, "--workers", "1")
    wait_for_rows(stopped, run, 2)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=200)
    state = checkpoint(run)
    assert 2 <= state["step"] == len(losses(run)) < 2 * STEPS
    again = together(script, 3, *arguments, run)
    assert again.wait(200) == 0, again.communicate()[0]
    assert_same_run(run, whole)


def test_two_processes_learn_what_one_does(train: ModuleType, data: Path, output: Path) -> None:
    """With synchronised norms the halves of a batch are one batch; every test picture counts once."""
    arguments = ["--data", str(data), *RUN, "--sync-bn", "--output"]
    assert train.main([*arguments, str(output)]) == 0
    pair = together(EXAMPLES / "train.py", 2, *arguments, output / "pair", "--batch", "4")
    assert pair.wait(200) == 0, pair.communicate()[0]
    assert losses(output / "pair")[:3] == pytest.approx(losses(output)[:3], rel=1e-3)
    shares = [float(row["accuracy"]) * TEST_PICTURES for row in rows(output / "pair" / "evaluation.csv", "trained_s")]
    assert all(abs(share - round(share)) < 1e-6 for share in shares)


def test_a_process_that_dies_ends_the_others(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        THREE.replace(
            "train.network = network",
            "import os\n"
            "train.network = network\n"
            "make_step = train.Training._train_step\n"
            "def step(self, batches):\n"
            "    if self.step == 3 and self.world.rank == 1:\n"
            "        os.kill(os.getpid(), 19)  # it does not end, it stands still\n"
            "    make_step(self, batches)\n"
            "train.Training._train_step = step",
        )
    )
    arguments = ["--data", data, *RUN, "--batch", "4", "--output", tmp_path / "run", "--timeout", "10"]
    process = together(script, 2, *arguments)
    assert process.wait(150) != 0
    assert len(losses(tmp_path / "run")) == 3
    process.communicate()
