"""What runs a chain, or a folded convolution, on a GPU under ``auto``: what was measured there, and else stock PyTorch.

Nothing is timed here. ``resnet-fused tune`` measures, and writes the section ``routes`` of a table (``tables``)::

    KEY: {"choice": "routed 64x256x1x1/1=triton …", "us": 812.5, "others": {"stock": 1630.0, …}}

``KEY`` names everything on which the best choice depends; ``others`` are the contestants that lost, in microseconds. The choice
for a chain is ``stock`` (its modules one by one), or a backend with the words "without covariance" where that was faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, tables
from .backends.routed import signature
from .backends.triton import devices
from .compiling import constant
from .plans.spec import Chain, Unit

STOCK = "stock"
KINDS = ("train", "forward")  # of keys whose choice is for a chain, with and without a backward
_GENSTATS = " without covariance"


# Tables


@dataclass(frozen=True)
class Entry:
    """A measured choice, its time and those of the others, in microseconds."""

    choice: str
    us: float
    others: Mapping[str, float]


def parse(text: str) -> dict[str, Entry]:
    """The routes in a table's text.

    Raises:
        ValueError: it is no table.
    """
    try:
        found = {}
        for key, value in tables.parse(text)["routes"].items():
            others = {str(name): float(us) for name, us in value["others"].items()}
            entry = Entry(value["choice"], float(value["us"]), others)
            if not isinstance(entry.choice, str) or not (math.isfinite(entry.us) and entry.us > 0):
                raise ValueError(f"no route: {value}")
            found[str(key)] = entry
        return found
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"is not a tuning table ({type(error).__name__}: {error})") from error


def read(path: Path) -> dict[str, Entry]:
    """The routes of the table at ``path`` (``tables.read``)."""
    return tables.read(path, parse)


def add(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write entries into the table at ``path``, over those with the same keys."""
    written = {key: vars(entry) for key, entry in {**read(path), **entries}.items()}
    tables.write(path, "routes", written)


@functools.lru_cache(maxsize=1)
def _tables() -> dict[str, Entry]:
    return {**read(tables.SHIPPED_TABLE), **read(tables.user_table())}


_reloads = 0


def reloads() -> int:
    """How often ``reload`` was called: who keeps a choice elsewhere forgets it when this changes."""
    return _reloads


def reload() -> None:
    """Forget choices and tables: the next choice reads the tables again."""
    global _reloads
    _reloads += 1
    _tables.cache_clear()
    _chains.clear()


@constant
def measured(key: str) -> str | None:
    """The choice of the tables, None where nothing was measured."""
    entry = _tables().get(key)
    return None if entry is None else entry.choice


@constant
def _device_key(device: torch.device) -> str:
    gpu = devices.describe(device)
    return f"sm_{gpu.arch} {gpu.sms} torch{'.'.join(torch.__version__.split('.')[:2])}"


def of_device(device: torch.device) -> dict[str, Entry]:
    """What was measured on such a device, by the tables in force."""
    key = " " + _device_key(device)
    return {name: entry for name, entry in _tables().items() if name.endswith(key)}


def key_of(kind: str, what: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """The key of an entry. ``shape``: of the input; sizes count, of the batch only the power of two above its pixels; without a
    shape the entry is for any."""
    where = ""
    if shape:
        n, _, h, w = shape
        where = f" m2^{max(0, n * h * w - 1).bit_length()} {h}x{w}"
    return f"{kind} {str(dtype)[6:]}{where} {what} {_device_key(device)}"


# Chains


@dataclass(frozen=True)
class Route:
    """What runs a chain: ``STOCK``, or a backend, and whether it may follow the covariance plan."""

    backend: str
    covariance: bool = True

    @property
    def choice(self) -> str:
        return self.backend + ("" if self.covariance else _GENSTATS)


def route_of(choice: str) -> Route:
    """The inverse of ``Route.choice``."""
    return Route(choice.removesuffix(_GENSTATS), not choice.endswith(_GENSTATS))


def _unit(unit: Unit) -> str:
    flags = ("c" if unit.conv_bias is not None else "") + ("" if unit.training else "f") + ("r" if unit.relu else "")
    conv = f"bn{unit.channels}" if unit.conv is None else signature(unit.weight.shape, unit.conv)  # type: ignore[union-attr]
    return f"{conv}:{flags}"


def describe(c: Chain) -> str:
    """What a chain computes, for a key."""
    return f"[{' '.join(map(_unit, c.units))}] {c.shortcut.name.lower()} {c.tail.name.lower()}"


def chain_key(c: Chain, shape: Sequence[int], dtype: torch.dtype, device: torch.device, save: bool) -> str:
    """``save``: whether a backward follows."""
    return key_of(KINDS[0 if save else 1], describe(c), shape, dtype, device)


def applies(device: torch.device) -> bool:
    """Whether measured choices count there: under ``auto``, on a GPU."""
    return backends.current() == "auto" and device.type == "cuda"


def of_chain(c: Chain, x: Tensor, dtype: torch.dtype, save: bool) -> Route:
    """What runs the chain on ``x`` in ``dtype``: on the user's backend if there is one, on a GPU as measured, else there stock.

    torch.compile asks for any batch and image size at once: the entry without a shape answers.
    """
    empty = x.shape[0] == 0
    if empty or not applies(x.device):
        return Route(backends.choose(x.device, empty))
    if torch.compiler.is_compiling():
        return route_of(_usable(chain_key(c, (), dtype, x.device, save)))
    geometry = tuple(
        (u.conv, u.channels if u.weight is None else u.weight.shape, u.training, u.relu, u.conv_bias is None)
        for u in c.units
    )
    question = geometry, c.shortcut, c.tail, x.shape, dtype, x.device, save
    route = _chains.get(question)
    if route is None:
        if len(_chains) >= _MOST_CHAINS:
            _chains.clear()
        route = _chains[question] = route_of(_usable(chain_key(c, x.shape, dtype, x.device, save)))
    return route


def of_add_relu(a: Tensor) -> Route:
    """What runs ``relu(a + b)``; as for chains, but sizes do not count: whatever runs it is bound by memory."""
    if not applies(a.device):
        return Route(backends.choose(a.device))
    return route_of(_usable(add_relu_key(a.dtype, a.device)))


def add_relu_key(dtype: torch.dtype, device: torch.device) -> str:
    return key_of("train", "add_relu", (), dtype, device)


_MOST_CHAINS = 4096
_chains: dict[tuple[Any, ...], Route] = {}


@constant
def _usable(key: str) -> str:
    """The choice of the tables; stock where nothing was measured, or where what won is not there any more."""
    choice = measured(key)
    return STOCK if choice is None or problem(choice) else choice


def problem(choice: str) -> str:
    """Why what a table chose for a chain cannot run here; "" where it can."""
    backend = route_of(choice).backend
    try:
        if backend != STOCK:
            backends.get(backend)
    except ValueError as error:
        return str(error)
    return ""
