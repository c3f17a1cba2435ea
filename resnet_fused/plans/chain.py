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

The last unit, and the projection, may follow the *covariance plan* (``Unit.covariance``): sₙ and tₙ come from the mean and
covariance of aₙ₋₁, so that yₙ never exists (docs/covariance.md)::

    forward   ā, Cov = gram(aₙ₋₁)       sₙ, tₙ = through_covariance(W, ā, Cov)
              out, mask = relu(sₙ·(aₙ₋₁ Wᵀ) + tₙ + shortcut)                       one kernel
    save      ā and Cov in place of yₙ
    backward  T = dzᵀ(aₙ₋₁ − ā), Σ dz                                             one kernel; dW, dγ, a, b, c, G follow
              da = dz·(aW) + aₙ₋₁·G + const                                        one kernel
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.algebra import moments_dtype
from ..backends.kernels import Kernels
from ..backends.operands import Operand, Product, acc_dtype, filter_matrix
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
    def of(cls, k: Kernels, unit: Unit, mean: Tensor, var: Tensor, acc: torch.dtype) -> Norm:
        return cls(*k.norm_vectors(mean, var, unit.bn_weight, unit.bn_bias, unit.eps, acc))

    @classmethod
    def running(cls, k: Kernels, unit: Unit, acc: torch.dtype) -> Norm:
        """Of a frozen unit; about the raw output, which lacks the convolution's bias."""
        assert unit.running_mean is not None and unit.running_var is not None
        mean = unit.running_mean.to(acc)
        if unit.conv_bias is not None:
            mean = mean - unit.conv_bias.to(acc)
        return cls.of(k, unit, mean, unit.running_var.to(acc), acc)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weight_of(unit: Unit, x: Tensor) -> Tensor:
    """The filter in the dtype of the activations (autocast hands over float32 parameters) and in channels_last."""
    assert unit.weight is not None
    return unit.weight.to(x.dtype, memory_format=torch.channels_last)


def enter(chain: Chain, x: Tensor) -> Tensor:
    """The chain's input in the layout it works in: channels_last before a convolution, else as it came if dense."""
    if chain.units[0].conv is None:
        return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    return channels_last(x)


