"""Files of measured choices, which the dispatch on a GPU reads: JSON, one inside the package and above it the user's.

::

    {"kind": "resnet_fused.tuning", "format": 1, "entries": {KEY: …, …}, "routes": {KEY: …, …}}

``entries`` are configurations of Triton kernels (``backends.triton.tuning``), ``routes`` say which backend runs what
(``routes``). The user's file is in the platform's cache directory, or where ``RESNET_FUSED_TUNING_TABLE`` says. A file that
cannot be used is ignored with one warning.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

ENVIRONMENT_VARIABLE = "RESNET_FUSED_TUNING_TABLE"
KIND, FORMAT = "resnet_fused.tuning", 1
SHIPPED_TABLE = Path(__file__).with_name("tuning_table.json")
SECTIONS = ("entries", "routes")

Document = dict[str, Any]
T = TypeVar("T")


def user_table() -> Path:
    """Where the user's table is, or would be."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(os.path.expanduser(named))
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # Not Path.expanduser, which raises where nobody has a home.
    return Path(os.path.expanduser(cache)) / "resnet_fused" / "tuning.json"


def parse(text: str) -> Document:
    """The document in a table's text.

    Raises:
        ValueError: it is no table of this format.
    """
    try:
        content = json.loads(text)
        if (content["kind"], content["format"]) != (KIND, FORMAT):
            raise ValueError(f"is a {content['kind']!r} of format {content['format']!r}, not {KIND!r} of {FORMAT}")
        return content | {section: dict(content[section]) for section in SECTIONS}
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"is not a tuning table ({type(error).__name__}: {error})") from error


def state(path: Path, counts: Callable[[str], str]) -> str:
    """What ``counts`` says of the table's text, or why there is nothing to count."""
    try:
        return counts(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"ignored: {error}"


_warned: set[Path] = set()


def read(path: Path, parse_text: Callable[[str], dict[str, T]]) -> dict[str, T]:
    """What ``parse_text`` finds in the table at ``path``: nothing where there is no file; nothing, and a warning once, where it
    cannot be used."""
    try:
        return parse_text(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if path not in _warned:
            _warned.add(path)
            warnings.warn(f"the tuning table {path} is ignored: {error}", RuntimeWarning, stacklevel=2)
        return {}


def write(path: Path, section: str, entries: Mapping[str, Any]) -> None:
    """Replace one section of a table, in one step: a reader, or a crash, sees the old file or the new one."""
    empty: Document = {"kind": KIND, "format": FORMAT} | {name: {} for name in SECTIONS}
    document = (read(path, parse) or empty) | {section: dict(sorted(entries.items()))}
    text = json.dumps(document, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows replaces no open file
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
