"""The ``empty`` backend: a batch of no images, as a rank without data has it when others wait for its statistics."""

from __future__ import annotations

from torch import Tensor

from .aten import AtenKernels
from .operands import Conv, Operand, acc_dtype, source


class EmptyKernels(AtenKernels):
    """The formulas where there are no rows: a mean of nothing is 0, for others to merge with none of the weight."""

    name = "empty"

    def bn_stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = x.new_zeros(x.shape[1], dtype=acc_dtype(x.dtype))
        return zero, zero.clone()

    def gram(self, a: Operand, conv: Conv) -> tuple[Tensor, Tensor]:
        x = source(a)
        channels = x.shape[1]
        zeros = x.new_zeros(channels, channels + 1).double()
        return zeros[:, 0].clone(), zeros[:, 1:].clone()

    def recompute_statistics(
        self, a: Operand, weight: Tensor, conv: Conv, flagged: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mean, var

    def reads_back(self, dtype: object) -> bool:
        return False
