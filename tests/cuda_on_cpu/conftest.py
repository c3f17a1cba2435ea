"""Tests here run CUDA kernels on a processor; they need a C++ compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import HERE, Kernels, build, compiler


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Kernels]:
    return functools.cache(lambda main: Kernels(build(tmp_path_factory.mktemp("emulated"), main=main)))


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest, _built: Callable[[Path], Kernels]) -> Kernels:
    """Those that a test module names as its MAIN, else of kernels.cpp."""
    return _built(getattr(request.module, "MAIN", HERE / "kernels.cpp"))
