"""What the ranks of the distributed tests run, and what a single process of stock PyTorch makes of the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from chain_cases import CASES, Case
from torch import Tensor, nn

import resnet_fused

BATCH = 6
SPLITS = {"even": (2, 2, 2), "uneven": (3, 1, 2), "empty": (4, 0, 2), "two": (3, 3), "two uneven": (5, 1)}
PAIR = "pair"  # a group of the first two ranks
_groups: dict[str, Any] = {}


def group_of(split: str) -> Any:
    """The process group of a split: all three ranks, or the first two."""
    if len(SPLITS[split]) == 3:
        return None
    if PAIR not in _groups:
        _groups[PAIR] = dist.new_group([0, 1])
    return _groups[PAIR]


def make(case: str, dtype: torch.dtype, ours: bool, seed: int = 0) -> nn.Module:
    made: Case = CASES[case]
    fused, stock = made.pair()
    module = fused if ours else stock
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return module.to(dtype).to(memory_format=torch.channels_last)


def inputs(case: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The whole batch, in which the images differ in brightness, and the gradient of the output."""
    made = CASES[case]
    whole = Case(made.ours, made.stock, tuple((BATCH, *shape[1:]) for shape in made.shapes))
    xs = whole.inputs(dtype, torch.channels_last)
    with torch.no_grad():
        xs[0] += torch.linspace(-0.5, 0.5, BATCH).to(dtype).view(-1, 1, 1, 1)
        out = make(case, torch.float64, ours=False)(*(x.double() for x in xs))
    mean = torch.linspace(-1, 2, out.shape[1]).view(1, -1, 1, 1)
    grad = mean + torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return xs, grad.to(dtype)


def step(module: nn.Module, xs: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    xs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in xs]
    module.zero_grad(set_to_none=True)
    out = module(*xs)
    out.backward(grad)
    found = {"out": out.detach()} | {f"input {i} grad": x.grad for i, x in enumerate(xs)}
    found |= {f"{name} grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in module.named_buffers()}


class Counted:
    """Collectives while it is entered."""

    def __init__(self) -> None:
        self.gathers, self.reductions = 0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Counted:
        for name, count in (("all_gather", "gathers"), ("all_reduce", "reductions")):
            self._stack.enter_context(mock.patch.object(dist, name, self._counting(getattr(dist, name), count)))
        return self

    def _counting(self, function: Callable[..., Any], count: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(self, count, getattr(self, count) + 1)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


def _settings(backend: str, covariance: str) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(resnet_fused.backend(backend))
    stack.enter_context(resnet_fused.covariance(covariance))
    return stack


def rank_step(
    rank: int, case: str, split: str, dtype: torch.dtype, backend: str, covariance: str, converter: str, autocast: bool
) -> tuple[dict[str, Tensor], tuple[int, int]] | None:
    """One step of this rank's images, its results by name, and how many collectives it took."""
    group = group_of(split)
    if rank >= len(SPLITS[split]):
        return None
    module = make(case, dtype, ours=True)
    module = convert(converter, module, group)
    xs, grad = inputs(case, dtype)
    sizes = SPLITS[split]
    xs, (grad,) = ([t.split(sizes)[rank] for t in ts] for ts in (xs, [grad]))
    context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with _settings(backend, covariance), Counted() as counted, context:
        found = step(module, xs, grad.bfloat16() if autocast else grad)
    return found, (counted.gathers, counted.reductions)


def convert(converter: str, module: nn.Module, group: Any) -> nn.Module:
    if converter == "ours":
        return resnet_fused.convert_sync_batchnorm(module, group)
    return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)


def whole_step(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stock PyTorch in one process, with the whole batch."""
    module = make(case, torch.float64, ours=False).to(dtype)
    xs, grad = inputs(case, dtype)
    return step(copy.deepcopy(module), xs, grad)


def together(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as one process would have them: images side by side, parameter gradients summed, buffers equal."""
    whole = {}
    for name in found[0]:
        parts = [rank[name] for rank in found]
        if name == "out" or name.startswith("input "):
            whole[name] = torch.cat(parts)
        elif name.endswith(" grad"):
            whole[name] = torch.stack(parts).sum(0, dtype=torch.promote_types(parts[0].dtype, torch.float32)).to(parts[0].dtype)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            whole[name] = parts[0]
    return whole


def small_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = resnet_fused.ResNet(resnet_fused.Bottleneck, (1, 1, 1, 1), num_classes=5, width_per_group=8)
    return model.to(dtype)


def rank_compiled(rank: int, converter: str, named_group: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]] | None:
    """A step of a compiled block and of the same block without, and how many chains its graph holds."""
    from torch._dynamo.testing import CompileCounterWithBackend

    group = group_of("two")
    if rank > 1:
        return None
    torch._dynamo.reset()
    group = group if named_group else None
    found = []
    xs, grad = inputs("bottleneck-projection", torch.float64)
    xs, (grad,) = ([t.split((5, 1))[rank] for t in ts] for ts in (xs, [grad]))
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (True, False):
        module = convert(converter, make("bottleneck-projection", torch.float64, ours=True), group)
        if compiled:
            module.compile(fullgraph=True, backend=counter)
        found.append(step(module, xs, grad))
    return *found, [graph.code.count("torch.ops.resnet_fused.chain(") for graph in counter.graphs]
