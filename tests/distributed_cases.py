"""What the ranks of the distributed tests run, and what a single process of stock PyTorch makes of the whole batch."""

from __future__ import annotations

import copy
import os
import signal
import time
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


def make(case: str, dtype: torch.dtype, ours: bool) -> nn.Module:
    made: Case = CASES[case]
    fused, stock = made.pair()
    module = fused if ours else stock
    generator = torch.Generator().manual_seed(0)
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
    """Collectives while it is entered, and how many numbers they took from this rank."""

    def __init__(self) -> None:
        self.gathers, self.reductions, self.numbers = 0, 0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Counted:
        for name, count in (("all_gather", "gathers"), ("all_reduce", "reductions")):
            self._stack.enter_context(mock.patch.object(dist, name, self._counting(getattr(dist, name), count)))
        return self

    def _counting(self, function: Callable[..., Any], count: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(self, count, getattr(self, count) + 1)
            self.numbers += args[-1].numel()
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
            whole[name] = (
                torch.stack(parts).sum(0, dtype=torch.promote_types(parts[0].dtype, torch.float32)).to(parts[0].dtype)
            )
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            whole[name] = parts[0]
    return whole


def rank_compiled(
    rank: int, converter: str, named_group: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]] | None:
    """A step of a compiled block and of the same block without, and how many chains its graph holds."""
    from torch._dynamo.testing import CompileCounterWithBackend

    split = "two uneven" if named_group else "uneven"
    group = group_of(split)
    if rank >= len(SPLITS[split]):
        return None
    torch._dynamo.reset()
    found = []
    xs, grad = inputs("bottleneck-projection", torch.float64)
    *xs, grad = _shares(rank, [*xs, grad], SPLITS[split])
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (True, False):
        module = convert(converter, make("bottleneck-projection", torch.float64, ours=True), group)
        if compiled:
            module.compile(fullgraph=True, backend=counter)
        found.append(step(module, xs, grad))
    return *found, [graph.code.count("torch.ops.resnet_fused.chain(") for graph in counter.graphs]


