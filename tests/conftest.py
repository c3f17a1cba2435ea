"""Shared by all tests: one thread, one seed, and a fixture that runs a test on every backend."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides when it is imported, and when a kernel is defined, whether that will be interpreted on the processor. Here it
# is, also beside a GPU: what runs on one is checked by `make bench-gpu`.
if importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  (imported at the first launch otherwise, where the mode must be the same)

    import resnet_fused

    del os.environ["TRITON_INTERPRET"]  # not for the processes that tests start
else:
    import resnet_fused

torch.set_num_threads(1)  # the inputs are small; more threads only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# The interpreter is slow: tests/triton has smaller inputs.
@pytest.fixture(params=[name for name in resnet_fused.available_backends() if name != "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with resnet_fused.backend(request.param):
        yield request.param
