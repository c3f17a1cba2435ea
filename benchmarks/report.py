"""The tables of GPU results in README.md and benchmarks/README.md, from the files under benchmarks/results alone.

They stand between ``<!-- results: gpu -->`` and ``<!-- end -->``. What is not measured says so, with the command. ``--check``
writes nothing and ends with 1 where a table is not what the files say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from gpu_memory import KEPT
from gpu_steps import CORRECTNESS, DTYPES, HERE, INFER, KERNELS_FILE, MODELS, NETWORKS, TRAIN, UNITS_FILE
from predict_units import markdown_table

from resnet_fused.arguments import Parser
from resnet_fused.bench import AGAIN, FUSED
from resnet_fused.console import print_table
from resnet_fused.providers import GRAPH, NAMES, STOCK
from resnet_fused.result_file import read

BEGIN, END = "<!-- results: gpu -->", "<!-- end -->"
COMMAND = "`make bench-gpu`"
UNKNOWN = f"not measured yet: {COMMAND}"
PROVIDERS = tuple(name for name in NAMES if name != "genstats")
OTHERS = tuple(name for name in PROVIDERS if not name.startswith(FUSED))
SHAPE = "256x3x224x224"
RECORD = "steps_gpu.csv"
LAYOUT_OF_PLOTS = {
    "gpu_throughput.png": "images/s by provider",
    "gpu_roofline.png": "blocks against the roofline",
    "gpu_memory.png": "peak memory by provider",
}

Row = dict[str, str]
Table = tuple[list[str], list[list[str]]]  # header and cells


class Measured:
    """The newest value of every column, of every (device, shape, op, mode, dtype, provider) of a file."""

    def __init__(self, path: Path) -> None:
        self._rows: dict[tuple[str, ...], Row] = {}
        for row in read(path):
            kept = self._rows.setdefault(_key(*(row[name] for name in _KEY)), {})
            kept.update({name: value for name, value in row.items() if value})

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def places(self) -> list[tuple[str, str]]:
        """Devices with the shapes measured on them, as they came."""
        return list(dict.fromkeys((row["device"], row["shape"]) for row in self.rows))

    def value(self, column: str, *key: str) -> float | None:
        found = self._rows.get(_key(*key), {}).get(column)
        return None if found is None else float(found)


_KEY = ("device", "shape", "op", "mode", "dtype", "provider")


def _key(*values: str) -> tuple[str, ...]:
    return values


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_cells(label: str, cells: list[str]) -> list[str]:
    """A line of a table; one without a value says how to get one."""
    return [label, *cells] if any(cells) else [label, UNKNOWN, *[""] * (len(cells) - 1)]


def throughput(found: Measured, place: tuple[str, str], dtypes: Sequence[str]) -> Table:
    """Images/s of every provider; the best of ours to the best of the others; how far "fused" is from itself."""
    lines = []
    for dtype in dtypes:
        for model in MODELS:
            for mode in (TRAIN, INFER):

                def rate(provider: str, case: tuple[str, ...] = (model, mode, dtype)) -> float | None:
                    return found.value("images_per_s", *place, *case, provider)

                ours = [r for r in map(rate, (FUSED, FUSED + GRAPH)) if r is not None]
                others = [r for r in map(rate, OTHERS) if r is not None]
                ratio = max(ours) / max(others) if ours and others else None
                same = [r for r in map(rate, (FUSED, AGAIN, f"{AGAIN}, 2")) if r is not None]
                noise = max(same) / min(same) - 1 if len(same) > 1 else None
                cells = [*(_cell(rate(name), ".0f") for name in PROVIDERS), _cell(ratio, ".2f"), _cell(noise, ".1%")]
                lines.append(_with_cells(f"{model}, {mode}, {dtype}", cells))
    return ["images/s", *PROVIDERS, "fused / best other", "noise"], lines


def memory(found: Measured, place: tuple[str, str]) -> Table:
    """Peak MiB of a training step, and what is kept for the backward."""
    lines = []
    for dtype in DTYPES:
        for model in MODELS:
            peaks = [found.value("peak_mib", *place, model, TRAIN, dtype, name) for name in PROVIDERS]
            kept = [found.value("peak_mib", *place, model + KEPT, TRAIN, dtype, name) for name in (STOCK, FUSED)]
            cells = [_cell(value, ",.0f") for value in (*peaks, *kept)]
            lines.append(_with_cells(f"{model}, {dtype}", cells))
    return ["MiB, training step", *PROVIDERS, "stock keeps", "fused keeps"], lines


def units(found: Measured, device: str | None) -> Table:
    """Milliseconds of blocks and the share of the roofline that fused reaches."""
    cases = dict.fromkeys(
        tuple(row[name] for name in _KEY[:-1]) for row in found.rows if device is None or row["device"] == device
    )
    lines = []
    for case in cases:
        ms = [found.value("p50_ms", *case, name) for name in (STOCK, "compile", FUSED)]
        share = found.value("fraction_of_roofline", *case, FUSED)
        ratio = ms[1] / ms[2] if ms[1] and ms[2] else None
        _, shape, op, mode, dtype = case
        cells = [shape, *(_cell(value, ".3f") for value in ms), _cell(ratio, ".2f"), _cell(share, ".0%")]
        lines.append([f"{op}, {mode}, {dtype}", *cells])
    header = ["block, ms", "input", STOCK, "compile", FUSED, "compile / fused", "fused of roofline"]
    return header, lines or [_with_cells("every block, train and infer", [""] * 6)]


def ceilings(found: Measured, device: str | None) -> Table:
    lines = []
    for op, dtype, column, unit in (
        ("copy", "uint8", "gb_per_s", "GB/s"),
        ("matmul", "bf16", "tflop_per_s", "TFLOP/s"),
        ("matmul", "fp16", "tflop_per_s", "TFLOP/s"),
    ):
        values = [
            row[column]
            for row in found.rows
            if (row["op"], row["dtype"]) == (op, dtype) and (device is None or row["device"] == device)
        ]
        reached = f"{float(values[-1]):,.0f} {unit}" if values else ""
        lines.append(_with_cells(f"{op}, {dtype}" if unit != "GB/s" else op, [reached]))
    return ["reached at most", ""], lines


def checks(rows: Iterable[Row], device: str | None) -> Table:
    newest = {
        row["step"]: row for row in rows if row["part"] == CORRECTNESS and (device is None or row["device"] == device)
    }
    lines = [[name, row["result"], row["commit"]] for name, row in newest.items()]
    return ["check", "", "commit"], lines or [_with_cells("all", [""] * 2)]


# Pages


def _markdown(table: Table) -> str:
    header, cells = table
    return markdown_table(header, cells, frozenset({0}))


def _places(found: Measured) -> list[tuple[str, str]]:
    return found.places or [("", SHAPE)]


def _title(place: tuple[str, str]) -> str:
    device, shape = place
    batch, _, size, _ = shape.split("x")
    return f"{device or 'No GPU has run this yet'}: batch {batch} at {size}²."


def short(folder: Path) -> str:
    """For README.md: the networks in bf16."""
    found = Measured(folder / NETWORKS)
    return "\n\n".join(
        f"{_title(place)}\n\n{_markdown(throughput(found, place, DTYPES[:1]))}" for place in _places(found)
    )


def full(folder: Path) -> str:
    """For benchmarks/README.md: everything."""
    networks, blocks, kernels = (Measured(folder / name) for name in (NETWORKS, UNITS_FILE, KERNELS_FILE))
    record = read(folder / RECORD)
    parts = []
    for device in list(dict.fromkeys(device for device, _ in _places(networks))):
        known = device or None
        parts += [_markdown(checks(record, known)), _markdown(ceilings(kernels, known))]
        for place in _places(networks):
            if place[0] == device:
                parts += [
                    _title(place),
                    _markdown(throughput(networks, place, DTYPES)),
                    _markdown(memory(networks, place)),
                ]
        parts.append(_markdown(units(blocks, known)))
    drawn = [(name, told) for name, told in LAYOUT_OF_PLOTS.items() if (folder / name).exists()]
    parts += [f"![{told}](results/{name})" for name, told in drawn]
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[Path], str]] = {"README.md": short, "benchmarks/README.md": full}


def with_results(page: str, made: str) -> str:
    """The page with ``made`` between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def show(folder: Path, device: str) -> None:
    """The networks' table for a terminal: the lines that have a value."""
    found = Measured(folder / NETWORKS)
    for place in found.places:
        if place[0] == device:
            header, lines = throughput(found, place, DTYPES)
            lines = [line for line in lines if line[1] != UNKNOWN]
            if lines:
                print_table(_title(place), header, lines, right=range(1, len(header)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a table is out of date")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--pages", type=Path, default=HERE.parent, metavar="FOLDER", help="that holds the pages")
    options = parser.parse_args(argv)
    old = []
    for name, make in PAGES.items():
        path = options.pages / name
        page = path.read_text(encoding="utf-8")
        try:
            new = with_results(page, make(options.results))
        except ValueError as error:
            parser.error(f"{path}: {error}")
        if new != page:
            old.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and old:
        print(f"out of date: {', '.join(old)}; python benchmarks/report.py writes them")
        return 1
    print("up to date" if options.check else f"written: {', '.join(old) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
