"""The kernel interface: what a plan may ask of a backend.

Plans know only these methods, so one plan runs on every backend. Activations are 4-D tensors ``[N, C, H, W]``, dense in
channels_last (the fast layout) or contiguous; all activations of one call share dtype, shape and strides. Per-channel
vectors are in the *accumulation dtype*: float64 for float64 activations, float32 otherwise.

The ReLU is ``where(z <= 0, 0, z)``: NaN stays NaN and its gradient passes, as in stock PyTorch. A *mask* holds one bit per
element of the output in memory order, set where the gradient passes: ``!(out <= 0)`` on the value as stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of ``dtype`` are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Conv:
    """Geometry of a 2-D convolution with zero padding."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_shape(self, x_shape: torch.Size | tuple, weight_shape: torch.Size | tuple) -> tuple:
        """``[N, K, P, Q]`` of the convolution of ``[N, C, H, W]`` with ``[K, C / groups, R, S]``."""
        spatial = (
            (x_shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (weight_shape[2 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        return (x_shape[0], weight_shape[0], *spatial)


class Kernels(ABC):
    """A backend: every kernel that the plans are written in."""

    name: str

    # Convolutions

    @abstractmethod
    def fprop(self, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        """Raw convolution output ``[N, K, P, Q]``, in the layout of ``x``."""

    @abstractmethod
    def dgrad(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        """Gradient of ``fprop`` with respect to ``x`` (only the shape, dtype and layout of ``x`` count)."""

    @abstractmethod
    def wgrad(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        """Gradient of ``fprop`` with respect to ``weight`` (only its shape and layout count), in ``dy``'s dtype."""

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
