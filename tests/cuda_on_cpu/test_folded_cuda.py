"""Folded convolutions by the extension's kernels, run by emulation."""

from __future__ import annotations

import pytest
import torch
from emulated_operators import EmulatedConvolutions, EmulatedCuda
from folded_cases import DTYPES, EPILOGUES, GEOMETRIES, as_on_a_gpu, check, check_network, question

from resnet_fused import folded_gpu, routes
from resnet_fused.tune_folded import Trial

HALF = (torch.bfloat16, torch.float16)
OURS = ("pointwise", "pointwise-strided", "3x3", "3x3-strided")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, cuda: EmulatedCuda, cuda_convolutions: EmulatedConvolutions):
    as_on_a_gpu(monkeypatch, {"cudnn": cuda, "cuda": cuda_convolutions})
    yield
    routes.reload()


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_providers(geometry, epilogue, dtype):
    expected = {"cudnn"} if EPILOGUES[epilogue][2] and dtype != torch.float64 else set()
    expected |= {"cuda"} if geometry in OURS and dtype in HALF else set()
    check(geometry, epilogue, dtype, expected | ({"space_to_depth"} if geometry == "stem" else set()))


@pytest.mark.parametrize("geometry", ["pointwise", "3x3"])
@pytest.mark.parametrize("which", ["x", "residual"])
def test_tensors_that_begin_anywhere(geometry, which):
    trial = Trial(question(geometry, "all", torch.bfloat16))
    t = getattr(trial, which)
    memory = t.new_empty(t.numel() + 1)[1:]
    setattr(trial, which, torch.as_strided(memory, t.shape, t.stride(), memory.storage_offset()).copy_(t))
    assert trial.wrong(["cuda", "passes"]) == {}


@pytest.mark.parametrize("name, runs", [("cuda", 10), ("passes", 20)])  # its narrowest have four channels
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_a_network(monkeypatch, name, dtype, runs):
    check_network(monkeypatch, name, dtype, runs)


def test_a_planted_error_is_found(monkeypatch):
    right = folded_gpu._product

    def wrong(provider, x, layer, residual):
        return right(provider, x, layer, None)

    monkeypatch.setattr(folded_gpu, "_product", wrong)
    with pytest.raises(AssertionError):
        check("3x3", "all", torch.bfloat16, {"cudnn", "cuda"})
