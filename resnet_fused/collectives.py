"""What processes tell each other for synchronised batch norm: statistics, never weights or activations.

A group is named by a string, which operators, graphs and pickles can hold, and looked up where it is used: ``WORLD`` is all
processes, other names are those of ``torch.distributed``'s groups. Without ``torch.distributed``, or in a group of one, every
function returns what the process has itself.

A rank that dies is an error for the others when the group's backend notices, at the latest after the time-out that was given to
``torch.distributed.init_process_group`` or ``new_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = "WORLD"
_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)  # its older name


def group_of(name: str) -> Any:
    """The process group of that name; None where there is nobody to talk to, and for "".

    Raises:
        RuntimeError: this process is in no group of that name.
    """
    if not name:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if name != WORLD:
            raise RuntimeError(f"process group {name!r}: torch.distributed is not initialised")
        return None
    if name == WORLD:
        group = dist.group.WORLD
    else:
        try:
            group = dist.distributed_c10d._resolve_process_group(name)
        except Exception as error:  # a KeyError or a RuntimeError, by version
            raise RuntimeError(
                f"process group {name!r}: this process is in no group of that name; convert the model again with a group "
                "of this run"
            ) from error
    return group if dist.get_world_size(group) > 1 else None


def is_active(name: str) -> bool:
    """Whether there is anybody else in the group."""
    return group_of(name) is not None


def name_of(group: Any) -> str:
    """The inverse of ``group_of``; None is all processes.

    Raises:
        ValueError: this process is not in the group.
    """
    if group is None:
        return WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: expected a group that this process is in")
    return WORLD if group is dist.group.WORLD else group.group_name


def gather(vector: Tensor, name: str) -> Tensor:
    """The vectors ``[n]`` of all processes as ``[ranks, n]``, in the order of ranks: the same bits everywhere."""
    group = None if vector.is_meta else group_of(name)
    if group is None:
        return vector[None]
    gathered = vector.new_empty(dist.get_world_size(group), len(vector))
    if vector.is_cuda and dist.get_backend(group) != "gloo":
        _gather_single(gathered.view(-1), vector, group=group)
    else:  # gloo, alone or for a processor's tensors beside NCCL, cannot gather into one tensor
        dist.all_gather(list(gathered.unbind()), vector, group=group)
    return gathered


class _Total(torch.autograd.Function):
    """A sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, name: str) -> Tensor:
        ctx.name = name
        summed = vector.clone()
        group = None if vector.is_meta else group_of(name)
        if group is not None:
            dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grads[0].contiguous(), ctx.name), None


def totals(vectors: Sequence[Tensor], name: str) -> list[Tensor]:
    """The sums of several vectors over all processes in one collective, in float64 and back in their own dtype.

    Differentiable any number of times.
    """
    summed = _Total.apply(torch.cat([v.double() for v in vectors]), name)
    return [s.to(v.dtype) for s, v in zip(summed.split([len(v) for v in vectors]), vectors, strict=True)]
