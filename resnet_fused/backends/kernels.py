"""The kernel interface: what a plan may ask of a backend.

Plans know only these methods, so one plan runs on every backend. Activations are 4-D tensors ``[N, C, H, W]``, dense in
channels_last (the fast layout) or contiguous; all activations of one call share dtype, shape and strides. Per-channel
vectors are in the *accumulation dtype*: float64 for float64 activations, float32 otherwise.

The ReLU is ``where(z <= 0, 0, z)``: NaN stays NaN and its gradient passes, as in stock PyTorch. A *mask* holds one bit per
element of the output in memory order, set where the gradient passes: ``!(out <= 0)`` on the value as stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Algebra
from .operands import Below, Conv, Feedback, Gradient, NormGrad, Operand, Product


class Kernels(Algebra, ABC):
    """A backend: every kernel that the plans are written in."""

    name: str

    def operand(self, y: Tensor, scale: Tensor, shift: Tensor, relu: bool, keep_y: bool) -> Operand:
        """``act(scale·y + shift)`` as the products want it. Here: applied now, over ``y`` unless ``keep_y``."""
        if keep_y:
            return self.bn_act(y, scale, shift, None, relu, False)[0]
        self.bn_act_(y, scale, shift, None, relu)
        return y

    # Convolutions

    @abstractmethod
    def fprop(self, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        """Raw convolution output ``[N, K, P, Q]``, in the layout of ``x``."""

    def fprop_stats(self, x: Operand, weight: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
        """``fprop`` in channels_last, and ``bn_stats`` of it (genstats where a kernel has that epilogue)."""
        y = self.fprop(x, weight, conv).contiguous(memory_format=torch.channels_last)
        return y, *self.bn_stats(y)

    @abstractmethod
    def dgrad(
        self,
        dy: Gradient,
        x: Tensor,
        weight: Tensor,
        conv: Conv,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Gradient of ``fprop`` with respect to ``x`` (only the shape, dtype and layout of ``x`` count), and added to it
        what came through the shortcut: ``residual`` where ``mask`` (everywhere without one)."""

    @abstractmethod
    def wgrad(self, dy: Gradient, x: Operand, weight: Tensor, conv: Conv) -> Tensor:
        """Gradient of ``fprop`` with respect to ``weight`` (only its shape and layout count), in ``dy``'s dtype or better."""

    def dgrad_below(self, dy: Gradient, weight: Tensor, conv: Conv, below: Below, want_activation: bool) -> NormGrad:
        """``dgrad`` carried on to the batch norm in front of the convolution. Here: ``norm_grad`` of it, a pass of its own."""
        return self.norm_grad(self.dgrad(dy, below.y, weight, conv), None, below, want_activation)

    # The covariance plan: 1×1 convolutions with their batch norm. A = act(…) is the operand as rows [M, C], strided as the
    # convolution strides; dz is ``grad`` where ``mask`` (everywhere without one).

    @abstractmethod
    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        """Mean ``[C]`` and biased covariance ``[C, C]`` of A's rows, in float64.

        Numerics: partial sums merge in float64 in a fixed order; ``gram_unit`` tells how they are rounded.
        Traffic: reads a once.
        """

    @abstractmethod
    def gram_unit(self, x: Tensor) -> float:
        """The rounding unit of ``gram``'s partial sums for activations like ``x``."""

    def operand_eps(self, x: Tensor) -> float:
        """``torch.finfo(…).eps`` of what a convolution of activations like ``x`` multiplies, which may be less than they are."""
        return torch.finfo(x.dtype).eps

    @abstractmethod
    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``mean`` and ``var`` with those of the ``flagged`` channels taken from the products themselves.

        For channels whose statistics the covariance cannot tell (``statistics.ill_conditioned``). Does nothing where nothing
        is flagged.
        """

    def reads_back(self, dtype: torch.dtype) -> bool:
        """Whether ``recompute_statistics`` of such activations makes the host wait for values, which no CUDA graph can hold."""
        return True

    @abstractmethod
    def fprop_bn_act(
        self, products: Sequence[Product], shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """``act(Σ products + shift [+ residual])`` and its mask (empty unless ``save_mask``): no raw output is made.

        Numerics: products accumulate in the accumulation dtype; rounds once, at the store.
        Traffic: reads each operand (and residual), writes 1 times the output (and one bit per element).
        """

    @abstractmethod
    def dgrad_bn_act(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        acc: Tensor | None = None,
    ) -> Tensor:
        """``dA = (dz − mean_dz)·weight + (A − mean_a)·coupling``: the gradient behind a 1×1 convolution and its batch norm.

        Args:
            weight (Tensor[K, C]): ``diag(a) W``, in the dtype of ``grad``.
            feedback: the means and the second product; None where statistics are frozen: ``dA = dz·weight``.
            acc (Tensor[N, C, H, W], optional): the result is added to it in place, at the pixels the convolution read; needed
                where it strides.
        Numerics: float32 and float64 are centred while they are loaded, so that a mean far above the deviation costs no
            digits; in half precision that would round the operands, and the means leave through a constant
            (``statistics.coupling_shift``). Traffic: reads grad and a, writes dA.
        """

    def dgrad_bn_act_below(
        self,
        grad: Tensor,
        mask: Tensor | None,
        weight: Tensor,
        conv: Conv,
        feedback: Feedback | None,
        below: Below,
        acc: Tensor | None = None,
    ) -> NormGrad:
        """``dgrad_bn_act`` carried on to the batch norm in front of A. Here: ``norm_grad`` of it, a pass of its own."""
        return self.norm_grad(self.dgrad_bn_act(grad, mask, weight, conv, feedback, acc), None, below, False)

    @abstractmethod
    def wgrad_bn_act(
        self, grad: Tensor, mask: Tensor | None, operands: Sequence[tuple[Operand, Tensor | None, Conv]]
    ) -> tuple[list[Tensor], Tensor]:
        """``T = dzᵀ(A − centre)`` ``[K, C]`` for each ``(a, centre, conv)``, and ``Σ dz`` ``[K]``.

        Numerics: partial sums merge in float64, and T is float64; for half precision either may be float32.
        Traffic: reads grad and each operand.
        """

    # Batch norm with its activation

    @abstractmethod
    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``[C]`` over N, H and W.

        Numerics: exact two-pass inside a tile, tiles merged with Chan's formula in a fixed order; the same bits on every run.
        Traffic: reads x once.
        """

    @abstractmethod
    def bn_act(
        self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, save_mask: bool
    ) -> tuple[Tensor, Tensor]:
        """``act(scale·x + shift [+ residual])`` and its mask (empty unless ``save_mask``).

        Numerics: rounds once, at the store. Traffic: reads x (and residual), writes 1 times x (and one bit per element).
        """

    @abstractmethod
    def bn_act_(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> None:
        """``bn_act`` written over ``x``: for an output that nobody needs again."""

    @abstractmethod
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
        """``Σ dz`` and ``Σ dz·(x − mean)`` ``[C]``, and on demand the activation ``bn_act(x)`` for the next wgrad.

        ``dz`` is ``grad`` where ``mask``; without a mask and with ``relu`` the mask is formed again from x (no residual);
        without ``relu`` it is ``grad``. Traffic: reads grad and x, writes the activation on demand.
        """

    @abstractmethod
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
        """``dx = a·dz + b·(x − mean) + c``; ``inplace`` allows the result to take the place of ``grad``.

        Traffic: reads grad and x, writes dx.
        """

    def norm_grad(self, grad: Tensor, mask: Tensor | None, below: Below, want_activation: bool) -> NormGrad:
        """``bn_act_backward_reduce`` of what came to the batch norm and ReLU of ``below``, or to those and a shortcut (mask)."""
        sum_dz, sum_dz_centred, activation = self.bn_act_backward_reduce(
            grad, below.y, mask, below.mean, below.scale, below.shift, below.relu, want_activation
        )
        return NormGrad(grad, mask, below.relu, sum_dz, sum_dz_centred, activation if want_activation else None)

    def gradient(
        self,
        found: NormGrad,
        below: Below,
        coefficients: tuple[Tensor, Tensor, Tensor],
        weight: Tensor | None,
        conv: Conv | None,
        inplace: bool,
    ) -> Gradient:
        """``a·dz + b·(y − mean) + c`` at the raw output ``below.y``, as the convolution that made it (None: none) wants it.

        Here: ``bn_act_backward``, over ``found.grad`` if ``inplace`` allows it.
        """
        gate = below.scale, below.shift, found.relu
        return self.bn_act_backward(found.grad, below.y, found.mask, below.mean, *gate, coefficients, inplace)

    # Residual additions

    @abstractmethod
    def add_relu(self, a: Tensor, b: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
        """``relu(a + b)`` and its mask (empty unless ``save_mask``). Traffic: reads 2, writes 1."""

    @abstractmethod
    def mask_grad(self, grad: Tensor, mask: Tensor) -> Tensor:
        """``grad`` where ``mask``, else 0. Traffic: reads 1, writes 1."""

    @abstractmethod
    def mask_grad_add_(self, acc: Tensor, grad: Tensor, mask: Tensor) -> None:
        """``acc += grad where mask``. Traffic: reads 2, writes 1."""

    # The stem's 3×3, stride 2, padding 1 max pooling behind batch norm and ReLU

    @abstractmethod
    def bn_relu_maxpool(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """``maxpool(relu(scale·x + shift))`` and the winners ``uint8``.

        A winner is its position ``3·r + s`` in the window (the first maximum, the last NaN), or 255 where its ReLU stops the
        gradient. Traffic: reads x, writes 1/4 of x and of its indices.
        """

    @abstractmethod
    def bn_relu_maxpool_backward_reduce(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``Σ dz`` and ``Σ dz·(x − mean)`` ``[C]``, dz being ``grad`` scattered to the winners. Traffic: reads grad, index, x."""

    @abstractmethod
    def bn_relu_maxpool_backward(
        self, grad: Tensor, index: Tensor, x: Tensor, mean: Tensor, coefficients: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """``dx = a·dz + b·(x − mean) + c``. Traffic: reads grad, index and x, writes dx."""
