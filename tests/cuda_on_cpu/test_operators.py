"""The ``cuda`` backend's operators, launchers and all, run by emulation: against float64, beside stock PyTorch."""

from __future__ import annotations

import pytest
import torch
from emulated import DTYPES, LAYOUTS, name_of
from emulated_operators import EmulatedCuda
from torch import Tensor

from resnet_fused.backends.aten import AtenKernels, pack_mask
from resnet_fused.backends.operands import acc_dtype
from resnet_fused.testing import assert_as_accurate

STOCK = AtenKernels()
SHAPES = [(2, 24, 3, 5), (1, 17, 4, 3)]
every_case = pytest.mark.parametrize(
    "dtype, shape, layout", [(d, s, layout) for d in DTYPES for s in SHAPES for layout in LAYOUTS], ids=name_of
)


class Arguments:
    """Of one call for each operator, in ``dtype`` and, the same numbers, in float64."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format) -> None:
        def image(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape).to(dtype).contiguous(memory_format=layout)

        self.x, self.other, self.grad = image(shape), image(shape), image(shape)
        n, c, h, w = shape
        self.pooled = image((n, c, (h + 1) // 2, (w + 1) // 2))
        self.vectors = [torch.randn(c).to(acc_dtype(dtype)) for _ in range(6)]
        self.mask = pack_mask(torch.rand(shape).contiguous(memory_format=layout) < 0.5)

    def double(self) -> Arguments:
        wide = object.__new__(Arguments)
        for name, value in vars(self).items():
            several = isinstance(value, list)
            setattr(wide, name, [v.double() for v in value] if several else value if name == "mask" else value.double())
        return wide


def clone(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.preserve_format)


def calls(k: AtenKernels, of: Arguments, index: Tensor) -> dict[str, object]:
    mean, scale, shift, *abc = of.vectors
    added, applied, passed = clone(of.x), clone(of.x), clone(of.grad)
    k.mask_grad_add_(added, of.grad, of.mask)
    k.bn_act_(applied, scale, shift, of.other, True)
    return {
        "bn_stats": k.bn_stats(of.x),
        "bn_act": k.bn_act(of.x, scale, shift, of.other, True, False)[0],
        "bn_act without ReLU": k.bn_act(of.x, scale, shift, None, False, False)[0],
        "bn_act_": applied,
        "add_relu": k.add_relu(of.x, of.other, False)[0],
        "mask_grad": k.mask_grad(of.grad, of.mask),
        "mask_grad_add_": added,
        "reduce, mask": k.bn_act_backward_reduce(of.grad, of.x, of.mask, mean, scale, shift, True, False)[:2],
        "reduce, ReLU": k.bn_act_backward_reduce(of.grad, of.x, None, mean, scale, shift, True, True),
        "reduce, open": k.bn_act_backward_reduce(of.grad, of.x, None, mean, scale, shift, False, True),
        "backward, mask": k.bn_act_backward(of.grad, of.x, of.mask, mean, scale, shift, True, tuple(abc)),
        "backward, ReLU": k.bn_act_backward(of.grad, of.x, None, mean, scale, shift, True, tuple(abc)),
        "backward in place": k.bn_act_backward(passed, of.x, None, mean, scale, shift, False, tuple(abc), True),
        "pool": k.bn_relu_maxpool(of.x, scale, shift)[0],
        "pool, reduce": k.bn_relu_maxpool_backward_reduce(of.pooled, index, of.x, mean),
        "pool, backward": k.bn_relu_maxpool_backward(of.pooled, index, of.x, mean, tuple(abc)),
    }


@every_case
def test_against_float64(cuda: EmulatedCuda, dtype, shape, layout):
    of = Arguments(dtype, shape, layout)
    index = STOCK.bn_relu_maxpool(of.x, *of.vectors[1:3])[1]
    found, stock, gold = (calls(k, a, index) for k, a in ((cuda, of), (STOCK, of), (STOCK, of.double())))
    for name, ours in found.items():
        each = [t if isinstance(t, tuple) else (t,) for t in (ours, stock[name], gold[name])]
        for i, (one, other, reference) in enumerate(zip(*each, strict=True)):
            # Sums may come out at about 0, and in float64 the reference is no better: there the terms give the scale.
            scale = 16 if dtype is torch.float64 else float(one.dim() == 1)
            assert_as_accurate(
                one, other, reference, rows=shape[0] * shape[2] * shape[3], name=f"{name}[{i}]", scale=scale
            )
            assert one.stride() == other.stride(), name


@every_case
def test_masks_and_winners(cuda: EmulatedCuda, dtype, shape, layout):
    of = Arguments(dtype, shape, layout)
    _, scale, shift, *_ = of.vectors
    for out, mask in (cuda.bn_act(of.x, scale, shift, of.other, True, True), cuda.add_relu(of.x, of.other, True)):
        assert torch.equal(mask, pack_mask(~(out <= 0)))
    out, index = cuda.bn_relu_maxpool(of.x, scale, shift)
    applied = cuda.bn_act(of.x, scale, shift, None, True, False)[0]
    expected, winners = STOCK.bn_relu_maxpool(applied, torch.ones_like(scale), torch.zeros_like(shift))
    assert torch.equal(out, expected) and torch.equal(index, winners)