def _shares(rank: int, xs: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    return [x.split(sizes)[rank] for x in xs]


def stock_norm(dimensions: int, **kwargs: Any) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dimensions]
    torch.manual_seed(2)
    norm = kind(7, **kwargs).double()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def norm_input(dimensions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (BATCH, 7, 3, 4, 2)[:dimensions]
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x + torch.linspace(-1, 1, BATCH, dtype=torch.float64).view(-1, *[1] * (dimensions - 1)), grad


def rank_norm(rank: int, dimensions: int, split: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """A batch norm that stands alone, on this rank's share."""
    norm = resnet_fused.convert_sync_batchnorm(stock_norm(dimensions, **kwargs))
    x, grad = _shares(rank, list(norm_input(dimensions)), SPLITS[split])
    return norm_steps(norm, x, grad)


def norm_steps(norm: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Two steps, and with running statistics an evaluation."""
    step(norm, [x * 2], grad)
    found = step(norm, [x], grad)
    if norm.track_running_stats:
        with Counted() as counted:
            found["input evaluated"] = norm.eval()(x).detach()
        assert counted.gathers == counted.reductions == 0
    return found


def penalty_step(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """A gradient of a gradient: the penalty on the input's gradient, differentiated."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(module(x), x, grad, create_graph=True)
    dx.square().sum().backward()
    return {"input 0 grad": x.grad} | {f"{n} grad": p.grad for n, p in module.named_parameters() if p.grad is not None}


def far_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs whose mean is a thousand deviations, and differs between ranks by some; gradients with a mean."""
    (x,), grad = inputs("conv-1x1-no-relu", torch.float32)
    offset = 250 + torch.linspace(-1, 1, BATCH).view(-1, 1, 1, 1)
    return (x.detach() + offset).to(dtype), grad.to(dtype)


def rank_far(rank: int, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    module = resnet_fused.convert_sync_batchnorm(make("conv-1x1-no-relu", dtype, ours=True))
    x, grad = _shares(rank, list(far_inputs(dtype)), SPLITS["uneven"])
    with _settings(backend, "always"):
        return step(module, [x], grad)


def rank_penalty(rank: int, case: str) -> dict[str, Tensor]:
    module = resnet_fused.convert_sync_batchnorm(make(case, torch.float64, ours=True))
    (x,), grad = inputs(case, torch.float64)
    return penalty_step(module, *_shares(rank, [x, grad], SPLITS["uneven"]))


def _hooked(module: nn.Module) -> nn.Module:
    module.bn2.register_forward_hook(lambda _, args, out: out * 2)
    return module


def _checkpointed(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    return module


def _half_frozen(module: nn.Module) -> nn.Module:
    module.bn1.eval()
    return module


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": _hooked,
    "checkpoint": _checkpointed,
    "fx": torch.fx.symbolic_trace,
    "frozen": _half_frozen,
    "fuse": resnet_fused.fuse,
}


def rank_changed(rank: int, change: str, case: str) -> dict[str, Tensor]:
    """A step of a block that is converted, then changed."""
    module = resnet_fused.convert_sync_batchnorm(make(case, torch.float64, ours=change != "fuse"))
    xs, grad = inputs(case, torch.float64)
    *xs, grad = _shares(rank, [*xs, grad], SPLITS["uneven"])
    return step(CHANGES[change](module), xs, grad)


def changed_step(change: str, case: str) -> dict[str, Tensor]:
    xs, grad = inputs(case, torch.float64)
    module = make(case, torch.float64, ours=False)
    return step(module if change in ("fx", "fuse") else CHANGES[change](module), xs, grad)


def rank_two_groups(rank: int) -> dict[str, Tensor] | None:
    """A block whose first norm talks to all ranks and whose others talk to the first two."""
    pair = group_of("two")
    module = make("bottleneck", torch.float64, ours=True)
    resnet_fused.convert_sync_batchnorm(module.bn1)
    if rank < 2:
        resnet_fused.convert_sync_batchnorm(module.bn2, pair)
        resnet_fused.convert_sync_batchnorm(module.bn3, pair)
    xs, grad = inputs("bottleneck", torch.float64)
    *xs, grad = _shares(rank, [*xs, grad], SPLITS["even"])
    return step(module, xs, grad)


def rank_eval(rank: int) -> tuple[int, int, bool]:
    """Collectives of an evaluation; and whether a group's name that nobody knows is an error."""
    module = resnet_fused.convert_sync_batchnorm(make("bottleneck", torch.float64, ours=True)).eval()
    xs, _ = inputs("bottleneck", torch.float64)
    with Counted() as counted:
        module(*xs)
    module.train().bn2.group_name = "gone"
    try:
        module(*xs)
    except RuntimeError as error:
        return counted.gathers, counted.reductions, "'gone'" in str(error)
    return counted.gathers, counted.reductions, False


def network(ours: bool) -> nn.Module:
    from chain_cases import tv

    torch.manual_seed(3)
    stock = tv.ResNet(tv.Bottleneck, (1, 1, 1, 1), num_classes=5, width_per_group=8)
    if not ours:
        return stock.double()
    model = resnet_fused.ResNet(resnet_fused.Bottleneck, (1, 1, 1, 1), num_classes=5, width_per_group=8)
    model.load_state_dict(stock.state_dict())
    return model.double()


def train(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """Losses of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(BATCH) % 5


def rank_train(rank: int, converter: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Under DistributedDataParallel, an equal share for each rank."""
    model = convert(converter, network(ours=True), None)
    x, target = _shares(rank, list(pictures()), SPLITS["even"])
    losses = train(nn.parallel.DistributedDataParallel(model), x, target)
    return losses, dict(model.state_dict())


def rank_numbers(rank: int, batch: int) -> int:
    """How many numbers a step of a block sends, for a batch of this size on each rank."""
    module = resnet_fused.convert_sync_batchnorm(make("bottleneck-projection", torch.float32, ours=True))
    x = torch.randn(batch, 35, 9, 11)
    with Counted() as counted, _settings("auto", "always"):
        out = module(x)
        out.backward(torch.randn_like(out))
    return counted.numbers


HANG_S = 20.0


def rank_left_alone(rank: int, fate: str, direction: str) -> float:
    """How long it took the first rank to notice that the second one died, or hangs, in its second step."""
    module = resnet_fused.convert_sync_batchnorm(make("bottleneck", torch.float32, ours=True))
    xs, grad = inputs("bottleneck", torch.float32)
    *xs, grad = _shares(rank, [*xs, grad], SPLITS["two"])
    step(module, xs, grad)
    out = module(*xs) if direction == "backward" else None
    if rank == 1:
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(HANG_S)
        return 0.0
    begin = time.monotonic()
    try:
        (module(*xs) if out is None else out).backward(grad)
    except RuntimeError:
        return time.monotonic() - begin
    raise AssertionError("the first rank finished its step alone")
