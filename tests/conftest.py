"""Shared by all tests: one thread, one seed, and a fixture that runs a test on every backend."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

# Triton decides when it is imported, and when a kernel is defined, whether that will be interpreted on the processor. Here it
# is, also beside a GPU: what runs on one is checked by `make bench-gpu`.
if importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  (imported at the first launch otherwise, where the mode must be the same)

    import resnet_fused

    resnet_fused.available_backends()
    del os.environ["TRITON_INTERPRET"]  # not for the processes that tests start
else:
    import resnet_fused

from resnet_fused import operators

torch.set_num_threads(1)  # the inputs are small; more threads only wait for each other


def share_of(item: pytest.Item) -> int:
    """n of the closest ``one_in(n)``."""
    marker = item.get_closest_marker("one_in")
    assert marker is not None
    return marker.args[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shared: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in") and "slow" not in item.keywords:
            shared.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in shared.values():
        # In an order that has nothing to do with that of the parameters, so that all values of each take turns.
        cases.sort(key=lambda item: crc32(item.nodeid.encode()))
        for item in cases[-(-len(cases) // share_of(cases[0])) :]:
            item.add_marker("slow")
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


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each chain that runs as a fused operator."""
    calls: list[str] = []
    run = operators.chain

    def counted(x, residual, chain, route):
        calls.append(chain.shortcut.name)
        return run(x, residual, chain, route)

    monkeypatch.setattr(operators, "chain", counted)
    return calls


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
