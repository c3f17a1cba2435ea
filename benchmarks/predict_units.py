"""Predicted time of a training step on a GPU, unit by unit: stock, torch.compile and the Triton backend. Nothing is measured.

A unit's time is the sum over its passes (``unit_passes`` says which, and what is counted)::

    bound      = max(bytes / bandwidth, flop / rate)
    predicted  = bound; for a launch of ours ``cost.predict`` of its first-ranked configuration, but no less than the bound

with the rates of ``devices.DEVICES``, which are reached, not advertised. cuDNN's convolutions and the pointwise kernels of eager
and of inductor get their bound: every advantage.
"""

from __future__ import annotations

import csv
import functools
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from network_units import Network, Unit, read_network
from unit_passes import PLANS, Pass, passes

from resnet_fused.arguments import Parser, image_size, one_of, positive
from resnet_fused.backends.triton import cost, devices
from resnet_fused.console import print_table
from resnet_fused.info import commit
from resnet_fused.networks import BUILDERS, DTYPES
from resnet_fused.plans import choice

MEMORY, L2, ARITHMETIC = "memory", "L2", "arithmetic"
TIMES = (*(f"predicted_us_{plan}" for plan in PLANS), "predicted_us_ours_bound", "predicted_us_ours_own_conv3x3_bound")
GIGABYTES = tuple(f"predicted_gb_{plan}" for plan in PLANS)
RATIOS = ("predicted_ratio_ours_to_inductor", "predicted_ratio_ours_own_conv3x3_to_inductor")
SETTING = ("network", "gpu", "dtype", "batch", "image_size", "covariance")
SHAPE = ("c", "k", "h", "w", "r", "stride", "groups")
LIMITS = ("limit_inductor", "limit_ours")
COLUMNS = (*SETTING, "stage", "unit", "occurrences", *SHAPE, *TIMES, *RATIOS, *GIGABYTES, *LIMITS, "commit")

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What one table predicts."""

    network: str
    gpu: str
    dtype: str
    batch: int
    image_size: int
    covariance: str = "auto"

    @property
    def device(self) -> devices.Device:
        return devices.DEVICES[self.gpu]

    def read(self) -> Network:
        with choice.covariance(self.covariance):
            return read_network(self.network, self.batch, self.image_size)


# Seconds of a pass


def bound(p: Pass, setting: Setting) -> dict[str, float]:
    """By what limits it; the largest counts."""
    rate = setting.device.rate(DTYPES[setting.dtype])
    return {MEMORY: p.bytes / setting.device.bandwidth, ARITHMETIC: p.flops / rate}


@functools.cache
def launch(kernel: str, shape: tuple[tuple[str, int], ...], setting: Setting) -> dict[str, float]:
    """The cost model's times of one launch."""
    arguments = kernel, dict(shape), DTYPES[setting.dtype]
    best = cost.predict(*arguments, cost.ranked(*arguments, setting.device)[0], setting.device)
    return {MEMORY: best.memory_seconds, L2: best.l2_seconds, ARITHMETIC: best.compute_seconds}


def predicted(p: Pass, setting: Setting) -> dict[str, float]:
    least = bound(p, setting)
    if p.kernel is None:
        return least
    # The model leaves out what hardly ranks, the mask of a residual, say: the bound has those bytes.
    return {limit: max(s, least.get(limit, 0.0)) for limit, s in launch(p.kernel, p.shape, setting).items()}


# Rows


def microseconds(found: Iterable[dict[str, float]]) -> float:
    return 1e6 * sum(max(seconds.values()) for seconds in found)


def limit(found: Iterable[dict[str, float]]) -> str:
    """What limits the passes, the share of their time that it limits: "memory 80 %"."""
    shares: Counter[str] = Counter()
    for seconds in found:
        name = max(seconds, key=seconds.__getitem__)
        shares[name] += seconds[name]
    name, most = shares.most_common(1)[0]
    return f"{name} {100 * most / shares.total():.0f} %"


