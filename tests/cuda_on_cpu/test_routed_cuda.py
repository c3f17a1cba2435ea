"""Chains on measured routes with the kernels of a GPU: the extension's by emulation, Triton's in its interpreter."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from block_cases import check_block, compare, narrow_network
from emulated_operators import EmulatedConvolutions, EmulatedCuda
from route_cases import Pretended, convolutions, mixtures, pretend, with_space_to_depth

import resnet_fused
from resnet_fused import backends, networks
from resnet_fused.backends import routed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "triton"))  # its interpreter

HAS_TRITON = "triton" in backends.available_backends()
PROVIDERS = [routed.CUDNN, routed.EXTENSION, *([routed.TRITON] if HAS_TRITON else [])]


@pytest.fixture
def gpu(_operators: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """As ``backends.providers`` has it where the extension was compiled."""
    found = {routed.CUDNN: EmulatedCuda(), routed.EXTENSION: EmulatedConvolutions()}
    if not HAS_TRITON:
        yield from pretend(monkeypatch, with_space_to_depth(found))
        return
    from interpreter import repaired

    from resnet_fused.backends.triton.dispatch import TritonKernels

    class EmulatedWithTriton(EmulatedCuda, TritonKernels):
        def __init__(self) -> None:
            EmulatedCuda.__init__(self)
            TritonKernels.__init__(self, own_conv3x3=True)

    with repaired():
        yield from pretend(monkeypatch, with_space_to_depth(found | {routed.TRITON: EmulatedWithTriton()}))


# What a table may say of a block, and whether it trains; in turns one dtype, and few of all but in the slow tests.
CASES = [
    pytest.param(name, choice, training, dtype, marks=[] if number % 137 == 13 else pytest.mark.slow)
    for number, (name, choice, training, dtype) in enumerate(
        (name, choice + suffix, training, dtype)
        for name in ("basic-strided", "bottleneck", "bottleneck-strided")
        for choice in mixtures(name, PROVIDERS)
        for suffix, training in (("", True), (" without covariance", True), ("", False))
        for dtype in (torch.float32, torch.bfloat16)
    )
]


@pytest.mark.parametrize("name, choice, training, dtype", CASES)
def test_mixtures(name: str, choice: str, training: bool, dtype: torch.dtype, gpu: Pretended) -> None:
    gpu.choice = choice
    check_block(name, training, dtype, "auto")
    assert gpu.ran == [choice]


@pytest.mark.parametrize(
    "training", [pytest.param(True, marks=pytest.mark.slow, id="train"), pytest.param(False, id="eval")]
)
def test_a_network(training: bool, gpu: Pretended) -> None:
    """The stem as space-to-depth, every 3×3 by the extension, the rest in turns."""
    stock = narrow_network()
    networks.hold_clear_of_kinks(stock)
    ways = {"8x3x7x7/2": "space_to_depth"}
    for i, conv in enumerate(convolutions(stock)):
        ways.setdefault(conv, "cuda" if "3x3" in conv else PROVIDERS[i % len(PROVIDERS)])
    gpu.choice = routed.name_of(ways)
    ours, x = resnet_fused.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 32, 32)
    compare(ours, stock, x, training, torch.bfloat16, "auto")
    assert set(gpu.ran) == {gpu.choice}
