"""Folded convolutions by Triton's kernels, in its interpreter."""

from __future__ import annotations

import pytest
import torch
from folded_cases import EPILOGUES, as_on_a_gpu, check, check_network

from resnet_fused import routes
from resnet_fused.backends.triton import dispatch


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch):
    as_on_a_gpu(monkeypatch, {"cudnn": dispatch.TritonPasses(), "triton": dispatch.TritonKernels(own_conv3x3=True)})
    yield
    routes.reload()


DTYPES = (torch.bfloat16, torch.float32, torch.float16)
CASES = [
    pytest.param(geometry, epilogue, dtype, marks=[] if (3 * i + j + 5 * k) % 12 == 0 else pytest.mark.slow)
    for i, geometry in enumerate(("pointwise", "pointwise-strided", "pointwise-odd", "3x3", "stem"))
    for j, epilogue in enumerate(EPILOGUES)
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize("geometry, epilogue, dtype", CASES, ids=str)
def test_providers(geometry, epilogue, dtype):
    expected = {"cudnn"} if EPILOGUES[epilogue][2] else set()
    expected |= {"triton"} if geometry.startswith("pointwise") else set()
    check(geometry, epilogue, dtype, expected | ({"space_to_depth"} if geometry == "stem" else set()))


@pytest.mark.slow
@pytest.mark.parametrize("name, runs", [("triton", 14), ("passes", 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network(monkeypatch, name, runs, dtype):
    check_network(monkeypatch, name, dtype, runs)
