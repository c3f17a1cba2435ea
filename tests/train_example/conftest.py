"""Fixtures of the tests of ``examples/train.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import train_runs


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(train_runs.EXAMPLES))
        yield importlib.import_module("train")
        for name in train_runs.OWN:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_runs.idx_files(tmp_path_factory.mktemp("idx"))


@pytest.fixture(autouse=True)
def _settings_back() -> Iterator[None]:
    """What a run sets for its whole process."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def small_network(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "network", train_runs.tiny)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run; its checkpoints, over a hundred megabytes, do not stay."""
    yield tmp_path / "run"
    for path in tmp_path.rglob("checkpoint.*"):
        path.unlink()
