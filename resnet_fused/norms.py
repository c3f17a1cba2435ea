"""Batch norms that are modules of their own: with what follows them, and synchronised over processes.

Each takes the fused operator where that gives the stock result (``layers`` tells where), else plain PyTorch. ``group_name`` says
over which processes the batch statistics go: "" for this one alone, or as in ``collectives``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from . import collectives, dispatch, reference, statistics
from .layers import run_norm


@torch.fx.wrap
def synchronised_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    group: str,
) -> Tensor:
    """Batch norm in training over the rows of all processes of a group, in plain differentiable PyTorch; buffers are updated.

    Args:
        x (Tensor[N, C, ...]): N may be 0, where another process has rows.
        weight, bias, running_mean, running_var (Tensor[C], optional).
        momentum: None averages over all ``num_batches_tracked`` batches.
        group: as in ``collectives.group_of``.
    """
    y, mean, var, rows = reference.synchronised_norm(x, weight, bias, eps, group)
    with torch.no_grad():
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            share = momentum if momentum is not None else num_batches_tracked.double().reciprocal()
            statistics.update_running(running_mean, mean, share)
            statistics.update_running(running_var, var * (rows / (rows - 1)), share)
    return y


class _FusedNorm(_BatchNorm):
    """A batch norm of any number of dimensions, possibly synchronised."""

    group_name: str = ""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")

    def _fused(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        out = run_norm(x, self, residual, relu)
        if out is not None:
            return out
        y = self._norm(x)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    def _norm(self, x: Tensor) -> Tensor:
        traced = isinstance(x, Proxy)
        if traced and not self.training:
            training = self.running_mean is None
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.0, self.eps)
        if not traced:
            if not (self.training and collectives.is_active(self.group_name)):
                return super().forward(x)
            self._check_input_dim(x)
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        return synchronised_batch_norm(x, self.weight, self.bias, *buffers, self.momentum, self.eps, self.group_name)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", group_name={self.group_name!r}" if self.group_name else "")


class SyncBatchNorm(_FusedNorm):
    """Batch norm over the rows of all processes of a group; the arguments and state_dict of ``nn.SyncBatchNorm``.

    Unlike PyTorch's it takes tensors of a processor too, and is fused with its convolution, its ReLU and a residual addition
    in this package's blocks. Statistics are exchanged, one collective forward and one backward (a block's last norm and that of
    its shortcut share one); rows need not be equal, and a process may have none. In eval mode, without ``torch.distributed`` or
    in a group of one it is a plain batch norm.

    Numerics: each process's mean and variance merge by Chan's formula in float64, in the order of ranks.
    Traffic: ``2 C + 1`` numbers of 8 bytes forward, ``2 C`` backward; behind an expanding 1×1 convolution the means of its input
    channels besides.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        process_group: of ``torch.distributed``; None: all processes.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.group_name = collectives.name_of(process_group)

    def forward(self, x: Tensor) -> Tensor:
        return self._fused(x, None, relu=False)


class SyncBatchNormAct(SyncBatchNorm):
    """``SyncBatchNorm``, then the modules ``drop`` and ``act``: timm's ``BatchNormAct2d``, synchronised."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _Kind(nn.Module):
    """Says what its parent is: ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes a new module of parameters, buffers and
    children, and would drop the ReLU with the class."""

    def __init__(self, kind: type[_FusedNorm]) -> None:
        super().__init__()
        self.kind = kind


def _keep_kind(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if type(parent) is nn.SyncBatchNorm and isinstance(child, _Kind):
        group = parent.__dict__.pop("process_group")
        parent.__class__ = child.kind  # type: ignore[assignment]
        parent.group_name = collectives.name_of(group)  # type: ignore[assignment]


register_module_module_registration_hook(_keep_kind)


class _FusedBatchNorm2d(_FusedNorm, nn.BatchNorm2d):
    """A batch norm whose forward also takes in what follows it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = _Kind(type(self))

    def _check_input_dim(self, x: Tensor) -> None:
        nn.BatchNorm2d._check_input_dim(self, x)


class BNReLU2d(_FusedBatchNorm2d):
    """``relu(batch_norm(x))``: ``nn.BatchNorm2d`` with its ReLU; the same arguments and state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        return self._fused(x, None, relu=True)


class BNAddReLU2d(_FusedBatchNorm2d):
    """``relu(batch_norm(x) + residual)``; the arguments and state_dict of ``nn.BatchNorm2d``."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._fused(x, residual, relu=True)


dispatch.BATCH_NORMS.add(SyncBatchNorm)
