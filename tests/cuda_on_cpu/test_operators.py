"""The ``cuda`` backend's operators, launchers and all, run by emulation: against float64, beside stock PyTorch."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import Case
from emulated import DTYPES, LAYOUTS, name_of
from emulated_operators import EmulatedConvolutions, EmulatedCuda
from torch import Tensor, nn

import resnet_fused
from resnet_fused import folded
from resnet_fused.backends.algebra import moments_dtype
from resnet_fused.backends.aten import AtenKernels, pack_mask
from resnet_fused.backends.cuda import convolves
from resnet_fused.backends.operands import Conv, Feedback, Pending, Product, acc_dtype
from resnet_fused.folded import fold, fold_all
from resnet_fused.statistics import coupling, coupling_shift, pack_moments
from resnet_fused.testing import assert_as_accurate

STOCK = AtenKernels()
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(2, 24, 3, 5), (1, 17, 4, 3)]
every_case = pytest.mark.parametrize(
    "dtype, shape, layout", [(d, s, layout) for d in DTYPES for s in SHAPES for layout in LAYOUTS], ids=name_of
)


class Inputs(Case):
    """With what the mask and the pool need."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format) -> None:
        super().__init__(shape, dtype, layout)
        n, c, h, w = shape
        self.pooled = torch.randn(n, c, (h + 1) // 2, (w + 1) // 2).to(dtype).contiguous(memory_format=layout)
        self.mask = pack_mask(torch.rand(shape).contiguous(memory_format=layout) < 0.5)

    def double(self) -> Inputs:
        wide = super().double()
        wide.mask = self.mask
        return wide


def clone(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.preserve_format)


def calls(k: AtenKernels, of: Inputs, index: Tensor) -> dict[str, object]:
    norm, abc = (of.mean, of.scale, of.shift), of.coefficients
    added, applied, passed = clone(of.x), clone(of.x), clone(of.grad)
    k.mask_grad_add_(added, of.grad, of.mask)
    k.bn_act_(applied, of.scale, of.shift, of.residual, True)
    return {
        "bn_stats": k.bn_stats(of.x),
        "bn_act": k.bn_act(of.x, *norm[1:], of.residual, True, False)[0],
        "bn_act without ReLU": k.bn_act(of.x, *norm[1:], None, False, False)[0],
        "bn_act_": applied,
        "add_relu": k.add_relu(of.x, of.residual, False)[0],
        "mask_grad": k.mask_grad(of.grad, of.mask),
        "mask_grad_add_": added,
        "reduce, mask": k.bn_act_backward_reduce(of.grad, of.x, of.mask, *norm, True, False)[:2],
        "reduce, ReLU": k.bn_act_backward_reduce(of.grad, of.x, None, *norm, True, True),
        "reduce, open": k.bn_act_backward_reduce(of.grad, of.x, None, *norm, False, True),
        "backward, mask": k.bn_act_backward(of.grad, of.x, of.mask, *norm, True, abc),
        "backward, ReLU": k.bn_act_backward(of.grad, of.x, None, *norm, True, abc),
        "backward in place": k.bn_act_backward(passed, of.x, None, *norm, False, abc, True),
        "pool": k.bn_relu_maxpool(of.x, *norm[1:])[0],
        "pool, reduce": k.bn_relu_maxpool_backward_reduce(of.pooled, index, of.x, of.mean),
        "pool, backward": k.bn_relu_maxpool_backward(of.pooled, index, of.x, of.mean, abc),
    }


@every_case
def test_against_float64(cuda: EmulatedCuda, dtype, shape, layout):
    check(cuda, Inputs(dtype, shape, layout))


def shifted(t: Tensor) -> Tensor:
    """The same an element further on in memory, where no 16 bytes begin."""
    memory = t.new_empty(t.numel() + 1)[1:]
    return torch.as_strided(memory, t.shape, t.stride(), memory.storage_offset()).copy_(t)


@pytest.mark.parametrize("which", ["vectors", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_tensors_that_begin_anywhere(cuda: EmulatedCuda, dtype, which):
    of = Inputs(dtype, SHAPES[0], torch.channels_last)
    if which == "vectors":
        for name in ("mean", "scale", "shift", "a", "b", "c"):
            setattr(of, name, shifted(getattr(of, name)))
    else:
        of.x, of.residual, of.grad, of.pooled = map(shifted, (of.x, of.residual, of.grad, of.pooled))
    check(cuda, of)


@pytest.mark.parametrize("shape, layout", [((3, 8, 41, 40), LAYOUTS[0]), ((6, 2, 40, 41), LAYOUTS[1])], ids=name_of)
def test_sums_of_several_splits(cuda: EmulatedCuda, shape, layout):
    of = Inputs(torch.bfloat16, shape, layout)
    index = STOCK.bn_relu_maxpool(of.x, of.scale, of.shift)[1]
    for call in (
        lambda k, of: k.bn_stats(of.x),
        lambda k, of: k.bn_act_backward_reduce(of.grad, of.x, of.mask, of.mean, of.scale, of.shift, True, False)[:2],
        lambda k, of: k.bn_relu_maxpool_backward_reduce(of.pooled, index, of.x, of.mean),
    ):
        found = [call(k, a) for k, a in ((cuda, of), (STOCK, of), (STOCK, of.double()))]
        for ours, stock, gold in zip(*found, strict=True):
            assert_as_accurate(ours, stock, gold, rows=of.x.numel() // shape[1], scale=1.0)


def check(cuda: EmulatedCuda, of: Inputs) -> None:
    dtype, shape = of.x.dtype, of.x.shape
    index = STOCK.bn_relu_maxpool(of.x, of.scale, of.shift)[1]
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
    of = Inputs(dtype, shape, layout)
    scale, shift = of.scale, of.shift
    for out, mask in (cuda.bn_act(of.x, scale, shift, of.residual, True, True), cuda.add_relu(of.x, of.residual, True)):
        assert torch.equal(mask, pack_mask(~(out <= 0)))
    out, index = cuda.bn_relu_maxpool(of.x, scale, shift)
    applied = cuda.bn_act(of.x, scale, shift, None, True, False)[0]
    expected, winners = STOCK.bn_relu_maxpool(applied, torch.ones_like(scale), torch.zeros_like(shift))
    assert torch.equal(out, expected) and torch.equal(index, winners)


def three(k_ours: EmulatedCuda, name: str, *of: object) -> list[list[Tensor]]:
    """A method's results by the CUDA kernels, by the formulas in the same dtype, and by these in float64."""

    def wide(value: object) -> object:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_number else torch.float64 if isinstance(value, torch.dtype) else value

    return [tensors_of(getattr(k, name)(*a)) for k, a in ((k_ours, of), (STOCK, of), (STOCK, list(map(wide, of))))]


def tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = vars(value).values() if isinstance(value, Feedback) else value
    return [t for part in parts if part is not None for t in tensors_of(part)]


def all_as_accurate(found: list[list[Tensor]], **options: float) -> None:
    for i, (ours, stock, gold) in enumerate(zip(*found, strict=True)):
        assert ours.dtype == stock.dtype and ours.shape == stock.shape, i
        if ours.dtype == torch.bool:
            assert torch.equal(ours, gold), i
        else:
            assert_as_accurate(ours, stock, gold, name=str(i), **options)


PARAMETERS = [(torch.float64, torch.float64), (torch.float32, torch.float32)]
PARAMETERS += [(half, other) for half in (torch.bfloat16, torch.float16) for other in (half, torch.float32)]
every_parameter = pytest.mark.parametrize("dtype, parameters", PARAMETERS, ids=name_of)


class Filter:
    """A 1×1 filter, what it reads and the batch norm behind it."""

    def __init__(self, dtype: torch.dtype, outputs: int = 40, channels: int = 24) -> None:
        acc = acc_dtype(dtype)
        a = torch.randn(200, channels, dtype=torch.float64) + 1
        self.mean, self.cov = a.mean(0), a.t().cov(correction=0)
        self.weight = (torch.randn(outputs, channels) / 5).to(dtype)
        self.t = torch.randn(outputs, channels).to(moments_dtype(dtype))
        self.sum_dz, self.of_mean, self.rstd, self.scale = torch.rand(4, outputs, dtype=acc) + 0.5


@every_parameter
def test_algebra_of_a_norm(cuda: EmulatedCuda, dtype, parameters):
    acc = acc_dtype(dtype)
    for statistics in {acc, moments_dtype(dtype)}:
        mean, var = torch.randn(35, dtype=statistics), torch.rand(35, dtype=statistics)
        vectors = torch.randn(2, 35).to(parameters)
        all_as_accurate(three(cuda, "norm_vectors", mean, var, *vectors, 1e-5, acc))
    for training in (True, False):
        all_as_accurate(three(cuda, "norm_gradients", *torch.rand(4, 35, dtype=acc), 60, training, parameters))


@every_parameter
@pytest.mark.parametrize("cumulative", [False, True])
def test_running_statistics(cuda: EmulatedCuda, dtype, parameters, cumulative):
    batch = torch.rand(2, 35, dtype=acc_dtype(dtype))
    running = torch.rand(3, 35).to(parameters)
    batches = torch.tensor(4) if cumulative else None
    updated = []
    for k, to in ((cuda, parameters), (STOCK, parameters), (STOCK, torch.float64)):
        mean, var, bias = (t.clone() for t in running.to(to))
        k.update_running(mean, var, *batch, bias, 0.1, batches, 60 / 59)
        updated.append([mean, var])
    all_as_accurate(updated)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_statistics_through_a_covariance(cuda: EmulatedCuda, dtype):
    of = Filter(dtype)
    w = of.weight.double()
    condition = (w.abs() @ (of.cov.diag() + of.mean**2).sqrt()) ** 2 / ((w @ of.cov) * w).sum(1)
    found = three(
        cuda, "through_covariance", of.weight, of.mean, of.cov, 2.0**-20, 2.0**-20 * float(condition.median()) * 1.01
    )
    assert found[2][2].any() and not found[2][2].all()
    all_as_accurate(found, scale=1.0)


@every_parameter
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_a_filters_rows(cuda: EmulatedCuda, dtype, parameters, frozen):
    of = Filter(dtype)
    moments = None if frozen else pack_moments(of.mean, of.cov).to(moments_dtype(dtype))
    vectors = of.sum_dz, of.of_mean, of.rstd, of.scale, 200
    for wanted in {None, dtype, parameters}:
        found = three(cuda, "row_gradients", of.t, of.weight, moments, *vectors, parameters, wanted)
        all_as_accurate(found, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_feedback(cuda: EmulatedCuda, dtype):
    of = Filter(dtype)
    moments = pack_moments(of.mean, of.cov).to(moments_dtype(dtype))
    rows = STOCK.row_gradients(
        of.t, of.weight, moments, of.sum_dz, of.of_mean, of.rstd, of.scale, 200, acc_dtype(dtype), None
    )
    ours, stock = (k.feedback(of.weight, of.weight, moments, rows) for k in (cuda, STOCK))
    exact = coupling(of.weight.double(), rows.norm.b.double())
    low = torch.zeros(()) if stock.low is None else stock.low
    assert (ours.low is None) == (stock.low is None) == (dtype not in HALF)
    assert_as_accurate(
        ours.coupling.double() + (0 if ours.low is None else ours.low), stock.coupling.double() + low, exact, scale=1.0
    )
    assert torch.equal(ours.mean_a, stock.mean_a) and torch.equal(ours.mean_dz, stock.mean_dz)
    if ours.low is not None:
        summed = ours.coupling.double() + ours.low
        gold = coupling_shift(
            rows.scaled.double(), rows.mean_dz.double(), summed, of.mean.to(ours.mean_a.dtype).double()
        )
        assert_as_accurate(ours.shift, stock.shift, gold, scale=1.0)


CONVOLUTIONS = [  # size, stride, C, K, H, W
    (1, 1, 16, 24, 5, 7),
    (1, 2, 24, 72, 9, 6),
    (3, 1, 16, 24, 6, 5),
    (3, 2, 40, 16, 7, 8),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("pending", [False, True])
def test_convolutions(cuda_convolutions: EmulatedConvolutions, dtype, case, pending):
    size, stride, c, k, h, w = case
    cuda, conv = cuda_convolutions, Conv((stride, stride), (size // 2, size // 2))
    x = torch.randn(2, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, size, size) / c).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors = [torch.randn(n) for n in (c, c, k, k)]
    a = Pending(x, *vectors[:2], True) if pending else x
    assert convolves(a, weight, conv)
    applied = STOCK.applied(a)
    y, *moments = cuda.fprop_stats(a, weight, conv)
    stock_y, gold_y = STOCK.fprop(applied, weight, conv), STOCK.fprop(applied.double(), weight.double(), conv)
    assert_as_accurate(y, stock_y, gold_y, scale=1.0)
    assert torch.equal(y, cuda.fprop(a, weight, conv))
    for ours, stock, gold in zip(moments, STOCK.bn_stats(y), STOCK.bn_stats(y.double()), strict=True):
        assert_as_accurate(ours, stock, gold, rows=y.numel() // k, scale=1.0)
    if size == 3:
        return
    residual = torch.randn_like(y)
    for count in (1, 2):
        products = [Product(a, weight, conv, vectors[2])] * count
        out, mask = cuda.fprop_bn_act(products, vectors[3], residual, True, True)
        assert torch.equal(mask, pack_mask(~(out <= 0)))
        wide = [Product(applied.double(), weight.double(), conv, vectors[2].double())] * count
        gold = STOCK.fprop_bn_act(wide, vectors[3].double(), residual.double(), True, True)[0]
        assert_as_accurate(out, unfused(stock_y, vectors, residual, count), gold, scale=1.0)


def unfused(y: Tensor, vectors: list[Tensor], residual: Tensor, count: int) -> Tensor:
    """As stock PyTorch rounds it: behind each convolution, each batch norm, and the sum."""
    scale, shift = vectors[2][:, None, None], vectors[3][:, None, None]
    z = (y.float() * scale + shift).to(y.dtype)
    for _ in range(count - 1):
        z = z + (y.float() * scale).to(y.dtype)
    return torch.relu(z + residual)


def test_convolutions_that_the_extension_leaves_to_pytorch(cuda_convolutions: EmulatedConvolutions):
    x = torch.randn(1, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    twelve = torch.randn(1, 12, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    usual = Conv(padding=(1, 1))
    others = [  # one thing is different in each
        (x.float(), weight.float(), usual),
        (x.contiguous(), weight, usual),
        (x, weight.contiguous(), usual),
        (shifted(x), weight, usual),
        (x, weight, Conv()),
        (x, weight, Conv((1, 2), (1, 1))),
        (x, weight, Conv(padding=(1, 1), dilation=(2, 2))),
        (twelve, weight[:, :12].contiguous(memory_format=torch.channels_last), usual),
        (x, weight[:, :8].contiguous(memory_format=torch.channels_last), Conv(padding=(1, 1), groups=2)),
        (x, weight[:7], usual),
        (x[:0], weight, usual),
    ]
    assert convolves(x, weight, usual)
    for a, w, conv in others:
        assert not convolves(a, w, conv), conv
        assert torch.equal(cuda_convolutions.fprop(a, w, conv), STOCK.fprop(a, w, conv))


@pytest.mark.parametrize("dtype, to", [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None)])
def test_a_network_folds_in_one_launch(cuda: EmulatedCuda, dtype, to, monkeypatch):
    folded_by_formula: list[object] = []
    monkeypatch.setattr(folded, "fold", lambda *of: folded_by_formula.append(of))
    pairs = [
        (nn.Conv2d(3, 12, 7), nn.BatchNorm2d(12)),
        (nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)),
        (nn.Conv2d(8, 16, 3, groups=2).to(memory_format=torch.channels_last), nn.BatchNorm2d(16, eps=0.1)),
    ]
    for conv, bn in pairs:
        conv.to(dtype), bn.to(dtype)
        nn.init.normal_(bn.running_mean), nn.init.uniform_(bn.running_var, 0.5, 2)
    with resnet_fused.backend(cuda.name):
        found = fold_all(pairs, to)
    assert not folded_by_formula
    for (conv, bn), ours in zip(pairs, found, strict=True):
        gold, stock = fold(conv, bn, torch.float64), fold(conv, bn, to)
        for one, other, exact in zip(ours, stock, gold, strict=True):
            assert one.dtype == other.dtype and one.stride() == other.stride()
            assert_as_accurate(one, other, exact, scale=16 if dtype is torch.float64 else 0.0)


def bad_calls(ops: object) -> dict[str, object]:
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    half, scale = x.bfloat16(), torch.randn(8)
    weight = torch.randn(16, 8, 1, 1).bfloat16()
    norm = (scale, scale, scale, scale)
    return {
        r"bn_act: scale: expected shape \[8\], got \[5\]": lambda: ops.bn_act(x, scale[:5], scale, None, True, False),
        r"bn_act: residual: expected Float, got BFloat16": lambda: ops.bn_act(x, scale, scale, half, True, False),
        r"mask_grad: mask: expected Byte": lambda: ops.mask_grad(x, scale),
        r"conv_stats: x: expected bfloat16": lambda: ops.conv_stats(x, None, None, False, weight, 1),
        r"conv_stats: .*both or neither": lambda: ops.conv_stats(half, scale, None, False, weight, 1),
        r"conv_bn_act: .*multiples of 8": lambda: ops.conv_bn_act(
            half, None, None, False, weight[:4], 1, None, None, None, False, False
        ),
        r"norm_vectors: var: expected 8 contiguous": lambda: ops.norm_vectors(
            scale, scale[:4], scale, scale, 0.1, torch.float32
        ),
        r"norm_gradients: there is no kernel": lambda: ops.norm_gradients(*norm, 4, True, torch.float64),
        r"coupling: scaled: expected BFloat16": lambda: ops.coupling(
            weight[:, :, 0, 0], torch.randn(16), torch.randn(44), torch.randn(16, 8), torch.randn(16)
        ),
        r"fold_batch_norms: .*one length": lambda: ops.fold_batch_norms(
            [weight], [], [], [], [], [], [], torch.float32
        ),
    }


@pytest.mark.parametrize("message", bad_calls(None))
def test_bad_arguments_are_named(cuda: EmulatedCuda, message):
    with pytest.raises(RuntimeError, match=message):
        bad_calls(cuda.ops)[message]()


def test_empty_batches(cuda: EmulatedCuda):
    x, vector = torch.empty(0, 8, 3, 3), torch.ones(8)
    assert all(t.isnan().all() for t in cuda.bn_stats(x))
    assert cuda.bn_act(x, vector, vector, None, True, True)[0].shape == x.shape
    reduced = cuda.bn_act_backward_reduce(x, x, None, vector, vector, vector, True, False)
    assert not any(t.any() for t in reduced[:2])
    assert cuda.bn_relu_maxpool(x, vector, vector)[0].shape == (0, 8, 2, 2)