def unit_row(unit: Unit, plans: dict[str, list[Pass]], setting: Setting) -> Row:
    """Everything about one unit but its name."""
    found = {plan: [predicted(p, setting) for p in plans[plan]] for plan in PLANS}
    times = {f"predicted_us_{plan}": microseconds(found[plan]) for plan in PLANS}
    for plan in ("ours", "ours_own_conv3x3"):
        times[f"predicted_us_{plan}_bound"] = microseconds(bound(p, setting) for p in plans[plan])
    moved = {f"predicted_gb_{plan}": sum(p.bytes for p in plans[plan]) / 1e9 for plan in PLANS}
    limits = {"limit_inductor": limit(found["inductor"]), "limit_ours": limit(found["ours"])}
    shape = {name: getattr(unit, name) for name in SHAPE}
    return {"stage": unit.stage, "role": unit.role} | shape | with_ratios(times) | moved | limits


def with_ratios(row: Row) -> Row:
    """Below 1, ours is faster."""
    plans = "ours", "ours_own_conv3x3"
    return row | {
        name: row[f"predicted_us_{plan}"] / row["predicted_us_inductor"]
        for name, plan in zip(RATIOS, plans, strict=True)
    }


def predict_rows(setting: Setting) -> list[Row]:
    """One row for each distinct unit, named after its first occurrence, in the network's order; the head is the last."""
    network = setting.read()
    by_unit: dict[Unit, dict[str, list[Pass]]] = {
        u: {plan: [] for plan in PLANS} for u in (*network.units, network.head)
    }
    for plan in PLANS:
        for p in passes(network, plan):
            by_unit[p.unit][plan].append(p)
    first: dict[tuple[Any, ...], Row] = {}
    for unit, plans in by_unit.items():
        row = unit_row(unit, plans, setting)
        merged = first.setdefault(tuple(row.values()), vars(setting) | {"unit": unit.name, "occurrences": 0} | row)
        merged["occurrences"] += 1
    return list(first.values())


def total(rows: Iterable[Row]) -> Row:
    """Times and gigabytes over all occurrences."""
    rows = list(rows)
    return with_ratios({name: sum(r["occurrences"] * r[name] for r in rows) for name in (*TIMES, *GIGABYTES)})


def by_stage(rows: Iterable[Row]) -> dict[str, Row]:
    rows = list(rows)
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {s: total(row for row in rows if row["stage"] == s) for s in stages} | {"training step": total(rows)}


# Tables

UNIT_HEADER = (
    "unit",
    "times",
    "convolution",
    "stock",
    "inductor",
    "ours",
    "bound",
    "own 3×3",
    "bound",
    "ours / inductor",
    "limit of ours",
)
STEP_HEADER = ("", "stock", "inductor", "ours", "bound", "own 3×3", "bound", "ours / inductor")
SHOWN = (
    *(f"predicted_us_{name}" for name in ("stock", "inductor", "ours", "ours_bound")),
    "predicted_us_ours_own_conv3x3",
    "predicted_us_ours_own_conv3x3_bound",
)
MOVED = ("stock", "inductor", "ours", "ours", "ours_own_conv3x3", "ours_own_conv3x3")


def convolution_of(row: Row) -> str:
    stride = f", stride {row['stride']}" if row["stride"] > 1 else ""
    groups = f", {row['groups']} groups" if row["groups"] > 1 else ""
    return f"{row['c']}→{row['k']} {row['r']}×{row['r']}{stride}{groups} at {row['h']}×{row['w']}"


def unit_cells(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [
            row["unit"],
            str(row["occurrences"]),
            convolution_of(row),
            *(f"{row[name]:.0f}" for name in SHOWN),
            f"{row[RATIOS[0]]:.2f}",
            row["limit_ours"],
        ]
        for row in rows
    ]


def step_cells(rows: list[Row], setting: Setting) -> list[list[str]]:
    """Milliseconds by stage, then GB and images a second of the step."""
    stages = by_stage(rows)
    step = stages["training step"]
    cells = [
        [f"{stage}, ms", *(f"{found[name] / 1e3:.2f}" for name in SHOWN), f"{found[RATIOS[0]]:.2f}"]
        for stage, found in stages.items()
    ]
    moved = [step[f"predicted_gb_{plan}"] for plan in MOVED]
    rates = [setting.batch / step[name] * 1e6 for name in SHOWN]
    return [
        *cells,
        ["GB moved", *(f"{gb:.1f}" for gb in moved), f"{moved[2] / moved[1]:.2f}"],
        ["images/s", *(f"{rate:.0f}" for rate in rates), f"{rates[2] / rates[1]:.2f}"],
    ]


