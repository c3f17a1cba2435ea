"""The contestants of ``bench``: each name is one way of running the same network with the same values."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import models, networks, testing
from .inference import optimize_for_inference
from .plans import choice

STOCK = "stock"
GRAPH = "+graph"
# In the order of the tables.
NAMES = (STOCK, STOCK + GRAPH, "fused", "fused" + GRAPH, "genstats", "compile", "compile-max", "timm+compile")
SLACK = 2.0
FLOOR_ULPS = 16.0
# A ReLU that flips within a rounding of its kink is worth this much of a gradient; ``verify`` is the test without.
GRADIENT_FLOOR = 2e-2
CHECKED_IN_TRAINING = 4
WARM_UP = 3  # steps before a capture


@dataclass(frozen=True)
class Setting:
    """What one table of ``bench`` measures."""

    model: str
    mode: str  # "infer" or "train"
    dtype: str
    device: str
    batch: int
    image_size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return networks.DTYPES[self.dtype]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """In training bf16 and fp16 come from autocast over float32 parameters."""
        if self.mode == "infer" or self.dtype == "fp64":
            return self.torch_dtype
        return torch.float32

    def target(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device) % 1000


@dataclass(frozen=True)
class Provider:
    """A network, and one step of it on a batch."""

    network: nn.Module | Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Tensor]


@contextmanager
def searched_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest, for every provider alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def has_graphs(device: str) -> bool:
    return torch.device(device).type == "cuda"


def missing(name: str, setting: Setting) -> str:
    """Why a provider cannot run here; "" where it can."""
    if name.endswith(GRAPH) and not has_graphs(setting.device):
        return "CUDA graphs need a GPU"
    if name == "timm+compile":
        if importlib.util.find_spec("timm") is None:
            return "timm is not installed"
        if not _timm().is_model(setting.model):
            return f"timm has no {setting.model}"
    return ""


def _timm() -> ModuleType:
    testing.import_torchvision()  # which timm imports too, and which a processor's PyTorch refuses without this
    import timm

    return timm


def compiled(network: nn.Module, mode: str, compiler_mode: str | None = None) -> nn.Module:
    """``torch.compile(network, mode=compiler_mode)``, with freezing where ``mode`` is "infer"; each shape has its own code."""
    from torch._inductor import config as inductor

    # As a global setting: dynamo asks it too, and takes weights for inputs where only the compiler's options say it.
    inductor.freezing = mode == "infer"
    return torch.compile(network, mode=compiler_mode, dynamic=False)  # type: ignore[return-value]


def release(device: str | torch.device) -> None:
    """Give back what networks that are gone have left: compiled code, of which torch.compile keeps only so much before it
    stops compiling, and memory of a GPU."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@functools.cache
def _pool() -> tuple[int, int]:
    """The memory of all graphs: they are replayed one after another, and what one keeps is never another's."""
    return torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    x: Tensor
    out: Tensor
    gradients: list[Tensor | None]


