"""Inputs of one kernel call, shared by the tests of the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.backends.operands import acc_dtype


class Case:
    """Inputs of one shape, dtype and layout; ``double`` gives the same numbers in float64."""

    def __init__(self, shape, dtype, layout=torch.channels_last, mean=0.0):
        generator = torch.Generator().manual_seed(sum(shape))

        def activation(shift=0.0):
            return (torch.randn(shape, generator=generator) + shift).to(dtype).contiguous(memory_format=layout)

        def vector():
            return torch.randn(shape[1], generator=generator).to(acc_dtype(dtype))

        self.x, self.residual, self.grad = activation(mean), activation(), activation()
        self.mean, self.scale, self.shift, self.a, self.b, self.c = (vector() for _ in range(6))
        self.rows = shape[0] * shape[2] * shape[3]

    @property
    def coefficients(self):
        return self.a, self.b, self.c

    def double(self) -> Case:
        other = object.__new__(Case)
        for name, value in vars(self).items():
            setattr(other, name, value.double() if isinstance(value, Tensor) else value)
        return other
