"""The ``aten`` backend: every kernel as stock PyTorch calls. Any device, any dtype; the oracle for the other backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..statistics import merge_covariances
from .kernels import Kernels
from .operands import Conv, Feedback, Gradient, Operand, Pending, PendingGrad, Product, acc_dtype, filter_matrix

_DEAD = 255  # a pooling winner whose ReLU stops the gradient
_GRAM_ROWS = 1 << 15  # rows that are widened to float64 at a time


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last if x is dense in it (and the layout is unambiguous), else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def channel(vector: Tensor) -> Tensor:
    """A per-channel vector ``[C]`` as ``[1, C, 1, 1]``."""
    return vector.view(1, -1, 1, 1)


def rectify(z: Tensor) -> Tensor:
    """ReLU as ``where(z <= 0, 0, z)``: keeps NaN."""
    return torch.where(z <= 0, torch.zeros_like(z), z)


def memory_order(x: Tensor) -> Tensor:
    """The elements of a dense 4-D tensor in memory order, as a vector without a copy."""
    return (x.permute(0, 2, 3, 1) if layout_of(x) == torch.channels_last else x).reshape(-1)


def pack_mask(passes: Tensor) -> Tensor:
    """Booleans ``[N, C, H, W]`` to one bit each, in memory order: bit ``i % 8`` of byte ``i // 8``."""
    flat = memory_order(passes)
    bits = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, device=bits.device)
    return (bits * weights.to(torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``pack_mask`` for a tensor of ``like``'s shape and layout."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    flat = ((mask[:, None] >> shifts) & 1).view(-1)[: like.numel()].bool()
    if layout_of(like) == torch.channels_last:
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)


def rows(x: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """``[N, C, H, W]`` as the matrix ``[N·P·Q, C]``; a view of a channels_last tensor without stride."""
    return x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).flatten(0, 2)


def images(matrix: Tensor, like: Tensor) -> Tensor:
    """The matrix ``[N·P·Q, C]`` as ``[N, C, P, Q]`` in channels_last, N, P and Q from ``like``."""
    n, _, p, q = like.shape
    return matrix.view(n, p, q, matrix.shape[1]).permute(0, 3, 1, 2)


class AtenKernels(Kernels):
    """Formulas in plain PyTorch; half precision is computed in float32 and rounded once. What is pending is formed first."""

    name = "aten"

    def applied(self, a: Operand) -> Tensor:
        """An operand as a tensor."""
        return self.bn_act(a.y, a.scale, a.shift, None, a.relu, False)[0] if isinstance(a, Pending) else a

    def formed(self, dy: Gradient) -> Tensor:
        """A gradient as a tensor."""
        if not isinstance(dy, PendingGrad):
            return dy
        return self.bn_act_backward(dy.dz, dy.y, dy.mask, dy.mean, dy.mean, dy.mean, False, (dy.a, dy.b, dy.c))

    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        return F.conv2d(self.applied(x), weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _conv_backward(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv, which: list[bool]) -> list[Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, which
        )

    def input_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        """``dgrad`` alone, in any layout."""
        return self._conv_backward(dy, x, weight, conv, [True, False, False])[0]

    def dgrad(
        self,
        dy: Gradient,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        dx = self.input_gradient(self.formed(dy), x, weight, conv).contiguous(memory_format=torch.channels_last)
        if residual is None:
            return dx
        if mask is None:
            return dx.add_(residual)
        self.mask_grad_add_(dx, residual, mask)
        return dx

    def wgrad(self, dy: Gradient, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        dy, x = self.formed(dy), self.applied(x)
        like = weight if weight.dtype == dy.dtype else torch.empty_like(weight, dtype=dy.dtype)
        return self._conv_backward(dy, x, like, conv, [False, True, False])[1]

    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        matrix = rows(self.applied(a), conv.stride)
        count, mean, cov = (
            0,
            *(matrix.new_zeros(s, dtype=torch.float64) for s in (matrix.shape[1], (matrix.shape[1],) * 2)),
        )
        for part in matrix.split(_GRAM_ROWS):
            part = part.double()
            n, centre = part.shape[0], part.mean(0)
            part = part - centre
            mean, cov = merge_covariances(count, mean, cov, n, centre, part.t() @ part / n)
            count += n
        return mean, cov

    def gram_unit(self, x: Tensor) -> float:
        return 2.0**-53

    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        channels = flagged.nonzero().flatten()
        if not len(channels):
            return mean, var
        mean, var, matrix = mean.clone(), var.clone(), rows(self.applied(a), conv.stride).double()
        for some in channels.split(32):
            y = matrix @ filter_matrix(weight)[some].double().t()
            var[some], mean[some] = (t.to(mean.dtype) for t in torch.var_mean(y, 0, unbiased=False))
        return mean, var

    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        acc, z = shift.dtype, channel(shift)
        for p in products:
            geometry = p.conv.stride, p.conv.padding, p.conv.dilation, p.conv.groups
            y = F.conv2d(self.applied(p.a).to(acc), p.weight.to(acc), None, *geometry)
            z = z + (y if p.scale is None else y * channel(p.scale))
        if residual is not None:
            z = z + residual
        out = z.to(products[0].weight.dtype).contiguous(memory_format=torch.channels_last)
        if relu:
            out = rectify(out)
        return out, pack_mask(~(out <= 0)) if save_mask else _no_mask(out)

    def dgrad_bn_act(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        acc: Tensor | None = None,
    ) -> Tensor:
        dtype = acc_dtype(grad.dtype)
        dz = rows(grad if mask is None else self.mask_grad(grad, mask)).to(dtype)
        if feedback is None:
            da = dz @ weight.to(dtype)
        elif feedback.low is None or feedback.shift is None:
            centred = rows(self.applied(feedback.a), conv.stride).to(dtype) - feedback.mean_a
            da = (dz - feedback.mean_dz) @ weight.to(dtype) + centred @ feedback.coupling.to(dtype)
        else:
            coupling = feedback.coupling.to(dtype) + feedback.low
            da = (
                dz @ weight.to(dtype)
                + rows(self.applied(feedback.a), conv.stride).to(dtype) @ coupling
                + feedback.shift
            )
        da = images(da, grad)
        if acc is None:
            return da.to(grad.dtype)
        view = acc[:, :, :: conv.stride[0], :: conv.stride[1]]
        view.copy_(view.to(dtype) + da)
        return acc

    def wgrad_bn_act(
        self, grad: Tensor, mask: Tensor | None, operands: Sequence[tuple[Operand, Tensor | None, Conv]]
    ) -> tuple[list[Tensor], Tensor]:
        dz = rows(grad if mask is None else self.mask_grad(grad, mask)).double()
        products = []
        for a, centre, conv in operands:
            matrix = rows(self.applied(a), conv.stride).double()
            products.append(dz.t() @ (matrix if centre is None else matrix - centre))
        return products, dz.sum(0).to(acc_dtype(grad.dtype))

    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), (0, 2, 3), unbiased=False)
        return mean, var

    def _pre_activation(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        z = torch.addcmul(channel(shift), x.to(scale.dtype), channel(scale))
        return z if residual is None else z.add_(residual)

    def bn_act(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        out = self._pre_activation(x, scale, shift, residual).to(x.dtype)
        if relu:
            out = rectify(out)
        return out, pack_mask(~(out <= 0)) if save_mask else _no_mask(x)

    def bn_act_(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> None:
        x.copy_(self.bn_act(x, scale, shift, residual, relu, False)[0])

    def _dz(
        self, grad: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, shift: Tensor, relu: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dz in the accumulation dtype, and the activation where it had to be formed."""
        grad = grad.to(scale.dtype)
        if mask is not None:
            return torch.where(unpack_mask(mask, x), grad, 0.0), None
        if not relu:
            return grad, None
        activation = self.bn_act(x, scale, shift, None, True, False)[0]
        return torch.where(activation <= 0, 0.0, grad), activation

    def bn_act_backward_reduce(
        self,
        grad: Tensor,
        x: Tensor,
        mask: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        relu: bool,
        want_activation: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dz, activation = self._dz(grad, x, mask, scale, shift, relu)
        sum_dz = dz.sum((0, 2, 3))
        sum_dz_centred = (dz * (x.to(scale.dtype) - channel(mean))).sum((0, 2, 3))
        if not want_activation:
            return sum_dz, sum_dz_centred, x.new_empty(0)
        if activation is None:
            activation = self.bn_act(x, scale, shift, None, relu, False)[0]
        return sum_dz, sum_dz_centred, activation

    def bn_act_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mask: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        relu: bool,
        coefficients: tuple[Tensor, Tensor, Tensor],
        inplace: bool = False,
    ) -> Tensor:
        dz, _ = self._dz(grad, x, mask, scale, shift, relu)
        return _affine_in_centred(dz, x, mean, coefficients)

    def add_relu(self, a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
        out = rectify(a + b)
        return out, pack_mask(~(out <= 0)) if save_mask else _no_mask(a)

    def mask_grad(self, grad: Tensor, mask: Tensor) -> Tensor:
        return torch.where(unpack_mask(mask, grad), grad, 0.0)

    def mask_grad_add_(self, acc: Tensor, grad: Tensor, mask: Tensor) -> None:
        acc.add_(self.mask_grad(grad, mask))

    def bn_relu_maxpool(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        activation = self.bn_act(x, scale, shift, None, True, False)[0]
        out, flat = F.max_pool2d(activation, 3, 2, 1, return_indices=True)
        width = x.shape[3]
        rows = torch.arange(out.shape[2], device=x.device).view(-1, 1) * 2 - 1
        columns = torch.arange(out.shape[3], device=x.device) * 2 - 1
        position = (flat.div(width, rounding_mode="floor") - rows) * 3 + flat % width - columns
        index = torch.where(out <= 0, _DEAD, position).to(torch.uint8)
        return out, index.contiguous(memory_format=layout_of(x))

    def _scatter(self, grad: Tensor, index: Tensor, x: Tensor) -> Tensor:
        """dz in the accumulation dtype: each gradient at its window's winner."""
        acc = acc_dtype(x.dtype)
        n, c, height, width = x.shape
        rows = torch.arange(grad.shape[2], device=x.device).view(-1, 1) * 2 - 1
        columns = torch.arange(grad.shape[3], device=x.device) * 2 - 1
        alive = index != _DEAD
        position = torch.where(alive, index, 4).to(torch.int64)  # 4, the window's centre, always lies inside
        flat = (rows + position.div(3, rounding_mode="floor")) * width + columns + position % 3
        values = torch.where(alive, grad.to(acc), 0.0)
        dz = torch.zeros(n, c, height * width, dtype=acc, device=x.device)
        return dz.scatter_add_(2, flat.flatten(2), values.flatten(2)).view(n, c, height, width)

    def bn_relu_maxpool_backward_reduce(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        dz = self._scatter(grad, index, x)
        return dz.sum((0, 2, 3)), (dz * (x.to(dz.dtype) - channel(mean))).sum((0, 2, 3))

    def bn_relu_maxpool_backward(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        return _affine_in_centred(self._scatter(grad, index, x), x, mean, coefficients)


def _no_mask(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def _affine_in_centred(dz: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``a·dz + b·(x − mean) + c`` in the dtype and layout of x."""
    a, b, c = map(channel, coefficients)
    # Frozen statistics have b = 0 and a gradient that does not depend on x: 0·NaN must not enter.
    centred = torch.where(b == 0, 0.0, x.to(dz.dtype) - channel(mean))
    dx = torch.addcmul(c, dz, a).addcmul_(centred, b)
    return dx.to(x.dtype).contiguous(memory_format=layout_of(x))