class Captured:
    """A step that is replayed as a CUDA graph; its first call for a shape captures it.

    Results, and gradients of ``parameters``, lie in the graph's memory: the next call with that shape writes over them.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter] = ()) -> None:
        self._step, self._parameters = step, list(parameters)
        self._graphs: dict[tuple[torch.Size, torch.dtype], _Graph] = {}
        self._last: _Graph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype
        if key not in self._graphs:
            with torch.cuda.device(x.device):
                self._graphs[key] = self._capture(x.clone())
        found = self._graphs[key]
        found.x.copy_(x)
        found.graph.replay()
        if found is not self._last:
            self._attach(found.gradients)
            self._last = found
        return found.out

    def _attach(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient

    def _capture(self, x: Tensor) -> _Graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles, or searches an algorithm, may not be captured
            for _ in range(WARM_UP):
                self._step(x)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # what the side stream's allocations have left
        self._attach([None] * len(self._parameters))  # so that the backward allocates them within the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool()):
            out = self._step(x)
        return _Graph(graph, x, out, [parameter.grad for parameter in self._parameters])


def _network(name: str, source: nn.Module, setting: Setting) -> nn.Module:
    """Holding the values of ``source``, on the device, channels_last, ready for the mode but in float32."""
    if name in ("fused", "genstats"):
        network: nn.Module = models.BUILDERS[setting.model]()
        network.load_state_dict(source.state_dict())
    elif name == "timm+compile":
        network = _timm().create_model(setting.model, num_classes=1000)
        network.load_state_dict(source.state_dict())
    else:
        network = copy.deepcopy(source)
    network = networks.in_layout(network.to(setting.device), torch.channels_last)
    return network.train(setting.mode == "train")


def build(name: str, source: nn.Module, setting: Setting) -> Provider:
    """Make a provider.

    Args:
        name: one of ``NAMES``.

            * "stock": eager, channels_last.
            * "fused": ``optimize_for_inference``, or in training this package's network.
            * "genstats": in training, "fused" with ``covariance("never")``: every convolution's statistics come from its raw
              output.
            * "stock+graph", "fused+graph": the same step as a CUDA graph, into which the batch is copied.
            * "compile": stock through torch.compile, with freezing in inference; "compile-max": with its mode "max-autotune".
            * "timm+compile": timm's network of that name through torch.compile.

            A training step is forward, loss and backward, for all of them; no optimizer.
        source: stock network in float32 that holds the values; not changed.
    """
    dtype = setting.parameter_dtype
    base = name.removesuffix(GRAPH)
    choice_of_plan = "never" if name == "genstats" else choice.current()
    network = _network(base, source, setting)
    if setting.mode == "infer" and base == "fused":
        network = optimize_for_inference(network, dtype)
    else:
        network = network.to(dtype)
    run = network
    if "compile" in name:
        run = compiled(network, setting.mode, "max-autotune" if name == "compile-max" else None)
    targets: dict[int, Tensor] = {}  # made once: a copy from the host would wait for the GPU, and cannot be captured

    def infer(x: Tensor) -> Tensor:
        # no_grad, because torch.compile freezes weights under it; an inference tensor would cost a copy.
        with torch.no_grad():
            return run(x)

    def train(x: Tensor) -> Tensor:
        if len(x) not in targets:
            targets[len(x)] = setting.target(len(x))
        with choice.covariance(choice_of_plan):
            return networks.training_step(run, x, targets[len(x)], setting.torch_dtype)

    step = infer if setting.mode == "infer" else train
    if name.endswith(GRAPH):
        return Provider(network, Captured(step, network.parameters() if setting.mode == "train" else ()))
    return Provider(network, step)


def batch_for(setting: Setting, x: Tensor) -> Tensor:
    """The batch as every provider gets it: its dtype, channels_last."""
    return x.to(setting.device, setting.parameter_dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Gold:
    """The float64 answer: logits, and in training all gradients in one vector."""

    logits: Tensor
    gradients: dict[str, Tensor]


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("_orig_mod."): p.grad.double().cpu()
        for name, p in network.named_parameters()
        if p.grad is not None
    }


def _checkpointed(network: nn.Module) -> nn.Module:
    """The same, each block of which is computed again in the backward: a whole batch fits in float64."""
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:  # type: ignore[union-attr]
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return network


def gold_answer(source: nn.Module, setting: Setting, x: Tensor) -> Gold:
    """Stock PyTorch in float64 on (the first images of) the batch.

    In inference images do not mix: a few say enough. In training they do, and what is chosen by shape is checked only at the
    shape that is timed: on a GPU all of them are taken, where float64 fits.
    """
    few = batch_for(setting, x[:CHECKED_IN_TRAINING]).double()
    if setting.mode == "infer":
        with torch.no_grad():
            return Gold(networks.double_copy(source).to(setting.device).eval()(few).cpu(), {})

    def trained(images: Tensor) -> Gold:
        network = _checkpointed(networks.double_copy(source).to(setting.device)).train()
        out = networks.training_step(network, images, setting.target(len(images)), torch.float64)
        return Gold(out.cpu(), _gradients(network))

    if torch.device(setting.device).type == "cuda":
        try:
            return trained(batch_for(setting, x).double())
        except torch.OutOfMemoryError:
            pass  # outside of the handler, which holds the tensors of the failed step
        torch.cuda.empty_cache()
    return trained(few)


def errors(provider: Provider, setting: Setting, x: Tensor, gold: Gold) -> tuple[float, float]:
    """(error of the logits, error of all gradients together) relative to float64; restores the statistics."""
    network = provider.network
    kept = (
        {name: b.clone() for name, b in network.named_buffers()}
        if isinstance(network, nn.Module) and setting.mode == "train"
        else {}
    )
    # In inference the whole batch is run, and its first answers are compared.
    images = x if setting.mode == "infer" else x[: len(gold.logits)]
    out = provider.step(batch_for(setting, images))[: len(gold.logits)].cpu()
    if setting.mode == "infer":
        return networks.relative_error(out, gold.logits), 0.0
    assert isinstance(network, nn.Module)
    found = _gradients(network)
    if found.keys() != gold.gradients.keys():
        return networks.relative_error(out, gold.logits), float("inf")
    names = sorted(found)
    ours, exact = (torch.cat([side[name].flatten() for name in names]) for side in (found, gold.gradients))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
    return networks.relative_error(out, gold.logits), networks.relative_error(ours, exact)


def is_right(found: tuple[float, float], stock: tuple[float, float], setting: Setting) -> bool:
    """As accurate as stock in the same dtype, up to rounding and flipped ReLUs."""
    floor = FLOOR_ULPS * torch.finfo(setting.torch_dtype).eps
    return found[0] <= SLACK * stock[0] + floor and found[1] <= SLACK * stock[1] + GRADIENT_FLOOR
