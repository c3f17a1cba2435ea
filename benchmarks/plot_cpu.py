"""The README's picture: speed and memory on a processor, from the files under benchmarks/results alone."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE = RESULTS / "networks_cpu.png"
COLOURS = {"stock": "#999999", "compile": "#7570b3", "fused": "#d95f02"}
CASES = {
    ("infer", "1x3x224x224", "fp32"): "inference\nbatch 1\nfp32",
    ("infer", "16x3x224x224", "fp32"): "inference\nbatch 16\nfp32",
    ("infer", "1x3x224x224", "bf16"): "inference\nbatch 1\nbf16",
    ("infer", "16x3x224x224", "bf16"): "inference\nbatch 16\nbf16",
    ("train", "16x3x224x224", "fp32"): "training\nbatch 16\nfp32",
    ("train", "16x3x224x224", "bf16"): "training\nbatch 16\nbf16",
}
NETWORKS = ("resnet18", "resnet50", "resnet101")


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def speeds() -> dict[tuple[tuple[str, str, str], str], list[float]]:
    """Ratios of images per second to stock's in the same run, by case and provider."""
    rows = [row for row in _rows("networks_cpu.csv") if row["op"] == "resnet50"]
    found = defaultdict(list)
    for row in rows:
        case = row["mode"], row["shape"], row["dtype"]
        if case in CASES:
            found[case, row["provider"].removesuffix(" again")].append(float(row["ratio_to_stock"]))
    return found


def draw() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2), constrained_layout=True)
    found, width = speeds(), 0.27
    for i, (provider, colour) in enumerate(COLOURS.items()):
        for j, case in enumerate(CASES):
            values, at = found[case, provider], j + (i - 1) * width
            left.bar(at, statistics.median(values), width * 0.92, color=colour, label=None if j else provider)
            if provider != "stock":
                left.scatter([at] * len(values), values, s=7, color="black", zorder=3, linewidths=0)
    left.set_xticks(range(len(CASES)), CASES.values(), fontsize=8)
    left.set_ylabel("images/s, stock = 1")
    left.set_title("ResNet-50 at 224², median and each timing", fontsize=10)

    memory = {(r["network"], r["dtype"], r["provider"]): int(r["saved_bytes"]) / 2**30 for r in _rows("memory_cpu.csv")}
    places = [(network, dtype) for network in NETWORKS for dtype in ("fp32", "bf16")]
    for i, provider in enumerate(("stock", "fused")):
        at = [j + (i - 0.5) * 0.38 for j in range(len(places))]
        bars = right.bar(at, [memory[(*place, provider)] for place in places], 0.36, color=COLOURS[provider])
        right.bar_label(bars, fmt="%.1f", fontsize=7)
    right.set_xticks(range(len(places)), [f"{network[6:]}\n{dtype}" for network, dtype in places], fontsize=8)
    right.set_ylabel("GiB kept for the backward")
    right.set_title("ResNet-18, -50, -101 at 224², batch 32", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    draw()
    print(PICTURE)
