"""Which configuration a kernel is launched with: what a tuning table says, else what the cost model (``cost.py``) ranks first.

Nothing is timed unless ``tune`` is called. Tables are read once in a process and a choice never changes in it (until
``reload``), so that the same inputs give the same bits.

An entry of a table (``tables``)::

    KEY: {"config": [block_m, block_n, block_k, warps, stages], "us": 12.5}

``KEY`` (see ``entry_key``) names everything on which the best configuration depends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from ... import tables
from ...tables import FORMAT, SHIPPED_TABLE, user_table
from . import configs, cost, devices
from .configs import Config

__all__ = ["Config", "Entry", "NothingWorks", "choose", "deciding", "reload", "tune"]


@triton.jit
def _probe(x):
    return x


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)  # TRITON_INTERPRET counts when a kernel is defined


# The choice


def choose(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of ``kernel`` for ``shape``.

    Args:
        kernel: one of ``configs.KERNELS``.
        shape: rows "m", channels "c", those of a second operand "c2", outputs "k", "h" and "w" for 3×3, "stride": where there
            are any; any other name is a fusion flag ("residual", say), 0 where it is missing.
    Raises:
        ValueError: no kernel has that name.
    """
    decide = _decide.get()
    decided = None if decide is None else decide(kernel, shape, dtype)
    return decided or _chosen(kernel, tuple(sorted(shape.items())), dtype, _where(device))


Decision = Callable[[str, Mapping[str, int], torch.dtype], Config | None]
_decide: ContextVar[Decision | None] = ContextVar("decide", default=None)


@contextmanager
def deciding(decide: Decision) -> Iterator[None]:
    """In this block and thread ``choose`` asks ``decide`` first (None: no wish): to measure, and to see what is asked."""
    token = _decide.set(decide)
    try:
        yield
    finally:
        _decide.reset(token)


def _where(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.lru_cache(maxsize=4096)
def _chosen(kernel: str, items: tuple[tuple[str, int], ...], dtype: torch.dtype, device: torch.device) -> Config:
    if kernel not in configs.KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(configs.KERNELS)}, got {kernel!r}")
    if INTERPRETED or device.type != "cuda":
        # The interpreter's time goes with the number of programs, numpy's with their size.
        return Config(16, 16, 16 if kernel in configs.PRODUCTS else 1, 4, 1)
    shape, gpu = dict(items), devices.describe(device)
    entry = _tables().get(entry_key(kernel, shape, dtype, gpu))
    if entry is not None:
        return entry.config
    return cost.ranked(kernel, shape, dtype, gpu)[0]


def reload() -> None:
    """Forget choices and tables: the next choice reads the tables again."""
    _chosen.cache_clear()
    _tables.cache_clear()


# Tables


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured choice: the configuration and its time in microseconds."""

    config: Config
    us: float


Table = dict[str, Entry]

_GEOMETRY = ("c", "c2", "h", "k", "m", "stride", "w")


def entry_key(kernel: str, shape: Mapping[str, int], dtype: torch.dtype, gpu: devices.Device) -> str:
    """The key of a table's entry: shapes whose M rounds up to one power of two share it, versions of Triton do not."""
    r = 3 if kernel.endswith("3x3") else 1
    flags = "+".join(sorted(name for name, value in shape.items() if name not in _GEOMETRY and value))
    of = shape.get
    geometry = f"h{of('h', 0)} w{of('w', 0)} c{shape['c']} k{of('k', 0)} r{r} stride{of('stride', 1)}"
    bucket = max(0, shape["m"] - 1).bit_length()
    if of("c2"):
        geometry += f" c2_{of('c2')}"
    begin, end = _ends(gpu)
    return f"{begin} {kernel} {str(dtype)[6:]} m2^{bucket} {geometry} [{flags}] {end}"


def _ends(gpu: devices.Device) -> tuple[str, str]:
    """How a key begins and how it ends: GPU and versions."""
    return f"sm_{gpu.arch} {gpu.sms}", f"triton{'.'.join(triton.__version__.split('.')[:2])} v{FORMAT}"


def of_device(gpu: devices.Device) -> Table:
    """What was measured on such a GPU with this Triton, by the tables in force."""
    begin, end = (f"{word} " for word in _ends(gpu))
    return {key: entry for key, entry in _tables().items() if key.startswith(begin) and f"{key} ".endswith(f" {end}")}


def _parse_entry(value: Any) -> Entry:
    numbers, us = value["config"], float(value["us"])
    powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in numbers[:4])
    if not powers or len(numbers) != 5 or not 1 <= numbers[4] <= 16 or not (math.isfinite(us) and us > 0):
        raise ValueError(f"no configuration: {value}")
    return Entry(Config(*numbers), us)


def parse(text: str) -> Table:
    """The entries of a table's text.

    Raises:
        ValueError: it is no table of this format.
    """
    entries = tables.parse(text)["entries"]
    try:
        return {str(key): _parse_entry(value) for key, value in entries.items()}
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"is not a tuning table ({type(error).__name__}: {error})") from error


def read(path: Path) -> Table:
    """The entries of the table at ``path`` (``tables.read``)."""
    return tables.read(path, parse)


def write(path: Path, table: Mapping[str, Entry]) -> None:
    """Replace the entries of the table at ``path`` (``tables.write``)."""
    tables.write(
        path, "entries", {key: {"config": list(dataclasses.astuple(e.config)), "us": e.us} for key, e in table.items()}
    )


def merge(below: Mapping[str, Entry], above: Mapping[str, Entry]) -> Table:
    """Both tables; where both have an entry, that of ``above``."""
    return {**below, **above}


@functools.lru_cache(maxsize=1)
def _tables() -> Table:
    return merge(read(SHIPPED_TABLE), read(user_table()))


# Measuring


class NothingWorks(RuntimeError):
    """Every configuration of a kernel was left out."""


def tune(
    kernel: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    gpu: devices.Device,
    run: Callable[[Config], float],
    check: Callable[[Config], bool],
    *,
    configs: Iterable[Config] | None = None,
    path: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Entry:
    """Measure the candidates, keep the fastest that is right, and write it to the user's table.

    Choices already made in this process stay until ``reload``.

    Args:
        run: launches the kernel with a configuration, and returns its time in microseconds.
        check: launches it on poisoned outputs and tells whether the result is right. Only what passes is timed.
        configs: what to try instead of every candidate that fits.
        path: the table to update, else ``user_table()``. Processes that write one table at the same time may lose entries.
        report: is told what was left out, and why.
    Raises:
        NothingWorks: no configuration works; the table stays as it is.
    """
    best: Entry | None = None
    for config in cost.ranked(kernel, shape, dtype, gpu) if configs is None else configs:
        try:
            if not check(config):
                report(f"{kernel} {config}: wrong")
                continue
            us = float(run(config))
        except (TritonError, RuntimeError) as error:
            if not _is_of_configuration(error):
                raise
            report(f"{kernel} {config}: {type(error).__name__}: {error}")
            continue
        if not (math.isfinite(us) and us > 0):
            report(f"{kernel} {config}: took {us} us")
        elif best is None or us < best.us:
            best = Entry(config, us)
    if best is None:
        raise NothingWorks(f"no configuration of {kernel} works for {dict(shape)} in {dtype} on {gpu.name}")
    path = user_table() if path is None else path
    write(path, merge(read(path), {entry_key(kernel, shape, dtype, gpu): best}))
    return best


def _is_of_configuration(error: Exception) -> bool:
    """Whether another configuration may do better; an illegal memory access, say, spoils the whole process."""
    return isinstance(error, TritonError) or "PassManager" in str(error)
