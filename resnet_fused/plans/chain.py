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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import collectives, statistics
from ..backends.algebra import moments_dtype
from ..backends.kernels import Kernels
from ..backends.operands import Operand, Product, acc_dtype, filter_matrix, source
from .spec import Chain, Shortcut, Tail, Unit


@dataclass(frozen=True)
class Norm:
    """A batch norm at work: its statistics and what follows from them, ``[C]`` vectors in the accumulation dtype.

    ``count``: the rows of all processes; None where only this one's count.
    """

    mean: Tensor
    var: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    count: Tensor | None = None

    @classmethod
    def of(
        cls, k: Kernels, unit: Unit, mean: Tensor, var: Tensor, acc: torch.dtype, count: Tensor | None = None
    ) -> Norm:
        return cls(*k.norm_vectors(mean, var, unit.bn_weight, unit.bn_bias, unit.eps, acc), count)

    @classmethod
    def running(cls, k: Kernels, unit: Unit, acc: torch.dtype) -> Norm:
        """Of a frozen unit; about the raw output, which lacks the convolution's bias."""
        assert unit.running_mean is not None and unit.running_var is not None
        mean = unit.running_mean.to(acc)
        if unit.conv_bias is not None:
            mean = mean - unit.conv_bias.to(acc)
        return cls.of(k, unit, mean, unit.running_var.to(acc), acc)


@dataclass
class Measured:
    """A unit that has seen its input.

    Attributes:
        y: the raw output; None under the covariance plan.
        product: what will make the output under the covariance plan, but for its scale.
        statistics: mean and variance of this process's rows; None where they are frozen.
        moments: of the input's rows, packed; under the covariance plan in training.
        rows: how many rows the output has here.
    """

    unit: Unit
    rows: int
    y: Tensor | None = None
    product: Product | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    moments: Tensor | None = None


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weight_of(unit: Unit, x: Tensor) -> Tensor:
    """The filter in the dtype of the activations (autocast hands over float32 parameters) and in channels_last."""
    assert unit.weight is not None
    return unit.weight.to(x.dtype, memory_format=torch.channels_last)


def rows_of(y: Tensor) -> int:
    return y.shape[0] * y.shape[2] * y.shape[3]


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
        self.k, self.chain, self.x, self.save = k, chain, x, save
        self.acc = acc_dtype(x.dtype)
        self.norms: list[Norm] = []
        self.raw: list[Tensor] = []
        self.moments: list[Tensor] = []

    def measure(self, a: Operand, unit: Unit) -> Measured:
        """The raw output, or under the covariance plan nothing yet, and the statistics of this process's rows."""
        if unit.covariance:
            return self._through(a, unit)
        if unit.conv is None:
            assert isinstance(a, Tensor)
            return Measured(unit, rows_of(a), a, statistics=self.k.bn_stats(a) if unit.training else None)
        weight = weight_of(unit, self.x)
        if unit.training:
            y, mean, var = self.k.fprop_stats(a, weight, unit.conv)
            return Measured(unit, rows_of(y), y, statistics=(mean, var))
        y = channels_last(self.k.fprop(a, weight, unit.conv))
        return Measured(unit, rows_of(y), y)

    def _through(self, a: Operand, unit: Unit) -> Measured:
        """Mean and variance of the output that is never made; from the products where Cov cannot tell them."""
        assert unit.conv is not None
        k, weight = self.k, weight_of(unit, self.x)
        n, _, p, q = unit.conv.output_shape(source(a).shape, weight.shape)
        measured = Measured(unit, n * p * q, product=Product(a, weight, unit.conv))
        if unit.training:
            dtype = moments_dtype(self.x.dtype)
            unit_roundoff = max(k.gram_unit(self.x), torch.finfo(dtype).eps / 2)
            limit = k.operand_eps(self.x) / 8
            mean, var, flagged, measured.moments = k.through_covariance(
                filter_matrix(weight), *k.gram(a, unit.conv), unit_roundoff, limit
            )
            measured.statistics = k.recompute_statistics(a, weight, unit.conv, flagged, mean, var)
        return measured

    def settle(self, *units: Measured) -> list[Norm]:
        """The batch norms of measured units; the synchronised ones learn the other processes' rows in one collective."""
        counts = self._synchronise([m for m in units if m.unit.synchronised])
        norms = []
        for m in units:
            if m.statistics is None:
                norms.append(Norm.running(self.k, m.unit, self.acc))
            else:
                count = counts if m.unit.synchronised else None
                count = None if count is None else count.to(self.acc).expand(m.unit.channels)
                norms.append(Norm.of(self.k, m.unit, *m.statistics, self.acc, count))
            if self.save and m.y is not None and m.unit.conv is not None:
                self.raw.append(m.y)
            if self.save and m.moments is not None:
                self.moments.append(m.moments)
        self.norms += norms
        return norms

    def _synchronise(self, units: list[Measured]) -> Tensor | None:
        """Put the statistics of all processes' rows in place of this one's; how many rows there are. Moments get the mean of
        all rows for their centre."""
        if not units:
            return None
        mine = [torch.full((1,), float(units[0].rows), dtype=torch.float64, device=self.x.device)]
        for m in units:
            assert m.statistics is not None and m.rows == units[0].rows
            mine += m.statistics if m.moments is None else (*m.statistics, m.moments[: m.unit.weight.shape[1]])
        gathered = collectives.gather(torch.cat([v.double() for v in mine]), self.chain.group)
        rank_counts, *vectors = gathered.split([len(v) for v in mine], dim=1)
        remaining = iter(vectors)
        for m in units:
            assert m.statistics is not None
            dtype = m.statistics[0].dtype
            count, mean, var = statistics.merge_moments(rank_counts, next(remaining), next(remaining))
            m.statistics = mean.to(dtype), var.to(dtype)
            if m.moments is not None:
                mean_a = (rank_counts * next(remaining)).sum(0) / count
                m.moments = statistics.recentre_moments(m.moments, mean_a.to(m.moments.dtype))
        return count

    def statistics(self) -> Tensor:
        """Mean, variance and, if any unit is synchronised, the number of rows of each channel of each unit."""
        vectors = [*(n.mean for n in self.norms), *(n.var for n in self.norms)]
        if self.chain.synchronised:
            vectors += [torch.zeros_like(n.mean) if n.count is None else n.count for n in self.norms]
        return torch.cat(vectors).view(3 if self.chain.synchronised else 2, -1)


