"""All layers of a network folded in one launch, run by emulation."""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch
from emulated import CUDA, DTYPES, HERE, Banded, Kernels
from torch import nn

from resnet_fused.folded import fold
from resnet_fused.testing import assert_as_accurate

PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
MAIN = HERE / "fold_kernels.cpp"
POINTERS = ("weight", "bias", "gamma", "beta", "mean", "var")


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("eps", ctypes.c_double),
        ("folded", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("outputs", "channels", "taps", "channels_last")),
    )


def network(dtype: torch.dtype) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    layers = []
    for (outputs, channels, size), bias, affine, layout in (
        ((5, 3, 7), False, True, torch.channels_last),
        ((17, 8, 3), True, True, torch.contiguous_format),
        ((1, 40, 1), True, False, torch.contiguous_format),
        ((40, 17, 1), False, True, torch.channels_last),
    ):
        conv, bn = nn.Conv2d(channels, outputs, size, bias=bias), nn.BatchNorm2d(outputs, eps=1e-3, affine=affine)
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.1, 2)
        if affine:
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
        layers.append((conv.to(dtype).to(memory_format=layout), bn.to(dtype)))
    return layers


def check(kernels: Kernels, source: torch.dtype, target: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    layers, stores, kept = [], [], []
    for conv, bn in network(source):
        k, c, r, s = conv.weight.shape
        last = conv.weight.is_contiguous(memory_format=torch.channels_last)
        stores.append((Banded(conv.weight.numel(), target), Banded(k, target)))
        values = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        kept.append((conv, bn))
        pointers = [None if t is None else t.data_ptr() for t in values]
        layers.append(
            Layer(*pointers, bn.eps, *(store.flat.data_ptr() for store in stores[-1]), k, c, r * s, int(last))
        )
    kernels("fold", target, DTYPES.index(source), (Layer * len(layers))(*layers), len(layers), seed)
    found = []
    for (conv, bn), (weight, shift) in zip(kept, stores):
        k, c, r, s = conv.weight.shape
        gold, stock = fold(conv, bn, torch.float64), fold(conv, bn, target)
        assert_as_accurate(weight.check().view(k, r, s, c).permute(0, 3, 1, 2), stock[0], gold[0])
        assert_as_accurate(shift.check(), stock[1], gold[1])
        found += [weight.flat, shift.flat]
    return found


@pytest.mark.parametrize("source, target", PAIRS, ids=str)
def test_fold(kernels, source, target):
    check(kernels, source, target)


def test_the_order_does_not_count(kernels):
    found = []
    for seed in range(3):
        torch.manual_seed(0)
        found.append(check(kernels, torch.float32, torch.bfloat16, seed))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("i % layer.channels * layer.taps + i / layer.channels", "i % layer.taps * layer.channels + i / layer.taps"),
        ("or_else(layer.gamma, 1.0)", "or_else(layer.gamma, 0.0)"),
        ("or_else(layer.bias, 0.0) - ", "or_else(layer.bias, 0.0) + "),
        ("+ layer.eps", ""),
        ("i < size; i += kLanes", "i + 1 < size; i += kLanes"),
        ("if (row >= rows) return;", "if (row >= rows - 1) return;"),
    ],
)
def test_planted_faults_are_seen(tmp_path, right, wrong):
    text = (CUDA / "fold.cuh").read_text(encoding="utf-8")
    assert text.count(right) == 1
    library = emulated.build(tmp_path, {"fold.cuh": text.replace(right, wrong)}, main=MAIN, only=torch.float32)
    with pytest.raises(AssertionError):
        check(Kernels(library), torch.float32, torch.float32)
