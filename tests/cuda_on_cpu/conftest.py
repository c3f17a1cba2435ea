"""Tests here run CUDA kernels on a processor; they need a C++ compiler."""

from __future__ import annotations

import pytest
from emulated import Kernels, build, compiler


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return Kernels(build(tmp_path_factory.mktemp("emulated")))
