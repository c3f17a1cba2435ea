"""What a block costs the host: launches, and microseconds of Python and dispatch, of stock PyTorch and of this package.

On a GPU: kernels, copies and fills counted by the profiler, and the time in which the host has queued a call, the GPU far behind.

On a processor the time of a call on tiny tensors stands for it. That is an upper bound: kernels run inline, their work is in it.
Launches of the ``cuda`` and ``triton`` backends are counted there without running: Triton's exactly; an operator of the extension
or of PyTorch, views left out, counts as one launch, which is a lower bound: batch norm, say, makes several.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import gpu_time
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import backends, bench, blocks, info, networks, operators, optimize_for_inference
from resnet_fused.arguments import Parser, device_name, positive
from resnet_fused.backends.algebra import Algebra, NormGradients, RowGradients
from resnet_fused.backends.cuda import CudaConvolutionKernels, cuda_kernels
from resnet_fused.backends.kernels import Kernels
from resnet_fused.console import print_table
from resnet_fused.layers import run_stem

COLUMNS = (
    *("op", "mode", "provider", "shape", "dtype", "host_us", "host_us_p20", "host_us_p80"),
    *("launches", "triton_launches", "extension_operators", "pytorch_operators", "device", "versions", "commit"),
)
MODES = ("forward", "train")
QUANTILES = {"": 0.5, "_p20": 0.2, "_p80": 0.8}
CALLS = 20  # queued between two waits


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return run_stem(x, self.conv1, self.bn1, self.relu, self.maxpool)


# Name: the block of ResNet-50's or -18's form, its input; few channels, so that kernels have next to nothing to do.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bottleneck": (lambda: blocks.Bottleneck(32, 8), (1, 32, 4, 4)),
    "basic": (lambda: blocks.BasicBlock(16, 16), (1, 16, 4, 4)),
    "stem": (lambda: Stem(16), (1, 3, 8, 8)),
}


def stock_of(name: str) -> nn.Module:
    """The block as torchvision has it: its modules one by one."""
    if name == "stem":
        stem = Stem(16)
        return nn.Sequential(stem.conv1, stem.bn1, stem.relu, stem.maxpool)
    source = networks.stock_model("resnet50" if name == "bottleneck" else "resnet18")
    kind = type(source.layer1[0])
    return kind(32, 8) if name == "bottleneck" else kind(16, 16)


def call_of(model: nn.Module, x: Tensor, mode: str) -> Callable[[], Any]:
    """Forward without gradients, or forward and backward to every gradient, the old ones thrown away."""
    model.train(mode == "train")

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(mode == "train")
    grad = torch.ones_like(model(x)) if mode == "train" else None

    def train() -> None:
        model.zero_grad(set_to_none=True)
        leaf.grad = None
        model(leaf).backward(grad)

    return train if mode == "train" else forward


# Launches that are counted without running


PLANS = {
    torch.ops.resnet_fused.chain.default: operators._chain,
    torch.ops.resnet_fused.chain_backward.default: operators._chain_backward,
}
SILENT = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
)
_FORMULAS = Algebra()


def _row_gradients(*args: Any) -> tuple[Tensor, ...]:
    found: RowGradients = _FORMULAS.row_gradients(*args)
    weight = found.scaled.new_empty(0) if found.weight is None else found.weight
    return *found.norm[1:], found.mean_dz, found.scaled, weight


def _norm_gradients(*args: Any) -> tuple[Tensor, ...]:
    found: NormGradients = _FORMULAS.norm_gradients(*args)
    return found[1:]


def _coupling(weight: Tensor, b: Tensor, moments: Tensor, scaled: Tensor, mean_dz: Tensor) -> tuple[Tensor, ...]:
    vector = mean_dz.new_empty(weight.shape[1])
    square = weight.new_empty(weight.shape[1], weight.shape[1])
    return square, square, vector, vector


def _conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, None, stride, weight.shape[2] // 2)


def _conv_stats(x: Tensor, scale: Any, shift: Any, relu: bool, weight: Tensor, stride: int) -> tuple[Tensor, ...]:
    vector = torch.empty(weight.shape[0], dtype=torch.float32, device=x.device)
    return _conv(x, weight, stride), vector, vector


def _conv_bn_act(x: Tensor, a: Any, b: Any, c: bool, weight: Tensor, stride: int, *rest: Any) -> tuple[Tensor, Tensor]:
    out = _conv(x, weight, stride)
    return out, out.new_empty((out.numel() + 7) // 8 if rest[-1] else 0, dtype=torch.uint8)


# Results of the extension's operators that have no shape function, as nothing outside of this package's own operators calls them.
RESULTS: dict[str, Callable[..., Any]] = {
    "norm_vectors": _FORMULAS.norm_vectors,
    "norm_gradients": _norm_gradients,
    "through_covariance": _FORMULAS.through_covariance,
    "row_gradients": _row_gradients,
    "coupling": _coupling,
    "conv_stats": _conv_stats,
    "conv_bn_act": _conv_bn_act,
}


class Counting(TorchDispatchMode):
    """Counts what is called on tensors of the meta device; plans run with the backend that they name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PLANS:
            with self:
                return PLANS[func](*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if func.namespace == "resnet_fused":
            self.counts["extension"] += 1
            if name in RESULTS:
                return RESULTS[name](*args, **kwargs)
        elif not func.is_view and name not in SILENT:
            self.counts["pytorch"] += 1
        return func(*args, **kwargs)


class _Told:
    """A backend whose flagged channels are told by values, which the meta device has none of: nothing is flagged."""

    def recompute_statistics(self, a: Any, weight: Any, conv: Any, flagged: Any, mean: Tensor, var: Tensor) -> Any:
        return mean, var


def counted_backends() -> dict[str, Kernels]:
    """GPU backends by name, as far as their Python can run here."""
    found: dict[str, Kernels] = {
        "cuda without Triton": type("CudaAlone", (_Told, CudaConvolutionKernels), {})(),
    }
    if importlib.util.find_spec("triton"):
        from resnet_fused.backends.triton.dispatch import TritonKernels

        found["cuda"], found["triton"] = cuda_kernels(), TritonKernels(own_conv3x3=True)
    return found


@contextmanager
def triton_launches(counts: Counter[str]) -> Iterator[None]:
    """In this block Triton's kernels are counted and do not run."""
    if not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.jit import KernelInterface

    def launched(kernel: Any, grid: Any) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            counts["triton"] += 1

        return call

    with mock.patch.object(KernelInterface, "__getitem__", launched):
        yield


def counted(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, mode: str, kernels: Kernels | None
) -> Counter[str]:
    """What a call would launch with ``kernels``, or (None) module by module."""
    model = networks.in_layout(copy.deepcopy(model).to("meta", dtype), torch.channels_last)
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    counting = Counting()
    name = "counted" if kernels else "aten"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(backends._KERNELS, {"counted": kernels} if kernels else {}))
        stack.enter_context(mock.patch.object(operators, "_without_autocast", nullcontext))  # the meta device has none
        stack.enter_context(backends.backend(name))
        stack.enter_context(triton_launches(counting.counts))
        call = call_of(model, x, mode)
        counting.counts.clear()
        stack.enter_context(counting)
        call()
    return counting.counts


