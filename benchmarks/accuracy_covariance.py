"""Errors of a 1×1 convolution with batch norm in training, ours and stock's, against float64, on data made to be hard.

The cases are those of tests/covariance_cases.py; errors are norm-wise and relative.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from covariance_cases import DELTAS, MEANS, relative_error, sweep, three  # noqa: E402

import resnet_fused  # noqa: E402
from resnet_fused.console import print_table  # noqa: E402
from resnet_fused.info import commit  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTITIES = ("out", "mean", "var", "dx", "dweight", "dgamma", "dbeta")
COLUMNS = ("backend", "dtype", "sweep", "point", "quantity", "ours", "stock", "commit")
COLOURS = {"out": "#0072B2", "dgamma": "#D55E00", "dx": "#009E73"}  # of Okabe and Ito: told apart by everybody
LABELS = {"out": "output", "dgamma": "dγ", "dx": "dA"}


def measure() -> list[dict[str, object]]:
    backend = "cpu" if "cpu" in resnet_fused.available_backends() else "aten"
    rows: list[dict[str, object]] = []
    for (name, point), case in sweep().items():
        for label, dtype in DTYPES.items():
            ours, stock, exact = three(case, dtype)
            for quantity in QUANTITIES:
                errors = (relative_error(side[quantity], exact[quantity]) for side in (ours, stock))
                values = (backend, label, name, point, quantity, *(f"{error:.2e}" for error in errors), commit())
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def show(rows: list[dict[str, str]]) -> None:
    shown = ("out", "var", "dx", "dweight", "dgamma")
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["sweep"], row["point"], row["dtype"]), {})[row["quantity"]] = (
            f"{float(row['ours']):.0e} / {float(row['stock']):.0e}"
        )
    print_table(
        "relative error against float64, ours / stock",
        ["sweep", "point", "dtype", *shown],
        [[*key, *(found[quantity] for quantity in shown)] for key, found in cells.items()],
    )


def plot(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {
        tuple(r[k] for k in ("sweep", "point", "dtype", "quantity")): (float(r["ours"]), float(r["stock"]))
        for r in rows
    }
    sweeps = {"mean/σ": [m for m in MEANS if m > 0], "correlation δ": list(DELTAS)}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), sharey="col", layout="constrained")
    for row, (name, points) in zip(axes, sweeps.items(), strict=True):
        for axis, dtype in zip(row, DTYPES, strict=True):
            for quantity, colour in COLOURS.items():
                for which, style in enumerate(("-", ":")):
                    errors = [found[name, f"{point:g}", dtype, quantity][which] for point in points]
                    label = f"{LABELS[quantity]}, {'stock' if which else 'covariance plan'}"
                    axis.plot(points, errors, style, color=colour, marker="o", markersize=3.5, label=label)
            axis.set(xscale="log", yscale="log", xlabel=name, title=dtype if axis in axes[0] else "")
            axis.grid(alpha=0.25)
            if name == "correlation δ":
                axis.invert_xaxis()
        row[0].set_ylabel("relative error against float64")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--results-file", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy_covariance.csv"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw from the results file alone, without measuring")
    arguments = parser.parse_args()
    if arguments.plot is None:
        rows = measure()
        with arguments.results_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif not arguments.results_file.is_file():
        parser.error(f"--results-file: expected the rows of an earlier run, got no file {arguments.results_file}")
    with arguments.results_file.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    if arguments.plot is None:
        show(found)
    else:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
