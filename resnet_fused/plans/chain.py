"""The plan of a chain: convolutions, each with batch norm and ReLU, a shortcut around them, and the last ReLU.

A bottleneck, a basic block, the stem with its max pooling, Conv-BN-ReLU and BN-add-ReLU are chains of three, two or one
units. With ``y`` the raw output of a convolution, ``a`` an activation and ``(s, t)`` a batch norm's scale and shift::

    forward   y₁ = conv(x)         s₁, t₁ = batch norm of y₁'s statistics
              a₁ = relu(s₁y₁ + t₁)
              y₂ = conv(a₁)        …
              out, mask = relu(sₙyₙ + tₙ + shortcut)
    save      x, the raw outputs, one mask bit per element of out, [C] vectors; never an activation
    backward  dz from grad and mask, Σ dz, Σ dz·(y − mean)                         one pass
              dy = a·dz + b·(y − mean) + c                                          one pass
              da = dgrad(dy); the pass that forms its sums also forms a again, for dw = wgrad(dy, a)

Stock PyTorch keeps the activations as well as the raw outputs and passes over each tensor twice as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.kernels import Kernels, acc_dtype
from ..statistics import backward_coefficients, scale_shift
from .spec import Chain, Shortcut, Tail, Unit


@dataclass(frozen=True)
class Norm:
    """A batch norm at work: its statistics and what follows from them, ``[C]`` vectors in the accumulation dtype."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, unit: Unit, mean: Tensor, var: Tensor) -> Norm:
        return cls(mean, var, *scale_shift(mean, var, unit.bn_weight, unit.bn_bias, unit.eps))


def _norm(k: Kernels, y: Tensor, unit: Unit) -> Norm:
    """Batch or running statistics of the raw output ``y``, which lacks the convolution's bias."""
    if unit.training:
        return Norm.of(unit, *k.bn_stats(y))
    assert unit.running_mean is not None and unit.running_var is not None
    acc = acc_dtype(y.dtype)
    mean = unit.running_mean.to(acc)
    if unit.conv_bias is not None:
        mean = mean - unit.conv_bias.to(acc)
    return Norm.of(unit, mean, unit.running_var.to(acc))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _weight(unit: Unit, x: Tensor) -> Tensor:
    """The filter in the dtype of the activations (autocast hands over float32 parameters) and in channels_last."""
    assert unit.weight is not None
    return unit.weight.to(x.dtype, memory_format=torch.channels_last)


def _convolve(k: Kernels, x: Tensor, unit: Unit) -> Tensor:
    return x if unit.conv is None else channels_last(k.fprop(x, _weight(unit, x), unit.conv))


def _enter(chain: Chain, x: Tensor) -> Tensor:
    """The chain's input in the layout it works in: channels_last before a convolution, else as it came if dense."""
    if chain.units[0].conv is None:
        return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    return channels_last(x)