# Times


def host_us(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds in which the host has made a call; a GPU is waited for before and after, not in between.

    Without one the process's own time counts, so that what else runs on the machine does not.
    """
    clock = time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        clock = time.perf_counter
    begin = clock()
    for _ in range(CALLS):
        call()
    taken = clock() - begin
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return taken / CALLS * 1e6


@dataclass
class Contestant:
    """A call, the backend that is chosen around it, and its times."""

    backend: str
    call: Callable[[], Any]
    samples: list[float] = field(default_factory=list)

    def sample(self, device: torch.device) -> None:
        with backends.backend(self.backend):
            self.samples.append(host_us(self.call, device))


def contestants(name: str, mode: str, device: torch.device, dtype: torch.dtype) -> dict[str, Contestant]:
    """Stock, the block on each backend of the device but that of formulas, and the block as ``optimize_for_inference`` has it."""
    make, shape = BLOCKS[name]
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)

    def contestant(model: nn.Module, backend: str) -> Contestant:
        model = networks.in_layout(model.to(device, dtype), torch.channels_last)
        with backends.backend(backend):
            return Contestant(backend, call_of(optimize_for_inference(model) if backend == "auto" else model, x, mode))

    found = {"stock": contestant(stock_of(name), "aten")}
    own = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    for backend in (b for b in own if b in backends.available_backends()):
        found[f"fused, {backend}"] = contestant(make(), backend)
    if mode == "forward":
        found["optimised"] = contestant(make(), "auto")
    return found


def measured(name: str, mode: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Rows of one block, the contestants timed in turns."""
    found = contestants(name, mode, device, dtype)
    for _ in range(repeats + 1):
        for contestant in found.values():
            contestant.sample(device)
    rows = []
    for provider, contestant in found.items():
        samples = sorted(contestant.samples[1:])  # the first is the warm-up
        share = {f"host_us{end}": f"{samples[int(q * (len(samples) - 1))]:.1f}" for end, q in QUANTILES.items()}
        rows.append({"provider": provider, **share})
        if device.type == "cuda":
            with backends.backend(contestant.backend):
                rows[-1]["launches"] = gpu_time.launches(contestant.call)
    return rows


def counts(name: str, mode: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of what a GPU would be asked for."""
    make, shape = BLOCKS[name]
    rows = []
    for provider, kernels in {"stock": None, **counted_backends()}.items():
        model = stock_of(name) if kernels is None else make()
        seen = counted(model, shape, dtype, mode, kernels)
        each = {"triton_launches": "triton", "extension_operators": "extension", "pytorch_operators": "pytorch"}
        rows.append({"provider": f"{provider}, counted", **{column: seen[kind] for column, kind in each.items()}})
        rows[-1]["launches"] = seen.total()
    return rows


def run(device: torch.device, dtype: str, repeats: int, results_file: str | None) -> int:
    """Measures, counts where there is no GPU, prints a table, and appends rows; always 0."""
    fixed = {
        "dtype": dtype,
        "device": info.device_name(str(device)),
        **info.provenance("triton"),
    }
    made = []
    for name, (_, shape) in BLOCKS.items():
        for mode in MODES:
            rows = measured(name, mode, device, networks.DTYPES[dtype], repeats)
            if device.type != "cuda":
                rows += counts(name, mode, torch.bfloat16)
            made += [{"op": name, "mode": mode, "shape": "x".join(map(str, shape)), **fixed, **row} for row in rows]
    for row in made:
        if "counted" in row["provider"]:
            row |= {"dtype": "bf16", "device": "meta"}
    shown = ("op", "mode", "provider", *COLUMNS[5:12])
    where = "queued" if device.type == "cuda" else "with the kernels, which run inline: an upper bound"
    print_table(
        f"host time and launches of a block, {dtype}, {fixed['device']}",
        [*shown[:3], "µs", "p20", "p80", "launches", "of Triton", "extension", "PyTorch"],
        [[str(row.get(column, "")) for column in shown] for row in made],
        right=tuple(range(3, 10)),
        caption=f"µs: {where}; counted: for a GPU, nothing was run; an operator may be several launches: a lower bound",
    )
    if results_file is not None:
        bench.append_csv(results_file, made, COLUMNS)
        print(f"rows appended to {results_file}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=networks.DTYPES, default="fp32")
    parser.add_argument("--repeats", type=positive, default=51)
    parser.add_argument("--results-file", metavar="CSV")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    return run(torch.device(options.device), options.dtype, options.repeats, options.results_file)


if __name__ == "__main__":
    sys.exit(main())