def match_layout(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the layout of the dense tensor ``like``."""
    is_channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return channels_last(t) if is_channels_last else t.contiguous()


class _Forward:
    """One forward pass: the norms so far, unit by unit, and what the backward will need."""

    def __init__(self, k: Kernels, chain: Chain, x: Tensor, save: bool):
        self.k, self.x, self.save = k, x, save
        self.acc = acc_dtype(x.dtype)
        self.norms: list[Norm] = []
        self.raw: list[Tensor] = []
        self.moments: list[Tensor] = []

    def convolve(self, a: Operand, unit: Unit) -> tuple[Tensor, Norm]:
        """The raw output and its batch norm."""
        if unit.conv is None:
            assert isinstance(a, Tensor)
            y = a
            norm = (
                Norm.of(self.k, unit, *self.k.bn_stats(y), self.acc)
                if unit.training
                else Norm.running(self.k, unit, self.acc)
            )
        elif unit.training:
            y, mean, var = self.k.fprop_stats(a, weight_of(unit, self.x), unit.conv)
            norm = Norm.of(self.k, unit, mean, var, self.acc)
        else:
            y = channels_last(self.k.fprop(a, weight_of(unit, self.x), unit.conv))
            norm = Norm.running(self.k, unit, self.acc)
        self.norms.append(norm)
        if self.save and unit.conv is not None:
            self.raw.append(y)
        return y, norm

    def product(self, a: Operand, unit: Unit) -> tuple[Product, Tensor]:
        """The convolution scaled by its batch norm, and the shift: nothing is computed but the statistics."""
        assert unit.conv is not None
        weight = weight_of(unit, self.x)
        if unit.training:
            norm = Norm.of(self.k, unit, *self._through(a, unit, weight), self.acc)
        else:
            norm = Norm.running(self.k, unit, self.acc)
        self.norms.append(norm)
        return Product(a, weight, unit.conv, norm.scale), norm.shift

    def _through(self, a: Operand, unit: Unit, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the output that is never made; from the products where Cov cannot tell them."""
        assert unit.conv is not None
        k, dtype = self.k, moments_dtype(self.x.dtype)
        unit_roundoff = max(k.gram_unit(self.x), torch.finfo(dtype).eps / 2)
        limit = k.operand_eps(self.x) / 8
        mean, var, flagged, moments = k.through_covariance(
            filter_matrix(weight), *k.gram(a, unit.conv), unit_roundoff, limit
        )
        if self.save:
            self.moments.append(moments)
        return k.recompute_statistics(a, weight, unit.conv, flagged, mean, var)

    def statistics(self) -> Tensor:
        return torch.cat([*(n.mean for n in self.norms), *(n.var for n in self.norms)]).view(2, -1)


def forward(k: Kernels, chain: Chain, x: Tensor, residual: Tensor | None, save: bool) -> list[Tensor]:
    """The chain's output, its statistics, and what the backward needs.

    Returns:
        ``[out, statistics]`` and, if ``save``, the raw outputs of the units that have a convolution, or for those of the
        covariance plan in training ``[C (C + 3) / 2]``: ā and half of Cov; and the mask (or the pooling winners).
        ``statistics`` is ``[2, Σ K]``: mean and biased variance of the raw outputs, unit by unit; empty when nothing is saved
        and every unit is frozen.
    """
    x = enter(chain, x)
    walk = _Forward(k, chain, x, save)
    relu = chain.tail == Tail.RELU
    save_mask = save and chain.saves_mask

    a: Operand = x
    *inner, last = chain.path
    for unit in inner:
        y, norm = walk.convolve(a, unit)
        a = k.operand(y, norm.scale, norm.shift, unit.relu, keep_y=save or unit.conv is None)
    products: list[Product] = []
    if last.covariance:
        product, shift = walk.product(a, last)
        products.append(product)
    else:
        y, norm = walk.convolve(a, last)

    if chain.shortcut == Shortcut.IDENTITY:
        residual = x
    elif chain.shortcut == Shortcut.PROJECTION:
        projection = chain.units[-1]
        if projection.covariance:
            product, projected_shift = walk.product(x, projection)
            if last.covariance:
                products.append(product)
                shift = shift + projected_shift
            else:
                residual = k.fprop_bn_act([product], projected_shift, None, relu=False, save_mask=False)[0]
        else:
            projected, projected_norm = walk.convolve(x, projection)
            if save:
                residual = k.bn_act(projected, projected_norm.scale, projected_norm.shift, None, False, False)[0]
            else:
                k.bn_act_(projected, projected_norm.scale, projected_norm.shift, None, False)
                residual = projected
    elif residual is not None:
        residual = channels_last(residual) if last.covariance else match_layout(residual, y)

    extra: list[Tensor] = []
    if chain.tail == Tail.RELU_MAXPOOL:
        out, index = k.bn_relu_maxpool(y, norm.scale, norm.shift)
        extra = [index]
    elif last.covariance:
        out, mask = k.fprop_bn_act(products, shift, residual, relu, save_mask)
        extra = [mask] if save_mask else []
    elif save or last.conv is None:
        out, mask = k.bn_act(y, norm.scale, norm.shift, residual, relu, save_mask)
        extra = [mask] if save_mask else []
    else:
        k.bn_act_(y, norm.scale, norm.shift, residual, relu)
        out = y

    if save or any(unit.training for unit in chain.units):
        found = walk.statistics()
    else:
        found = x.new_empty((2, 0), dtype=walk.acc)
    return [out, found, *(walk.raw + walk.moments + extra if save else [])]