def caption(setting: Setting) -> str:
    return (
        f"predicted: {setting.network}, training step, batch {setting.batch}, {setting.image_size}×{setting.image_size}, "
        f"{setting.dtype}, {setting.gpu}, covariance {setting.covariance}"
    )


def show(rows: list[Row], setting: Setting) -> None:
    note = "microseconds of one occurrence, predicted; bound: the same passes at full bandwidth and rate"
    print_table(caption(setting), UNIT_HEADER, unit_cells(rows), right=(1, *range(3, 10)), caption=note)
    print_table(caption(setting), STEP_HEADER, step_cells(rows, setting), right=range(1, 8), caption="predicted")


def markdown_table(header: Iterable[str], cells: Iterable[Iterable[str]], left: frozenset[int]) -> str:
    names = list(header)
    rule = ["---" if i in left else "---:" for i in range(len(names))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, rule, *cells))


def _listed(rows: Iterable[Row]) -> str:
    return "\n".join(
        f"- `{row['unit']}` ({convolution_of(row)}), {row['occurrences']}×: {row['predicted_us_ours']:.0f} µs "
        f"(bound {row['predicted_us_ours_bound']:.0f}), inductor {row['predicted_us_inductor']:.0f} µs, "
        f"ratio {row[RATIOS[0]]:.2f}; limited by {row['limit_ours']}"
        for row in rows
    )


def gain(row: Row) -> float:
    """Microseconds of a step that ours saves, negative where it loses."""
    return row["occurrences"] * (row["predicted_us_inductor"] - row["predicted_us_ours"])


def _limits(rows: Iterable[Row]) -> str:
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["limit_ours"].partition(" ")[0], []).append(f"`{row['unit']}`")
    return "\n".join(f"- {name}: {', '.join(units)}" for name, units in names.items())