def match_layout(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the layout of the dense tensor ``like``."""
    is_channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return channels_last(t) if is_channels_last else t.contiguous()


def _activate(k: Kernels, y: Tensor, norm: Norm, residual: Tensor | None, relu: bool, keep_y: bool) -> Tensor:
    """The activation, written over ``y`` where nobody needs ``y`` again."""
    if keep_y:
        return k.bn_act(y, norm.scale, norm.shift, residual, relu, False)[0]
    k.bn_act_(y, norm.scale, norm.shift, residual, relu)
    return y


def forward(k: Kernels, chain: Chain, x: Tensor, residual: Tensor | None, save: bool) -> list[Tensor]:
    """The chain's output, its statistics, and what the backward needs.

    Returns:
        ``[out, statistics]`` and, if ``save``, the raw outputs of the units that have a convolution and the mask (or the
        pooling winners). ``statistics`` is ``[2, Σ K]``: mean and biased variance of the raw
        outputs, unit by unit; empty when nothing is saved and every unit is frozen.
    """
    x = _enter(chain, x)
    raw: list[Tensor] = []
    norms: list[Norm] = []

    def convolve(a: Tensor, unit: Unit) -> tuple[Tensor, Norm]:
        y = _convolve(k, a, unit)
        norm = _norm(k, y, unit)
        norms.append(norm)
        if save and unit.conv is not None:
            raw.append(y)
        return y, norm

    a = x
    *inner, last = chain.path
    for unit in inner:
        y, norm = convolve(a, unit)
        a = _activate(k, y, norm, None, unit.relu, keep_y=save or unit.conv is None)
    y, norm = convolve(a, last)

    if chain.shortcut == Shortcut.IDENTITY:
        residual = x
    elif chain.shortcut == Shortcut.PROJECTION:
        projected, projection_norm = convolve(x, chain.units[-1])
        residual = _activate(k, projected, projection_norm, None, relu=False, keep_y=save)
    elif residual is not None:
        residual = match_layout(residual, y)

    extra: list[Tensor] = []
    if chain.tail == Tail.RELU_MAXPOOL:
        out, index = k.bn_relu_maxpool(y, norm.scale, norm.shift)
        extra = [index]
    elif save or last.conv is None:
        out, mask = k.bn_act(y, norm.scale, norm.shift, residual, chain.tail == Tail.RELU, save and chain.saves_mask)
        extra = [mask] if chain.saves_mask else []
    else:
        out = _activate(k, y, norm, residual, chain.tail == Tail.RELU, keep_y=False)

    if save or any(unit.training for unit in chain.units):
        statistics = torch.stack([torch.cat([n.mean for n in norms]), torch.cat([n.var for n in norms])])
    else:
        statistics = norm.mean.new_empty(2, 0)
    return [out, statistics, *(raw + extra if save else [])]


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for: of the input, of the residual, and of each of ``Chain.parameters()``."""

    x: bool
    residual: bool
    parameters: tuple[bool, ...]


def _rows(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


class _Backward:
    """One backward pass: the gradients found so far, and how one unit adds its own."""

    def __init__(self, k: Kernels, chain: Chain, saved: Sequence[Tensor], needs: Needs, x: Tensor):
        self.k, self.chain, self.needs = k, chain, needs
        statistics, *rest = saved
        widths = [unit.channels for unit in chain.units]
        self.norms = [
            Norm.of(unit, mean, var)
            for unit, mean, var in zip(
                chain.units, statistics[0].split(widths), statistics[1].split(widths), strict=True
            )
        ]
        outputs = iter(rest)
        self.raw = [x if unit.conv is None else next(outputs) for unit in chain.units]
        self.extra = next(outputs, None)
        self.offsets = [sum(len(u.parameters()) for u in chain.units[:i]) for i in range(len(chain.units))]
        self.gradients: list[Tensor | None] = [None] * len(needs.parameters)

    def wanted(self, i: int, which: int = 0) -> bool:
        """Whether parameter ``which`` of unit ``i`` needs its gradient (0: the filter, where there is one)."""
        return self.needs.parameters[self.offsets[i] + which]

    def any_wanted_below(self, i: int) -> bool:
        """Whether anything in front of unit ``i``'s convolution needs a gradient."""
        return self.needs.x or any(self.needs.parameters[: self.offsets[i]])

    def coefficients(self, i: int, sum_dz: Tensor, sum_dz_centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c) of unit ``i``; stores the gradients of its batch norm and of its convolution's bias."""
        unit, norm = self.chain.units[i], self.norms[i]
        count = _rows(self.raw[i])
        a, b, c, dweight = backward_coefficients(sum_dz, sum_dz_centred, norm.rstd, norm.scale, count, unit.training)
        found = [dweight.to(unit.bn_weight.dtype), sum_dz.to(unit.bn_bias.dtype)]
        if unit.conv_bias is not None:
            # A bias in front of batch statistics cancels: its gradient is exactly zero (or NaN).
            bias_grad = (b + c) * 0 if unit.training else norm.scale * sum_dz
            found.insert(0, bias_grad.to(unit.conv_bias.dtype))
        first = self.offsets[i] + (unit.weight is not None)
        self.gradients[first : first + len(found)] = found
        return a, b, c

    def through_norm(
        self, i: int, grad: Tensor, mask: Tensor | None, relu: bool, want_activation: bool, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """From the gradient behind unit ``i``'s activation to the one at its raw output; and the activation, if wanted."""
        norm, y = self.norms[i], self.raw[i]
        sum_dz, sum_dz_centred, activation = self.k.bn_act_backward_reduce(
            grad, y, mask, norm.mean, norm.scale, norm.shift, relu, want_activation
        )
        abc = self.coefficients(i, sum_dz, sum_dz_centred)
        dy = self.k.bn_act_backward(grad, y, mask, norm.mean, norm.scale, norm.shift, relu, abc, inplace)
        return dy, activation

    def through_pool(self, i: int, grad: Tensor) -> Tensor:
        assert self.extra is not None
        norm, y = self.norms[i], self.raw[i]
        sums = self.k.bn_relu_maxpool_backward_reduce(grad, self.extra, y, norm.mean)
        return self.k.bn_relu_maxpool_backward(grad, self.extra, y, norm.mean, self.coefficients(i, *sums))

    def wgrad(self, i: int, dy: Tensor, a: Tensor) -> None:
        unit = self.chain.units[i]
        assert unit.conv is not None and unit.weight is not None
        self.gradients[self.offsets[i]] = self.k.wgrad(dy, a, unit.weight, unit.conv).to(unit.weight.dtype)

    def dgrad(self, i: int, dy: Tensor, like: Tensor) -> Tensor:
        unit = self.chain.units[i]
        assert unit.conv is not None
        return channels_last(self.k.dgrad(dy, like, _weight(unit, like), unit.conv))


def backward(
    k: Kernels, chain: Chain, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of the input, of the residual, and of ``Chain.parameters()``; None where not needed.

    Args:
        grad: gradient of the output.
        x: the chain's input, as the forward got it.
        saved: the forward's outputs from ``statistics`` on.
    """
    x = _enter(chain, x)
    walk = _Backward(k, chain, saved, needs, x)
    last = len(chain.path) - 1
    relu = chain.tail == Tail.RELU
    mask = walk.extra if chain.saves_mask else None

    if chain.tail == Tail.RELU_MAXPOOL:
        dy = walk.through_pool(last, channels_last(grad))
    else:
        grad = match_layout(grad, walk.raw[last])
        dy, _ = walk.through_norm(last, grad, mask, relu, want_activation=False, inplace=False)

    dx: Tensor | None = None
    for i in range(last, -1, -1):
        if chain.units[i].conv is None:
            dx = dy
            break
        below = walk.raw[i - 1] if i else x
        da = walk.dgrad(i, dy, below) if walk.any_wanted_below(i) else None
        if i == 0:
            if walk.wanted(0):
                walk.wgrad(0, dy, x)
            dx = da
        elif da is not None:
            inner_relu = chain.units[i - 1].relu
            dy_below, a = walk.through_norm(i - 1, da, None, inner_relu, want_activation=walk.wanted(i), inplace=True)
            if walk.wanted(i):
                walk.wgrad(i, dy, a)
            dy = dy_below
        else:
            if walk.wanted(i):
                norm = walk.norms[i - 1]
                walk.wgrad(i, dy, k.bn_act(below, norm.scale, norm.shift, None, chain.units[i - 1].relu, False)[0])
            break

    dresidual: Tensor | None = None
    if chain.shortcut == Shortcut.PROJECTION:
        i = len(chain.units) - 1
        if needs.x or any(needs.parameters[walk.offsets[i] :]):
            dy, _ = walk.through_norm(i, grad, mask, relu, want_activation=False, inplace=False)
            if walk.wanted(i):
                walk.wgrad(i, dy, x)
            if needs.x:
                assert dx is not None
                dx.add_(walk.dgrad(i, dy, x))
    elif chain.shortcut == Shortcut.IDENTITY and needs.x:
        assert dx is not None
        if mask is None:
            dx.add_(grad)
        else:
            k.mask_grad_add_(dx, grad, mask)
    elif chain.shortcut == Shortcut.TENSOR and needs.residual:
        dresidual = grad.clone() if mask is None else k.mask_grad(grad, mask)

    return dx if needs.x else None, dresidual, walk.gradients
