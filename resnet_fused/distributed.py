"""Training on many GPUs: PyTorch's own DistributedDataParallel, and batch norms of any network made synchronised.

What the processes exchange is in ``collectives``, the synchronised norms are in ``norms``, how they fuse in ``plans.chain``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import collectives
from .norms import SyncBatchNorm, SyncBatchNormAct, _FusedNorm

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _kind(name: str, norm: nn.Module) -> type[_FusedNorm]:
    """What a batch norm becomes."""
    if isinstance(norm, _FusedNorm):
        return type(norm)
    if type(norm).__name__ == "BatchNormAct2d" and isinstance(getattr(norm, "act", None), nn.Module):
        return SyncBatchNormAct
    if type(norm) in _PLAIN and "forward" not in norm.__dict__:
        return SyncBatchNorm
    raise ValueError(
        f"{name or 'model'}: expected a batch norm of torch.nn, timm or resnet_fused, got {type(norm).__name__}, of which a "
        "synchronised one would lose what it does besides"
    )


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every batch norm of a model take its statistics over the rows of all processes.

    Works in place, on any network, before or after ``fuse`` and ``DistributedDataParallel``: modules keep their parameters,
    buffers, hooks and state_dict, and become ``SyncBatchNorm``; norms with an activation (``BNReLU2d``, ``BNAddReLU2d``, timm's
    ``BatchNormAct2d``) keep it. ``nn.SyncBatchNorm`` is converted too, so that it takes tensors of a processor.

    Args:
        process_group: of ``torch.distributed``, made by ``new_group``; None: all processes.
    Returns:
        The model.
    Raises:
        ValueError: a batch norm is of a class that does something else besides, by name; nothing is changed then. This process
            is not in the group.
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    group = collectives.name_of(process_group)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    kinds = [_kind(name, norm) for name, norm in norms]
    for (_, norm), kind in zip(norms, kinds, strict=True):
        norm.__dict__.pop("process_group", None)
        norm.__class__ = kind
        norm.group_name = group  # type: ignore[assignment]
    return model
