"""Folded convolutions by Triton's kernels, in its interpreter."""

from __future__ import annotations

import pytest
from folded_cases import EPILOGUES, as_on_a_gpu, check, check_network

from resnet_fused import routes
from resnet_fused.backends.triton import dispatch


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch):
    as_on_a_gpu(monkeypatch, {"cudnn": dispatch.TritonPasses(), "triton": dispatch.TritonKernels(own_conv3x3=True)})
    yield
    routes.reload()


@pytest.mark.one_in(10)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", ["pointwise", "pointwise-strided", "pointwise-odd", "3x3", "stem"])
def test_providers(geometry, epilogue, dtype):
    expected = {"cudnn"} if EPILOGUES[epilogue][2] else set()
    expected |= {"triton"} if geometry.startswith("pointwise") else set()
    check(geometry, epilogue, dtype, expected | ({"space_to_depth"} if geometry == "stem" else set()))


@pytest.mark.slow
@pytest.mark.parametrize("name, runs", [("triton", 14), ("passes", 20)])
def test_a_network(monkeypatch, name, runs, dtype):
    check_network(monkeypatch, name, dtype, runs)
