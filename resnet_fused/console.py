"""What the commands share on a terminal: one-line errors, tables and progress bars."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import Any

RICH_MISSING = "this command needs 'rich' for its tables: pip install resnet_fused[cli]"


class UsageError(Exception):
    """A mistake of the caller, told in one line; the command ends with exit code 2."""


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def require_rich() -> None:
    """Raises:
    UsageError: ``rich`` is not installed.
    """
    if not has_rich():
        raise UsageError(RICH_MISSING)


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"resnet-fused: {message}", file=sys.stderr)


def _plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # The last column is left unpadded: it holds reasons and paths of any length.
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header) - 1)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    heading = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    return "\n".join([title, heading, *lines] if any(header) else [title, *lines])


def print_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[int] = (),
    styles: Sequence[str | None] | None = None,
    caption: str | None = None,
) -> None:
    """Print a table, with rich where it is installed and as aligned text otherwise.

    Args:
        right: indices of right-aligned columns.
        styles: a rich style or None per row.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if not has_rich():
        print(_plain_table(title, header, cells), end="\n\n")
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(header),
        pad_edge=False,
    )
    if caption:
        table.caption, table.caption_justify = caption, "left"
    for i, name in enumerate(header):
        last = i == len(header) - 1
        table.add_column(name, justify="right" if i in right else "left", no_wrap=not last, overflow="fold")
    for i, row in enumerate(cells):
        table.add_row(*map(escape, row), style=styles[i] if styles else None)
    console = Console()
    if not console.is_terminal:
        # Into a pipe or a file a table keeps its natural width: a cut-off figure is worth nothing.
        console = Console(width=Measurement.get(console, console.options.update(width=10_000), table).maximum)
    console.print(table)


def progress_bar() -> Any:
    """A ``rich.progress.Progress`` on standard error that leaves no trace when done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
