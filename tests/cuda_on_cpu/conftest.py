"""Tests here run CUDA kernels on a processor; they need a C++ compiler."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import HERE, Kernels, build, built_once, compiler
from emulated_operators import EmulatedConvolutions, EmulatedCuda, build_operators, load

from resnet_fused import backends


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of all workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"


@pytest.fixture(scope="session")
def _built(_folder: Path) -> Callable[[Path], Kernels]:
    return functools.cache(
        lambda main: Kernels(built_once(_folder / main.stem, lambda folder: build(folder, main=main)))
    )


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest, _built: Callable[[Path], Kernels]) -> Kernels:
    """Those that a test module names as its MAIN, else of kernels.cpp."""
    return _built(getattr(request.module, "MAIN", HERE / "kernels.cpp"))


@pytest.fixture(scope="session")
def _operators(_folder: Path) -> None:
    load(built_once(_folder / "operators", build_operators))


@pytest.fixture
def cuda(_operators: None) -> EmulatedCuda:
    """The ``cuda`` backend, its launchers and kernels compiled for a processor, for tensors there."""
    return backends.get(EmulatedCuda.name)


@pytest.fixture
def cuda_convolutions(_operators: None) -> EmulatedConvolutions:
    """The same with the extension's convolutions."""
    return backends.get(EmulatedConvolutions.name)
