"""Shared by all tests: one thread, one seed, and a fixture that runs a test on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture(params=resnet_fused.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with resnet_fused.backend(request.param):
        yield request.param
