"""The backward of a chain; the module ``chain`` tells the plan, and has the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import collectives
from ..backends.algebra import NormGradients, RowGradients
from ..backends.kernels import Kernels
from ..backends.operands import Below, Conv, Feedback, Gradient, NormGrad, Operand, filter_matrix
from .chain import Norm, channels_last, enter, match_layout, rows_of, weight_of
from .spec import Chain, Shortcut, Tail


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for: of the input, of the residual, and of each of ``Chain.parameters()``."""

    x: bool
    residual: bool
    parameters: tuple[bool, ...]


class _Backward:
    """One backward pass: the gradients found so far, and how one unit adds its own."""

    def __init__(self, k: Kernels, chain: Chain, saved: Sequence[Tensor], needs: Needs, x: Tensor):
        self.k, self.chain, self.needs, self.x = k, chain, needs, x
        found, *rest = saved
        widths = [unit.channels for unit in chain.units]
        mean, var, *counts = (vectors.split(widths) for vectors in found)
        self.norms = [
            Norm.of(k, unit, mean[i], var[i], found.dtype, counts[0][i] if unit.synchronised else None)
            for i, unit in enumerate(chain.units)
        ]
        outputs = iter(rest)
        # The raw output; x for a batch norm alone; None under the covariance plan, which has the input's moments instead.
        self.raw = [x if unit.conv is None else None if unit.covariance else next(outputs) for unit in chain.units]
        self.moments = [next(outputs) if unit.covariance and unit.training else None for unit in chain.units]
        self.extra = next(outputs, None)
        self.offsets = [sum(len(u.parameters()) for u in chain.units[:i]) for i in range(len(chain.units))]
        self.gradients: list[Tensor | None] = [None] * len(needs.parameters)
        self.rows: dict[int, RowGradients] = {}  # of the units under the covariance plan
        self.mean_dz: dict[int, Tensor] = {}  # over the rows of all processes
        self.filters: dict[int, Tensor] = {}

    def filter(self, i: int) -> Tensor:
        """The filter as the forward used it, cast once."""
        if i not in self.filters:
            self.filters[i] = weight_of(self.chain.units[i], self.x)
        return self.filters[i]

    def wanted(self, i: int, which: int = 0) -> bool:
        """Whether parameter ``which`` of unit ``i`` needs its gradient (0: the filter, where there is one)."""
        return self.needs.parameters[self.offsets[i] + which]

    def any_parameter_wanted(self, i: int) -> bool:
        first = self.offsets[i]
        return any(self.needs.parameters[first : first + len(self.chain.units[i].parameters())])

    def any_wanted_below(self, i: int) -> bool:
        """Whether anything in front of unit ``i``'s convolution needs a gradient."""
        return self.needs.x or any(self.needs.parameters[: self.offsets[i]])

    def totals(self, sums: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
        """``Σ dz`` and ``Σ dz·(y − mean)`` of synchronised units over the rows of all processes, in one collective."""
        mine = [i for i in sums if self.chain.units[i].synchronised]
        if not mine:
            return {}
        found = collectives.totals([v for i in mine for v in sums[i]], self.chain.group)
        return {i: (found[2 * n], found[2 * n + 1]) for n, i in enumerate(mine)}

    def settle(self, sums: Mapping[int, tuple[Tensor, Tensor]], count: int) -> dict[int, NormGradients]:
        """(a, b, c) of units that have their sums over ``count`` rows; stores the gradients of their batch norms and of their
        convolutions' biases, which are of this process's rows."""
        totals = self.totals(sums)
        settled: dict[int, NormGradients] = {}
        for i, (sum_dz, sum_dz_centred) in sums.items():
            unit, norm = self.chain.units[i], self.norms[i]
            dtype = unit.bn_weight.dtype
            if i in totals:
                self.mean_dz[i] = totals[i][0] / norm.count
                settled[i] = self.k.norm_gradients_over(
                    sum_dz, sum_dz_centred, *totals[i], norm.rstd, norm.scale, norm.count, dtype
                )
            else:
                settled[i] = self.k.norm_gradients(
                    sum_dz, sum_dz_centred, norm.rstd, norm.scale, count, unit.training, dtype
                )
            self.store_norm(i, settled[i], sum_dz)
        return settled

    def store_norm(self, i: int, found: NormGradients, sum_dz: Tensor) -> None:
        """The gradients of unit ``i``'s batch norm and of its convolution's bias."""
        unit = self.chain.units[i]
        gradients = [found.weight, found.bias]
        if unit.conv_bias is not None:
            # A bias in front of batch statistics cancels: its gradient is exactly zero (or NaN).
            bias_grad = (found.b + found.c) * 0 if unit.training else found.a * sum_dz
            gradients.insert(0, bias_grad.to(unit.conv_bias.dtype))
        first = self.offsets[i] + (unit.weight is not None)
        self.gradients[first : first + len(gradients)] = gradients

    def below(self, i: int) -> Below:
        """Unit ``i``'s batch norm and what follows it, seen from behind."""
        unit, norm, y = self.chain.units[i], self.norms[i], self.raw[i]
        assert y is not None
        relu = unit.relu if i < len(self.chain.path) - 1 else self.chain.tail == Tail.RELU
        return Below(y, norm.mean, norm.scale, norm.shift, relu)

    def through_norm(self, i: int, found: NormGrad, settled: NormGradients, inplace: bool) -> Gradient:
        """From the gradient behind unit ``i``'s batch norm to the one at its raw output."""
        unit = self.chain.units[i]
        weight = None if unit.conv is None else self.filter(i)
        return self.k.gradient(found, self.below(i), settled[:3], weight, unit.conv, inplace)

    def settled_norm(self, i: int, found: NormGrad) -> Gradient:
        """``through_norm`` of a unit inside the chain, over the gradient it came with."""
        settled = self.settle({i: (found.sum_dz, found.sum_dz_centred)}, rows_of(found.grad))
        return self.through_norm(i, found, settled[i], inplace=True)

    def pool_sums(self, i: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        assert self.extra is not None
        return self.k.bn_relu_maxpool_backward_reduce(grad, self.extra, self.raw[i], self.norms[i].mean)

    def through_pool(self, i: int, grad: Tensor, settled: NormGradients) -> Tensor:
        assert self.extra is not None
        return self.k.bn_relu_maxpool_backward(grad, self.extra, self.raw[i], self.norms[i].mean, settled[:3])

    def operand(self, i: int) -> Operand:
        """What unit ``i`` read: the chain's input, or formed again from the raw output below."""
        if i == 0 or i == len(self.chain.path):
            return self.x
        norm, y = self.norms[i - 1], self.raw[i - 1]
        assert y is not None
        return self.k.operand(y, norm.scale, norm.shift, self.chain.units[i - 1].relu, keep_y=True)

    def products(self, operands: dict[int, Operand], grad: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """T of one unit or two under the covariance plan and ``Σ dz``, from one pass over ``grad``."""
        triples = []
        for i, a in operands.items():
            moments = self.moments[i]
            triples.append((a, None if moments is None else moments[: self.filter(i).shape[1]], self.conv(i)))
        return self.k.wgrad_bn_act(grad, mask, triples)

    def outputs(
        self, operands: dict[int, Operand], reduced: dict[int, tuple[Tensor, Tensor]], grad: Tensor, mask: Tensor | None
    ) -> dict[int, NormGradients]:
        """The batch norms in front of the shortcut, of the last unit and of the projection, in one collective.

        Args:
            operands: what the units under the covariance plan read.
            reduced: the sums of the others, whose coefficients are returned.
        """
        count = rows_of(self.raw[len(self.chain.path) - 1] if self.chain.tail == Tail.RELU_MAXPOOL else grad)
        products, sum_dz = self.products(operands, grad, mask) if operands else ([], grad)
        sums = dict(reduced)
        for i, t in zip(operands, products, strict=True):
            if self.chain.units[i].synchronised:
                sums[i] = sum_dz, (filter_matrix(self.filter(i)).to(t.dtype) * t).sum(1).to(sum_dz.dtype)
        settled = self.settle(sums, count)
        for i, t in zip(operands, products, strict=True):
            self.rows[i] = self.row_gradients(i, t, sum_dz, count, settled.get(i))
        return settled

    def row_gradients(
        self, i: int, t: Tensor, sum_dz: Tensor, count: int, settled: NormGradients | None
    ) -> RowGradients:
        unit, norm, moments, weight = self.chain.units[i], self.norms[i], self.moments[i], filter_matrix(self.filter(i))
        dtype = unit.weight.dtype if self.wanted(i) else None
        if settled is None:
            found = self.k.row_gradients(
                t, weight, moments, sum_dz, norm.mean, norm.rstd, norm.scale, count, unit.bn_weight.dtype, dtype
            )
            self.store_norm(i, found.norm, sum_dz)
        else:
            assert moments is not None
            mean_dz = self.mean_dz[i]
            found = self.k.row_gradients_over(t, weight, moments, sum_dz, settled, mean_dz, norm.scale, count, dtype)
        if found.weight is not None:
            self.gradients[self.offsets[i]] = found.weight.view(unit.weight.shape)
        return found

    def product(self, i: int, a: Operand | None) -> tuple[Tensor, Conv, Feedback | None]:
        """``diag(a) W``, the convolution and the feedback of unit ``i`` under the covariance plan."""
        weight, moments = filter_matrix(self.filter(i)), self.moments[i]
        if moments is None:
            scaled = self.rows[i].scaled if i in self.rows else self.k.scaled_filter(weight, self.norms[i].scale)
            return scaled, self.conv(i), None
        assert a is not None
        channels = weight.shape[1]
        packed = moments[: channels * (channels + 3) // 2]  # without what synchronised moments have besides
        return self.rows[i].scaled, self.conv(i), self.k.feedback(a, weight, packed, self.rows[i])

    def conv(self, i: int) -> Conv:
        conv = self.chain.units[i].conv
        assert conv is not None
        return conv

    def wgrad(self, i: int, dy: Gradient, a: Operand) -> None:
        unit = self.chain.units[i]
        assert unit.weight is not None
        self.gradients[self.offsets[i]] = self.k.wgrad(dy, a, unit.weight, self.conv(i)).to(unit.weight.dtype)

    def descend(self, last: int, dy: Gradient, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """From the gradient at the raw output of unit ``last`` down the path to the chain's input, where ``residual`` (where
        ``mask``) is added; None where the input needs no gradient."""
        for i in range(last, 0, -1):
            if not self.any_wanted_below(i):
                if self.wanted(i):
                    self.wgrad(i, dy, self.operand(i))
                return None
            found = self.k.dgrad_below(dy, self.filter(i), self.conv(i), self.below(i - 1), self.wanted(i))
            if found.activation is not None:
                self.wgrad(i, dy, found.activation)
            dy = self.settled_norm(i - 1, found)
        if self.chain.units[0].conv is None:
            assert isinstance(dy, Tensor)
            return dy if residual is None else self.add_residual(dy, residual, mask)
        if self.wanted(0):
            self.wgrad(0, dy, self.x)
        return self.k.dgrad(dy, self.x, self.filter(0), self.conv(0), residual, mask) if self.needs.x else None

    def add_residual(self, dx: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return dx.add_(residual)
        self.k.mask_grad_add_(dx, residual, mask)
        return dx


def backward(
    k: Kernels, chain: Chain, grad: Tensor, x: Tensor, saved: Sequence[Tensor], needs: Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of the input, of the residual, and of ``Chain.parameters()``; None where not needed.

    Args:
        grad: gradient of the output.
        x: the chain's input, as the forward got it.
        saved: the forward's outputs from ``statistics`` on.
    """
    x = enter(chain, x)
    walk = _Backward(k, chain, saved, needs, x)
    last, projection = len(chain.path) - 1, len(chain.path)
    has_projection = chain.shortcut == Shortcut.PROJECTION
    mask = walk.extra if chain.saves_mask else None
    if chain.tail == Tail.RELU_MAXPOOL or chain.units[last].covariance:
        grad = channels_last(grad)
    else:
        grad = match_layout(grad, walk.raw[last])

    operands: dict[int, Operand] = {}
    found: dict[int, NormGrad] = {}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for i in [last, projection] if has_projection else [last]:
        unit = chain.units[i]
        wanted_below = walk.any_wanted_below(i) if i == last else needs.x
        if not (walk.any_parameter_wanted(i) or wanted_below):
            continue
        if not unit.covariance:
            if chain.tail == Tail.RELU_MAXPOOL:
                sums[i] = walk.pool_sums(i, grad)
            else:
                found[i] = k.norm_grad(grad, mask, walk.below(i), False)
                sums[i] = found[i].sum_dz, found[i].sum_dz_centred
        elif walk.any_parameter_wanted(i) or unit.training:
            operands[i] = walk.operand(i)
    settled = walk.outputs(operands, sums, grad, mask)

    residual, residual_mask = (grad, mask) if chain.shortcut == Shortcut.IDENTITY else (None, None)
    dx: Tensor | None = None
    if last in sums:
        if chain.tail == Tail.RELU_MAXPOOL:
            dy: Gradient = walk.through_pool(last, grad, settled[last])
        else:
            dy = walk.through_norm(last, found[last], settled[last], inplace=False)
        dx = walk.descend(last, dy, residual, residual_mask)
        del dy
    elif chain.units[last].covariance and walk.any_wanted_below(last):
        weight, conv, feedback = walk.product(last, operands.pop(last, None))
        below = x if last == 0 else walk.below(last - 1).y
        acc = None if conv.stride == (1, 1) else torch.zeros_like(below)
        if last == 0:
            dx = k.dgrad_bn_act(grad, mask, weight, conv, feedback, acc)
            dx = dx if residual is None else walk.add_residual(dx, residual, residual_mask)
        else:
            norm_grad = k.dgrad_bn_act_below(grad, mask, weight, conv, feedback, walk.below(last - 1), acc)
            del feedback
            dx = walk.descend(last - 1, walk.settled_norm(last - 1, norm_grad), residual, residual_mask)

    if has_projection and chain.units[projection].covariance:
        if needs.x:
            k.dgrad_bn_act(grad, mask, *walk.product(projection, operands.get(projection)), dx)
    elif projection in found:
        dy = walk.through_norm(projection, found[projection], settled[projection], inplace=False)
        if walk.wanted(projection):
            walk.wgrad(projection, dy, x)
        if needs.x:
            assert dx is not None
            dx.add_(k.dgrad(dy, x, walk.filter(projection), walk.conv(projection)))

    dresidual: Tensor | None = None
    if chain.shortcut == Shortcut.TENSOR and needs.residual:
        dresidual = grad.clone() if mask is None else k.mask_grad(grad, mask)
    return dx if needs.x else None, dresidual, walk.gradients
