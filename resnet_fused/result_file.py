"""Files of measured rows: CSV, to which is only appended, so that a file holds a history."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import UsageError

COLUMNS = (
    "op",
    "mode",
    "provider",
    "shape",
    "dtype",
    "layout",
    "p50_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
    "tflop_per_s",
    "fraction_of_roofline",
    "peak_mib",
    "device",
    "versions",
    "commit",
    "images_per_s",
    "ratio_to_stock",
    "error_vs_fp64",
    "threads",
    "images",
)


def append_csv(path: str, made: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows, with a header when the file is new."""
    new = not Path(path).exists() or Path(path).stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(made)


Key = tuple[str, str, str, str]


def key_of(row: dict[str, Any]) -> Key:
    """What a row measures: op, mode, shape, dtype."""
    return row["op"], row["mode"], row["shape"], row["dtype"]


def measured(path: str | None, device: str, provider: str | None = None) -> set[Key]:
    """What the rows of a results file (None, or not there: no rows) have measured on ``device``; of one provider, or of any."""
    return {
        key_of(row)
        for row in read(path)
        if row["device"] == device and (provider is None or row["provider"] == provider)
    }


def read(path: str | Path | None) -> list[dict[str, str]]:
    """The rows, oldest first; none where there is no file."""
    if path is None or not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_results_file(path: str | None) -> None:
    if path is None:
        return
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise UsageError(f"--results-file: cannot write {path}: no such folder, or a folder itself")
    if Path(path).exists():
        first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
        if first and first != ",".join(COLUMNS):
            raise UsageError(f"--results-file: {path} holds other columns than these rows")
