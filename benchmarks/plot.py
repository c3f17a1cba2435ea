"""Plots of GPU results, from the files under benchmarks/results alone: throughput, blocks against the roofline, memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_steps import DTYPES, HERE, INFER, KERNELS_FILE, MODELS, NETWORKS, TRAIN, UNITS_FILE
from report import PROVIDERS, Measured

from resnet_fused.arguments import Parser
from resnet_fused.bench import FUSED
from resnet_fused.console import warn

COLOURS = dict(zip(PROVIDERS, ("#999999", "#555555", "#d95f02", "#fdae61", "#7570b3", "#e7298a", "#66a61e")))
MARKERS = {"stock": "o", "compile": "s", FUSED: "^"}
THROUGHPUT, ROOFLINE, MEMORY = "gpu_throughput.png", "gpu_roofline.png", "gpu_memory.png"


def _bars(axes: Any, found: Measured, place: tuple[str, str], mode: str, dtype: str, column: str) -> bool:
    """Groups of bars by network; whether there is any."""
    drawn = False
    for i, provider in enumerate(PROVIDERS):
        values = [found.value(column, *place, model, mode, dtype, provider) for model in MODELS]
        known = [(j, value) for j, value in enumerate(values) if value is not None]
        if known:
            drawn = True
            at = [j + (i - (len(PROVIDERS) - 1) / 2) * 0.8 / len(PROVIDERS) for j, _ in known]
            axes.bar(at, [v for _, v in known], 0.8 / len(PROVIDERS), color=COLOURS[provider], label=provider)
    axes.set_xticks(range(len(MODELS)), MODELS)
    axes.set_title(f"{mode}, {dtype}", fontsize=9)
    return drawn


def bars(pyplot: Any, folder: Path, column: str, unit: str) -> Any:
    """Of every device and shape, a row of panels; None where there is nothing to draw."""
    found = Measured(folder / NETWORKS)
    cases = [(mode, dtype) for mode in (TRAIN, INFER) for dtype in DTYPES]
    places = [
        place
        for place in found.places
        if any((row["device"], row["shape"]) == place and row.get(column) for row in found.rows)
    ]
    if not places:
        return None
    figure, grid = pyplot.subplots(len(places), len(cases), figsize=(4 * len(cases), 3.2 * len(places)), squeeze=False)
    for axes_of_place, place in zip(grid, places):
        for axes, (mode, dtype) in zip(axes_of_place, cases):
            if not _bars(axes, found, place, mode, dtype, column):
                axes.text(0.5, 0.5, "not measured yet", ha="center", transform=axes.transAxes)
        axes_of_place[0].set_ylabel(f"{unit}\n{place[0]}, {place[1]}", fontsize=8)
    entries = {label: handle for a in grid.flat for handle, label in zip(*a.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=len(PROVIDERS), fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def roofline(pyplot: Any, folder: Path) -> Any:
    """Blocks as points, flop per byte of the contestant's own passes; the measured ceilings as lines."""
    rows = [row for row in Measured(folder / UNITS_FILE).rows if row["provider"] in MARKERS]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    if not devices:
        return None
    ceilings = Measured(folder / KERNELS_FILE).rows
    figure, grid = pyplot.subplots(1, len(devices), figsize=(6.5 * len(devices), 4.5), squeeze=False)
    for axes, device in zip(grid[0], devices):
        intensities = []
        for provider, marker in MARKERS.items():
            points = [
                (1e3 * float(row["tflop_per_s"]) / float(row["gb_per_s"]), float(row["tflop_per_s"]))
                for row in rows
                if (row["device"], row["provider"]) == (device, provider)
            ]
            if points:
                intensities += [x for x, _ in points]
                axes.scatter(*zip(*points), marker=marker, s=18, color=COLOURS[provider], label=provider)
        here = [row for row in ceilings if row["device"] == device]
        bandwidth = [float(row["gb_per_s"]) for row in here if row["op"] == "copy"]
        rate = [float(row["tflop_per_s"]) for row in here if row["op"] == "matmul"]
        if bandwidth and rate:
            ends = [min(intensities) / 2, 1e3 * rate[0] / bandwidth[-1], 2 * max(intensities)]
            xs = sorted(ends)
            axes.plot(
                xs, [min(x * bandwidth[-1] / 1e3, rate[0]) for x in xs], color="black", lw=1, label="copy, matmul"
            )
        axes.set(xscale="log", yscale="log", xlabel="flop / byte", ylabel="TFLOP/s", title=f"blocks on {device}")
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def draw(folder: Path) -> list[Path]:
    """Write what there is to draw; returns the paths. Without matplotlib: nothing, and says so."""
    try:
        import matplotlib
    except ImportError:
        warn("no plots: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures: dict[str, Callable[[], Any]] = {
        THROUGHPUT: lambda: bars(pyplot, folder, "images_per_s", "images/s"),
        ROOFLINE: lambda: roofline(pyplot, folder),
        MEMORY: lambda: bars(pyplot, folder, "peak_mib", "peak MiB"),
    }
    written = []
    for name, make in figures.items():
        figure = make()
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            pyplot.close(figure)
            written.append(folder / name)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    options = parser.parse_args(argv)
    written = draw(options.results)
    print("\n".join(map(str, written)) or "nothing is measured yet: make bench-gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
