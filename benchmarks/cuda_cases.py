"""Calls of the CUDA extension's operators with random arguments, for ``check_cuda.py`` and ``bench_cuda.py``.

A call asks methods of the kernel interface, so that the same one runs with the extension's kernels, with PyTorch's formulas in
the same dtype (``AtenKernels``), and with these in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import networks, statistics
from resnet_fused.backends.algebra import NormGradients, RowGradients, moments_dtype
from resnet_fused.backends.aten import AtenKernels, pack_mask
from resnet_fused.backends.cuda import CudaConvolutionKernels, CudaKernels
from resnet_fused.backends.operands import Conv, Pending, acc_dtype
from resnet_fused.folded import fold, frozen_norm

STOCK = AtenKernels()
HALF = (torch.bfloat16, torch.float16)


# Inputs


class Inputs:
    """Random activations and vectors of one dtype and layout.

    Activations are multiples of 1/16 within 8, scales powers of two, and shifts odd multiples of 1/64, so that
    ``scale·x + shift`` (and a residual added to it) is exact and never 0: a ReLU and its mask are the same on every side.
    """

    def __init__(self, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> None:
        self.dtype, self.layout, self.device = dtype, layout, device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, in float32."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Of ``low`` and above, below ``high``; int64."""
        return torch.randint(low, high, shape, generator=self._generator, device=self.device)

    def image(self, *shape: int) -> Tensor:
        """Activations that no ReLU meets: normal, around 1."""
        return (self.normal(*shape) + 1).to(self.dtype).contiguous(memory_format=self.layout)

    def exact(self, *shape: int) -> Tensor:
        sixteenths = self.normal(*shape).mul_(16).round_().clamp_(-128, 128)
        return sixteenths.div_(16).to(self.dtype).contiguous(memory_format=self.layout)

    def vector(self, channels: int) -> Tensor:
        return self.normal(channels).to(acc_dtype(self.dtype))

    def scale(self, channels: int) -> Tensor:
        signs = 2 * self.integers(0, 2, channels) - 1
        return (2.0 ** self.integers(-1, 2, channels) * signs).to(acc_dtype(self.dtype))

    def shift(self, channels: int) -> Tensor:
        return ((2 * self.integers(-32, 32, channels) + 1) / 64).to(acc_dtype(self.dtype))

    def mask(self, x: Tensor) -> Tensor:
        return self.integers(0, 256, (x.numel() + 7) // 8).to(torch.uint8)


# Cases


@dataclass(frozen=True)
class Case:
    """A call with its arguments.

    Attributes:
        name: operator, and what distinguishes this call of it.
        call: of kernels and ``arguments``; returns the results, those in place too.
        arguments: tensors, modules, numbers, dtypes, and lists of them.
        rows: how many terms the longest sums have.
        moved: bytes that have to be read and written.
        flops: floating-point operations that have to be done, two for each term of a product.
        written: how many of the arguments, the first ones, the call writes over.
        timed: as ``call``, without what only makes results comparable; None: ``call`` itself.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    rows: int = 1
    moved: int = 0
    flops: int = 0
    written: int = 0
    timed: Callable[..., Any] | None = None


def passes(make: Inputs, shape: tuple[int, int, int, int]) -> Iterator[Case]:
    """Passes over activations ``[N, C, H, W]``: batch norm with its ReLU and residual additions."""
    x, other, grad, plain = make.exact(*shape), make.exact(*shape), make.image(*shape), make.image(*shape)
    channels, rows = shape[1], x.numel() // shape[1]
    scale, shift = make.scale(channels), make.shift(channels)
    mean, free_scale, free_shift, *abc = (make.vector(channels) for _ in range(6))
    mask = make.mask(x)
    one, bits = x.numel() * x.element_size(), mask.numel()

    def applied(k: Any, x: Tensor, *rest: Any) -> Tensor:
        k.bn_act_(x, *rest)
        return x

    def added(k: Any, acc: Tensor, *rest: Any) -> Tensor:
        k.mask_grad_add_(acc, *rest)
        return acc

    def reduced(k: Any, *a: Any) -> Any:
        return k.bn_act_backward_reduce(*a)

    def back(k: Any, *a: Any) -> Tensor:
        return k.bn_act_backward(*a[:7], a[7:10], *a[10:])

    def forward(k: Any, *a: Any) -> Any:
        return k.bn_act(*a)

    gate = mean, scale, shift
    yield Case("bn_stats", lambda k, x: k.bn_stats(x), (plain,), rows, one)
    yield Case("bn_act without ReLU", forward, (plain, free_scale, free_shift, None, False, False), 1, 2 * one)
    yield Case("bn_act", forward, (x, scale, shift, None, True, False), 1, 2 * one)
    yield Case("bn_act, residual, mask", forward, (x, scale, shift, other, True, True), 1, 3 * one + bits)
    yield Case("bn_act_", applied, (x, scale, shift, None, True), 1, 2 * one, written=1)
    yield Case("bn_act_, residual", applied, (x, scale, shift, other, True), 1, 3 * one, written=1)
    yield Case("add_relu, mask", lambda k, a, b: k.add_relu(a, b, True), (x, other), 1, 3 * one + bits)
    yield Case("mask_grad", lambda k, g, m: k.mask_grad(g, m), (grad, mask), 1, 2 * one + bits)
    yield Case("mask_grad_add_", added, (plain, grad, mask), 1, 3 * one + bits, written=1)
    yield Case("reduce, mask", reduced, (grad, x, mask, *gate, True, False), rows, 2 * one + bits)
    yield Case("reduce, ReLU, activation", reduced, (grad, x, None, *gate, True, True), rows, 3 * one)
    yield Case("reduce, open", reduced, (grad, plain, None, *gate, False, False), rows, 2 * one)
    yield Case("backward, mask", back, (grad, x, mask, *gate, True, *abc), 1, 3 * one + bits)
    yield Case("backward, ReLU", back, (grad, x, None, *gate, True, *abc), 1, 3 * one)
    yield Case("backward, open, in place", back, (grad, plain, None, *gate, False, *abc, True), 1, 3 * one, written=1)


def pools(make: Inputs, shape: tuple[int, int, int, int]) -> Iterator[Case]:
    """The stem's pooling of activations ``[N, C, H, W]``, forward and backward."""
    n, channels, h, w = shape
    x, grad = make.exact(*shape), make.image(n, channels, (h + 1) // 2, (w + 1) // 2)
    scale, shift = make.scale(channels), make.shift(channels)
    mean, *abc = (make.vector(channels) for _ in range(4))
    index = STOCK.bn_relu_maxpool(x, scale, shift)[1]
    one, pooled = x.numel() * x.element_size(), grad.numel() * (grad.element_size() + 1)

    def reduced(k: Any, *a: Any) -> Any:
        return k.bn_relu_maxpool_backward_reduce(*a)

    def back(k: Any, *a: Any) -> Tensor:
        return k.bn_relu_maxpool_backward(*a[:4], a[4:])

    yield Case("pool", lambda k, *a: k.bn_relu_maxpool(*a), (x, scale, shift), 1, one + pooled)
    yield Case("pool, reduce", reduced, (grad, index, x, mean), grad.numel() // channels, one + pooled)
    yield Case("pool, backward", back, (grad, index, x, mean, *abc), 1, 2 * one + pooled)


def feedback_alone(k: Any, weight: Tensor, moments: Tensor, b: Tensor, scaled: Tensor, mean_dz: Tensor) -> Any:
    return k.feedback(weight, weight, moments, RowGradients(NormGradients(b, b, b, b, b), None, scaled, mean_dz))


def feedback(k: Any, weight: Tensor, moments: Tensor, b: Tensor, scaled: Tensor, mean_dz: Tensor) -> tuple[Tensor, ...]:
    """``G = Wᵀ diag(b) W``, both parts of it together, the constant without the rounding of G, which differs between sides:
    ``−mean_dzᵀ scaled``, and the mean."""
    found = feedback_alone(k, weight, moments, b, scaled, mean_dz)
    if found.low is None:
        return found.coupling, found.mean_a
    coupling = found.coupling.double() + found.low.double()
    return coupling.to(b.dtype), found.mean_a, (found.shift.double() + found.mean_a.double() @ coupling).to(b.dtype)


def exact_feedback(k: Any, weight: Tensor, moments: Tensor, b: Tensor, scaled: Tensor, mean_dz: Tensor) -> Any:
    """What ``feedback`` gives in half precision, by formulas that do not round."""
    return statistics.coupling(weight, b), moments[: weight.shape[1]], -mean_dz @ scaled


def algebra(make: Inputs, outputs: int, channels: int) -> Iterator[Case]:
    """The algebra around a batch norm of K = ``outputs`` channels behind a 1×1 filter ``[K, C]``; parameters of the norm in the
    dtype of the activations and in that of sums."""
    dtype, acc, moments = make.dtype, acc_dtype(make.dtype), moments_dtype(make.dtype)
    a = make.normal(channels + 200, channels).double() + 1
    mean, cov = a.mean(0), a.t().cov(correction=0)
    weight = (make.normal(outputs, channels) / channels**0.5).to(dtype)
    t = make.normal(outputs, channels).to(moments)
    positive = (make.normal(8, outputs).abs() + 0.5).to(acc)
    vectors, batch = tuple(positive[:4]), tuple(positive[4:6])
    packed = statistics.pack_moments(mean, cov).to(moments)
    limit = 2.0**-20 * _between(_condition(weight.double(), mean, cov))

    def updated(k: Any, running_mean: Tensor, running_var: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        k.update_running(running_mean, running_var, *rest)
        return running_mean, running_var

    def vectors_of(k: Any, *a: Any) -> Any:
        return k.norm_vectors(*a)

    def gradients(k: Any, *a: Any) -> Any:
        return k.norm_gradients(*a)[1:]

    def filtered(k: Any, *a: Any) -> Any:
        rows = k.row_gradients(*a)
        return [*rows.norm[1:], rows.scaled, rows.mean_dz, *([] if rows.weight is None else [rows.weight])]

    for parameters in dict.fromkeys((dtype, acc)):
        of = f", {short(parameters)} parameters"
        gamma, beta, running_mean, running_var = (make.normal(4, outputs).abs() + 0.5).to(parameters)
        for kind in dict.fromkeys((acc, moments)):
            given = tuple(v.to(kind) for v in batch)
            yield Case(f"norm_vectors of {short(kind)}{of}", vectors_of, (*given, gamma, beta, 1e-5, acc))
        for training in (True, False):
            mode = "" if training else ", frozen"
            yield Case(f"norm_gradients{mode}{of}", gradients, (*vectors, 60, training, parameters))
            found = t, weight, packed if training else None, *vectors, 200, parameters
            for wanted in dict.fromkeys((None, dtype, parameters)):
                name = f"row_gradients{mode}{of}, {'no' if wanted is None else short(wanted)} dweight"
                yield Case(name, filtered, (*found, wanted), channels)
        running = running_mean, running_var, *batch, beta, 0.1
        yield Case(f"update_running{of}", updated, (*running, None, 60 / 59), written=2)
        batches = torch.tensor(4, device=make.device)
        yield Case(f"update_running, cumulative{of}", updated, (*running, batches, 60 / 59), written=2)
    through = weight, mean, cov, 2.0**-20, limit
    yield Case("through_covariance", lambda k, *a: k.through_covariance(*a), through, channels)
    rows = STOCK.row_gradients(t, weight, packed, *vectors, 200, acc, None)
    coupled = weight, packed, rows.norm.b, rows.scaled, rows.mean_dz
    yield Case("feedback", _feedback_of(dtype), coupled, outputs, timed=feedback_alone)


def _feedback_of(dtype: torch.dtype) -> Callable[..., Any]:
    def call(k: Any, weight: Tensor, *rest: Any) -> Any:
        unrounded = dtype in HALF and weight.dtype == torch.float64
        return (exact_feedback if unrounded else feedback)(k, weight, *rest)

    return call


def _condition(w: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """κ of ``statistics.ill_conditioned``, of each output."""
    return (w.abs() @ (cov.diagonal() + mean * mean).sqrt()) ** 2 / ((w @ cov) * w).sum(1)


def _between(values: Tensor) -> float:
    """A number in the widest gap among the middle half of ``values``: some are above, some below, none near."""
    found = values.sort().values[len(values) // 4 : -(len(values) // 4) or None].log()
    widest = int((found[1:] - found[:-1]).argmax())
    return float(((found[widest] + found[widest + 1]) / 2).exp())


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in networks.DTYPES.items() if known == dtype)


def convolutions(make: Inputs, case: tuple[int, int, int, int, int, int], n: int) -> Iterator[Case]:
    """The convolution of ``n`` images ``[C, H, W]`` with a filter ``[K, C, R, R]``; ``case`` is R, stride, C, K, H and W.
    With what its input waits for (scale, shift, ReLU) and without. Half precision in channels_last only.

    The calls with kernels that are no extension's convolutions are cuDNN's, with a pass for each of the rest."""
    size, stride, c, k, h, w = case
    conv = Conv((stride, stride), (size // 2, size // 2))
    x = make.image(n, c, h, w)
    weight = (make.normal(k, c, size, size) / (c * size * size) ** 0.5).to(make.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    in_scale, in_shift, scale, shift = make.vector(c), make.vector(c), make.vector(k), make.vector(k)
    _, _, p, q = conv.output_shape(x.shape, weight.shape)
    residual = make.image(n, k, p, q)
    formed = STOCK.bn_act(x, in_scale, in_shift, None, True, False)[0]

    def statistics_of(
        kernels: Any, x: Tensor, s: Any, b: Any, _: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.fprop_stats(x if s is None else Pending(x, s, b, True), weight, conv)

    def norm_of(
        kernels: Any, x: Tensor, s: Any, b: Any, _: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        if isinstance(kernels, CudaConvolutionKernels):
            return kernels.ops.conv_bn_act(x, s, b, True, weight, stride, *rest, True, True)
        scale, shift, residual = rest
        y = kernels.fprop(x if s is None else Pending(x, s, b, True), weight, conv)
        return kernels.bn_act(y, scale, shift, residual, True, True)

    # The extension forms what is pending; what it is compared with reads that as it was rounded.
    def as_formed(kernels: Any, x: Tensor, s: Any, b: Any, formed: Tensor) -> tuple[Any, ...]:
        return (x, s, b, formed) if isinstance(kernels, CudaKernels) else (formed, None, None, formed)

    def with_statistics(kernels: Any, *a: Any) -> tuple[Tensor, ...]:
        y, mean, var = statistics_of(kernels, *as_formed(kernels, *a[:4]), *a[4:])
        # Statistics are those of y as it is stored, which differs between sides by roundings: how far they are off.
        exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), unbiased=False)
        return y, *((v.double() - e).to(mean.dtype) for v, e in ((mean, exact_mean), (var, exact_var)))

    def with_norm(kernels: Any, *a: Any) -> tuple[Tensor, ...]:
        out, mask = norm_of(kernels, *as_formed(kernels, *a[:4]), *a[4:])
        return out, (mask == pack_mask(~(out <= 0))).all()

    name, rows = f"{size}×{size}, stride {stride}", n * p * q
    read = x.numel() if size > 1 else rows * c
    moved = (read + weight.numel() + residual.numel()) * x.element_size()
    beside = residual.numel() * x.element_size() + residual.numel() // 8
    flops = 2 * rows * k * weight[0].numel()
    for pending in (False, True):
        given = (x, in_scale, in_shift, formed, weight) if pending else (x, None, None, x, weight)
        how = ", pending input" if pending else ""
        yield Case(f"conv_stats {name}{how}", with_statistics, given, rows, moved, flops, timed=statistics_of)
        of_norm = *given, scale, shift, residual
        yield Case(f"conv_bn_act {name}{how}", with_norm, of_norm, 1, moved + beside, flops, timed=norm_of)


def folds(make: Inputs, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> Case:
    """All of ``pairs`` folded, into the dtype of ``make``."""

    def call(k: Any, pairs: Any, dtype: torch.dtype) -> Any:
        if isinstance(k, CudaKernels):
            return k.fold([frozen_norm(*pair) for pair in pairs], dtype)
        return [fold(conv, norm, dtype) for conv, norm in pairs]

    given = sum(t.numel() * t.element_size() for pair in pairs for module in pair for t in module.state_dict().values())
    weights = sum(conv.weight.numel() + norm.num_features for conv, norm in pairs)
    return Case("fold_batch_norms", call, (list(pairs), make.dtype), 1, given + weights * make.dtype.itemsize)


def some_pairs(dtype: torch.dtype) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and batch norms of several kinds; their parameters as wide as ``dtype``, at least float32."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (nn.Conv2d(3, 12, 7), nn.BatchNorm2d(12)),
        (nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)),
        (nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(16, eps=0.1)),
    ]
    for pair in pairs:
        for module in pair:
            module.to(torch.float64 if dtype == torch.float64 else torch.float32)
            for name, t in module.state_dict().items():
                if t.is_floating_point():
                    values = torch.randn(t.shape, generator=generator)
                    t.copy_(values.abs() + 0.5 if name == "running_var" else values)
    return pairs