def forward(k: Kernels, chain: Chain, x: Tensor, residual: Tensor | None, save: bool) -> list[Tensor]:
    """The chain's output, its statistics, and what the backward needs.

    Returns:
        ``[out, statistics]`` and, if ``save``, the raw outputs of the units that have a convolution, or for those of the
        covariance plan in training ``[C (C + 3) / 2]``: ā and half of Cov (synchronised ones as
        ``statistics.recentre_moments`` has them); and the mask (or the pooling winners).
        ``statistics`` is ``[2, Σ K]``: mean and biased variance of the raw outputs, unit by unit, and where any unit is
        synchronised a third row with the number of rows; empty when nothing is saved and every unit is frozen.
    """
    x = enter(chain, x)
    walk = _Forward(k, chain, x, save)
    relu = chain.tail == Tail.RELU
    save_mask = save and chain.saves_mask

    a: Operand = x
    *inner, last_unit = chain.path
    for unit in inner:
        measured = walk.measure(a, unit)
        (norm,) = walk.settle(measured)
        assert measured.y is not None
        a = k.operand(measured.y, norm.scale, norm.shift, unit.relu, keep_y=save or unit.conv is None)
    last = walk.measure(a, last_unit)
    if chain.shortcut == Shortcut.PROJECTION:
        projection = walk.measure(x, chain.units[-1])
        norm, projected = walk.settle(last, projection)
    else:
        (norm,) = walk.settle(last)
    products = [] if last.product is None else [replace(last.product, scale=norm.scale)]
    shift, y = norm.shift, last.y

    if chain.shortcut == Shortcut.IDENTITY:
        residual = x
    elif chain.shortcut == Shortcut.PROJECTION and projection.product is not None:
        product = replace(projection.product, scale=projected.scale)
        if products:
            products.append(product)
            shift = shift + projected.shift
        else:
            residual = k.fprop_bn_act([product], projected.shift, None, relu=False, save_mask=False)[0]
    elif chain.shortcut == Shortcut.PROJECTION:
        residual = projection.y
        if save:
            residual = k.bn_act(residual, projected.scale, projected.shift, None, False, False)[0]
        else:
            k.bn_act_(residual, projected.scale, projected.shift, None, False)
    elif residual is not None:
        residual = channels_last(residual) if y is None else match_layout(residual, y)

    extra: list[Tensor] = []
    if chain.tail == Tail.RELU_MAXPOOL:
        out, index = k.bn_relu_maxpool(y, norm.scale, norm.shift)
        extra = [index]
    elif y is None:
        out, mask = k.fprop_bn_act(products, shift, residual, relu, save_mask)
        extra = [mask] if save_mask else []
    elif save or last_unit.conv is None:
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
