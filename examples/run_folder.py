"""The folder of a training run: a checkpoint, and tables with a row for each step and each epoch up to it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from resnet_fused.console import UsageError
from resnet_fused.result_file import append_csv

LOSS_COLUMNS = ("epoch", "step", "loss", "lr", "images_per_s")
EVALUATION_COLUMNS = ("epoch", "step", "accuracy", "loss", "ema_accuracy", "ema_loss", "trained_s")


class RunFolder:
    """``checkpoint.pt``, ``losses.csv`` and ``evaluation.csv`` in a folder, which is made if need be.

    Raises:
        UsageError: it is no folder, or cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint.pt"
        self.losses, self.evaluation = folder / "losses.csv", folder / "evaluation.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output: cannot make {folder}: {error.strerror}") from None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; whoever dies meanwhile leaves the last one."""
        temporary = self.checkpoint.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)

    def load(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The state in the checkpoint, None where there is none.

        Raises:
            UsageError: it is damaged, or its ``settings`` are others.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            there = state["settings"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or ["it ends early"])[0]
            raise UsageError(f"{self.checkpoint}: no checkpoint of this script: {reason}") from None
        other = [f"{name} {there.get(name)}, not {here}" for name, here in settings.items() if there.get(name) != here]
        if other:
            changed = "; ".join(other)
            raise UsageError(f"{self.checkpoint}: of a run with {changed}: take another --output or --resume never")
        return state

    def cut(self, steps: int, epochs: int) -> None:
        """Take the rows of later steps and epochs out of the tables, and for step 0 the checkpoint away.

        Raises:
            UsageError: a table lacks rows.
        """
        if steps == 0:
            self.checkpoint.unlink(missing_ok=True)
        for path, rows in ((self.losses, steps), (self.evaluation, epochs)):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            if rows and len(lines) <= rows:
                raise UsageError(f"{path}: the checkpoint needs {rows} rows, got {max(0, len(lines) - 1)}")
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(lines[: rows + 1] if rows else []), encoding="utf-8")
            os.replace(temporary, path)

    def add_losses(self, rows: list[tuple[int, int, float, float, float]]) -> None:
        append_csv(str(self.losses), [dict(zip(LOSS_COLUMNS, row, strict=True)) for row in rows], LOSS_COLUMNS)

    def add_evaluation(self, row: tuple[float, ...]) -> None:
        append_csv(str(self.evaluation), [dict(zip(EVALUATION_COLUMNS, row, strict=True))], EVALUATION_COLUMNS)