def markdown(rows: list[Row], setting: Setting) -> str:
    """The page: what is predicted, what would falsify it, the tables."""
    step, device = total(rows), setting.device
    units = sorted((row for row in rows if row["stage"] != "head"), key=gain, reverse=True)
    losing = [row for row in reversed(units) if gain(row) < 0]
    ms = {name: step[name] / 1e3 for name in TIMES}
    behind = [stage for stage, found in by_stage(rows).items() if found[RATIOS[0]] > 1]
    own = "slower" if ms["predicted_us_ours_own_conv3x3"] > ms["predicted_us_ours"] else "faster"
    page = f"""# Predictions

Every figure on this page is **predicted**; none was measured. It is the hypothesis that the first run on a GPU tests.
The page is written by

```
python benchmarks/predict_units.py --network {setting.network} --gpu {setting.gpu} --dtype {setting.dtype} \\
  --batch {setting.batch} --image-size {setting.image_size} --covariance {setting.covariance} --markdown docs/predictions.md
```

**What.** The time of a training step of {setting.network} (batch {setting.batch}, {setting.image_size}×{setting.image_size},
{setting.dtype}, {setting.gpu}) unit by unit, forward and backward. A unit is a convolution with its batch norm, ReLU and residual
addition. Units are read off the stock network; one row stands for all units that are alike, under the name of the first.

**By which model.** A plan is a list of passes over memory, each with the least bytes it can move and its flop.
*stock* is eager PyTorch, *inductor* `torch.compile`, both with cuDNN's convolutions; each pass takes its bound,
max(bytes / bandwidth, flop / rate), at {device.bandwidth / 1e12:.2f} TB/s and {device.half_rate / 1e12:.0f} TFLOP/s.
*ours* is the triton backend with cuDNN's 3×3, *own 3×3* with this package's where there is no stride. Our launches
take what the cost model (`resnet_fused/backends/triton/cost.py`) says of the configuration it ranks first, and no
less than the bound; *bound* is that of the same passes. So stock and inductor get every advantage: they are slower
than this or equal, while ours may be anything from its bound upwards. A pass that is limited by the tensor cores gets
their full rate from cuDNN, whatever its shape.

**What it assumes.** Every kernel of the others reaches the rates. Launches cost nothing (a CUDA graph). L2 keeps
nothing from one launch to the next. Inductor fuses as `benchmarks/unit_passes.py` writes down. cuDNN converts no
layouts and copies nothing. Batch norm's backward joins the 1×1 convolutions' prologues and epilogues. Algebra on [C]
and [C, C], casts of weights, loss and optimizer are not counted, in any plan.

**What would falsify it.**

1. A pass that runs faster than its bound: bytes are counted wrongly, L2 carries over, or the rates are too low.
2. A unit whose measured ratio ours / inductor lies on the other side of 1 than the predicted one, beyond the noise of the run.
3. A launch of ours that takes more than 1.25 times what the cost model says of it: the model misses a limit.
4. A step whose measured ratio ours / inductor is above {step[RATIOS[0]]:.2f}. Inductor at less than its bound lowers it.

## The step

P{caption(setting)[1:]}.

{markdown_table(STEP_HEADER, step_cells(rows, setting), frozenset({0}))}

Stages in which ours **loses** to inductor, as a sum: {", ".join(behind) or "none"}. With our own 3×3 in
place of cuDNN's the model expects a **{own}** step,
{ms["predicted_us_ours_own_conv3x3"]:.1f} ms against {ms["predicted_us_ours"]:.1f} ms; the bounds are
{ms["predicted_us_ours_own_conv3x3_bound"]:.1f} ms and {ms["predicted_us_ours_bound"]:.1f} ms. cuDNN's 3×3 stand here
at their bound, our own at the model's time.

## Unit by unit

P{caption(setting)[1:]}; microseconds of one occurrence, forward and backward.

{markdown_table(UNIT_HEADER, unit_cells(rows), frozenset({0, 2, 10}))}

What one launch does for two units counts where it runs, so rows of one block belong together. Ours adds the
shortcut's gradient in conv1's dgrad, or behind the projection's; inductor adds it in the sums at the previous block's
output, with that block's conv3. Ours has a projection's product in conv3's fprop. A loss of conv1 is partly a gain of
conv3, and the sums by stage are free of this but at their borders.

Ours gains most, in microseconds of the step:

{_listed(units[:5])}

Ours **loses** to cuDNN with inductor's kernels, by this model, worst first:

{_listed(losing) or "- nowhere"}

## What limits ours

The part that takes most of a unit's predicted time: memory, L2, or arithmetic (tensor cores, prologues and epilogues,
partial waves).

{_limits(rows)}"""
    return wrapped(page)


def wrapped(page: str) -> str:
    """Paragraphs filled to one width; headings, commands, tables and lists as they are."""
    parts = page.split("\n\n")
    return "\n\n".join(p if p[0] in "#`|-1" else textwrap.fill(p, 130, break_on_hyphens=False) for p in parts) + "\n"


def write_csv(rows: Iterable[Row], path: Path) -> None:
    made = commit()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            rounded = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(rounded | {"commit": made})


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet50", type=one_of("network", BUILDERS))
    parser.add_argument("--batch", default=256, type=positive)
    parser.add_argument("--image-size", default=224, type=image_size)
    parser.add_argument("--dtype", default="bf16", type=one_of("dtype", ("bf16", "fp16")))
    parser.add_argument("--gpu", default="H200", type=one_of("GPU", tuple(devices.DEVICES)))
    parser.add_argument(
        "--covariance", default="auto", type=one_of("plan", choice.CHOICES), help="resnet_fused.covariance"
    )
    parser.add_argument("--results-file", type=Path, metavar="CSV", help="replaced, not appended to")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the page of docs/predictions.md")
    arguments = parser.parse_args()
    paths = {name: vars(arguments).pop(name) for name in ("results_file", "markdown")}
    setting = Setting(**vars(arguments))
    rows = predict_rows(setting)
    show(rows, setting)
    if paths["results_file"] is not None:
        write_csv(rows, paths["results_file"])
    if paths["markdown"] is not None:
        paths["markdown"].write_text(markdown(rows, setting), encoding="utf-8")


if __name__ == "__main__":
    main()
