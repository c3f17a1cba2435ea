"""Blocks and a network on the ``cuda`` backend, run by emulation: alone, with the extension's convolutions, with Triton's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from block_cases import BLOCKS, check_block, check_network, check_synchronised
from emulated import name_of
from emulated_operators import WITH_TRITON, EmulatedConvolutions, EmulatedCuda

from resnet_fused import backends

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "triton"))  # its interpreter

BACKENDS = [EmulatedCuda.name, EmulatedConvolutions.name, WITH_TRITON]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Each backend with each block and dtype in turns; all of them in the slow tests.
CASES = [
    pytest.param(name, dtype, backend, marks=[] if (i + j + k) % 4 == 0 else pytest.mark.slow)
    for i, name in enumerate(BLOCKS)
    for j, dtype in enumerate(DTYPES)
    for k, backend in enumerate(BACKENDS)
]


@pytest.fixture(autouse=True)
def _there(_operators: None, request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.getfixturevalue("backend")
    if name not in backends.available_backends():
        pytest.skip("no Triton")
    if name != WITH_TRITON:
        yield
        return
    from interpreter import repaired

    with repaired():
        yield


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name, dtype, backend", CASES, ids=name_of)
def test_blocks(name, dtype, backend, training):
    check_block(name, training, dtype, backend)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", BLOCKS)
def test_synchronised_blocks(name, dtype, backend):
    check_synchronised(name, dtype, backend)


@pytest.mark.parametrize("backend", [EmulatedConvolutions.name, pytest.param(WITH_TRITON, marks=pytest.mark.slow)])
def test_a_network_in_training(backend):
    check_network(True, torch.bfloat16, backend)
