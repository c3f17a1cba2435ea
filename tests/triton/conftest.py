"""Every test here runs kernels in Triton's interpreter, repaired for bfloat16."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # nothing to import
else:
    from interpreter import repaired

    @pytest.fixture(autouse=True, scope="session")
    def _faithful_bfloat16() -> Iterator[None]:
        with repaired():
            yield


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest):
    import torch

    return getattr(torch, request.param)
