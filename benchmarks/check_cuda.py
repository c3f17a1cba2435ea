"""Whether the CUDA extension's operators are right on this GPU, and however they are launched.

Every operator, in every dtype, layout and kind of shape, is compared with float64: a result has to be as accurate as PyTorch's
formulas in the same dtype (``resnet_fused.testing.assert_as_accurate``), masks and winners have to be the same. A second call,
whose memory was filled with NaN before, has to give the same bits, and so has one on another stream. Then: a ResNet-18's training
step as a CUDA graph, tensors of more than 2**31 elements, and a second GPU where there is one.

With ``--small`` inputs are small and references are computed on the processor, so that few of the kernels that
``compute-sanitizer`` watches are PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cuda_cases import HALF, STOCK, Case, Inputs, algebra, convolutions, folds, passes, pools, short, some_pairs
from torch import Tensor, nn

from resnet_fused import backends, info, models, networks
from resnet_fused.arguments import Parser
from resnet_fused.backends.aten import AtenKernels, layout_of, memory_order
from resnet_fused.backends.cuda import CudaConvolutionKernels, CudaKernels
from resnet_fused.console import UsageError, print_table, progress_bar, warn
from resnet_fused.testing import assert_as_accurate

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# One element; multiples of nothing; octets of channels that are no warp's worth; one pixel.
TAILS = ((1, 1, 1, 1), (2, 17, 5, 3), (3, 24, 7, 9), (4, 40, 1, 1))
# More channels than a block has threads; millions of elements, more than the threads of a GPU take at once: in octets of
# channels, in none, and in many channels.
GRIDS = ((1, 264, 2, 3), (16, 72, 65, 67), (16, 67, 65, 67), (5, 2056, 21, 23))
FILTERS = ((40, 24), (8, 8))  # K, C
LARGE_FILTERS = ((72, 136), (512, 256))
CONVOLUTIONS = (
    (1, 1, 16, 24, 5, 7),
    (1, 2, 24, 72, 9, 6),
    (3, 1, 16, 24, 6, 5),
    (3, 2, 40, 16, 7, 8),
)  # R, stride, C, K, H, W
LARGE_CONVOLUTIONS = (
    (1, 1, 72, 136, 65, 67),
    (1, 2, 136, 72, 65, 67),
    (3, 1, 72, 136, 33, 35),
    (3, 2, 136, 72, 65, 67),
)
GRAPH_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of a gradient: cuDNN's own sums may come in another order
HUGE = (2**13 + 1, 64, 64, 64)  # 2**31 + 2**18 elements
HUGE_IMAGES = (0, 4095, 4096, 8191, 8192)  # its ends, and around 2**30 and 2**31 elements


# Answers


@dataclass(frozen=True)
class Side:
    """Kernels, and the tensors that they get: on ``device``, in float64 if ``wide``, activations ``offset`` elements beyond an
    aligned address."""

    kernels: AtenKernels
    device: torch.device
    wide: bool = False
    offset: int = 0

    def copied(self, value: Any) -> Any:
        """An argument of a case as this side gets it: nothing that a call writes is anybody else's."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.copied, value))
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(self.device)
        if isinstance(value, torch.dtype):
            return torch.float64 if self.wide else value
        if not isinstance(value, Tensor):
            return value
        dtype = torch.float64 if self.wide and value.is_floating_point() else value.dtype
        if not self.offset or value.dim() != 4:
            return value.to(self.device, dtype, copy=True)
        memory = torch.empty(value.numel() + self.offset, dtype=dtype, device=self.device)
        return memory.as_strided(value.shape, value.stride(), self.offset).copy_(value)

    def answers(self, case: Case) -> list[Tensor]:
        """The results of a call, without empty ones."""
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return list(_tensors(case.call(self.kernels, *self.copied(case.arguments))))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.numel():
            yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


def problem(case: Case, found: list[Tensor], stock: list[Tensor], gold: list[Tensor]) -> str:
    """What is wrong with the results ``found``, in a line; "" where nothing is."""
    if not len(found) == len(stock) == len(gold):
        return f"{len(found)} results, {len(stock)} expected"
    for i, (ours, theirs, exact) in enumerate(zip(found, stock, gold)):
        ours, theirs = ours.to(exact.device), theirs.to(exact.device)
        if ours.dim() == 4 and layout_of(ours) != layout_of(theirs):
            return f"result {i}: another memory layout than stock's"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"result {i}: other {'bits' if ours.dtype == torch.uint8 else 'values'} than stock's"
            continue
        # Sums may come out at about 0, and in float64 the reference is no better: there the terms give the scale.
        scale = 16.0 if ours.dtype == torch.float64 else float(ours.dim() < 4)
        try:
            assert_as_accurate(ours, theirs, exact, rows=case.rows, name=f"result {i}", scale=scale)
        except AssertionError as error:
            return str(error)
    return ""


def _bits(t: Tensor) -> Tensor:
    return (memory_order(t) if t.dim() == 4 else t.reshape(-1)).view(torch.uint8)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other))


def poison(like: list[Tensor]) -> None:
    """Leaves NaN (bytes: 255) in memory that the allocator gives to the next tensors like these."""
    filled = [
        torch.full_like(t, float("nan") if t.is_floating_point() else t.dtype != torch.uint8 or 255) for t in like
    ]
    del filled


def on_another_stream(side: Side, case: Case) -> list[Tensor]:
    """Results of a call on a stream that is still busy when the call is made, its inputs being written behind that."""
    stream = torch.cuda.Stream(side.device)
    stream.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)  # clock cycles: longer than a launch takes
        found = side.answers(case)
    stream.synchronize()
    return found


def check(case: Case, ours: Side, reference: torch.device, streams: bool) -> str:
    """What is wrong with a case, in a line; "" where nothing is."""
    found = ours.answers(case)
    wrong = problem(case, found, Side(STOCK, reference).answers(case), Side(STOCK, reference, wide=True).answers(case))
    if wrong:
        return wrong
    poison(found)
    if not same_bits(found, ours.answers(case)):
        return "a second run gives other bits"
    if streams and not same_bits(found, on_another_stream(ours, case)):
        return "another stream gives other bits"
    return ""


# All cases of a dtype


def cases(dtype: torch.dtype, reference: torch.device, small: bool) -> Iterator[tuple[str, Case, int]]:
    """Shape and layout in words, the case, and how far its activations lie from an aligned address."""
    for layout_name, layout in LAYOUTS.items():
        make = Inputs(dtype, layout, reference)
        for shape in TAILS if small else (*TAILS, *GRIDS):
            for kind in (passes, pools):
                for case in kind(make, shape):
                    yield f"{shape} {layout_name}", case, 0
        for case in (*passes(make, TAILS[2]), *pools(make, TAILS[2])):
            yield f"{TAILS[2]} {layout_name}, not aligned", case, 1
    make = Inputs(dtype, torch.channels_last, torch.device("cpu"))  # the same numbers on every machine
    for outputs, channels in FILTERS if small else (*FILTERS, *LARGE_FILTERS):
        for case in algebra(make, outputs, channels):
            yield f"{outputs}×{channels}", case, 0
    yield "", folds(make, some_pairs(dtype)), 0
    if dtype in HALF:
        make = Inputs(dtype, torch.channels_last, reference)
        for shape in CONVOLUTIONS if small else (*CONVOLUTIONS, *LARGE_CONVOLUTIONS):
            for case in convolutions(make, shape, 2 if shape in CONVOLUTIONS else 4):
                yield f"C {shape[2]}, K {shape[3]}, {shape[4]}×{shape[5]}", case, 0


# Beyond single calls


def check_huge(kernels: CudaKernels, device: torch.device) -> list[str]:
    """bn_act and add_relu of bf16 with more than 2**31 elements: some images against the same call on each alone."""
    make, wrong = Inputs(torch.bfloat16, torch.channels_last, device), []
    scale, shift = make.scale(HUGE[1]), make.shift(HUGE[1])
    # Sixteenths within 8 without a copy in another dtype.
    x, other = (
        torch.empty(HUGE, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
        .random_(-128, 129, generator=torch.Generator(device).manual_seed(seed))
        .div_(16)
        for seed in (0, 1)
    )
    calls: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "bn_act": lambda k, a, b: k.bn_act(a, scale.to(a.device), shift.to(a.device), b, True, True),
        "add_relu": lambda k, a, b: k.add_relu(a, b, True),
    }
    bytes_of_image = x[0].numel() // 8
    for name, call in calls.items():
        out, mask = call(kernels, x, other)
        for i in HUGE_IMAGES:
            expected, bits = call(STOCK, x[i : i + 1], other[i : i + 1])
            found = mask[i * bytes_of_image : (i + 1) * bytes_of_image]
            # Sums of sixteenths and 64ths within 32 are exact in float32 and rounded once: there is one right answer.
            if not (torch.equal(out[i : i + 1], expected) and torch.equal(found, bits)):
                wrong.append(f"{name} of {tuple(HUGE)}, bf16: image {i} is wrong")
        del out, mask
    return wrong


def check_graph(backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A training step of ResNet-18, captured once and replayed on two batches, against steps that are not captured."""
    torch.manual_seed(0)
    model = models.BUILDERS["resnet18"](num_classes=10)
    networks.hold_clear_of_kinks(model)
    model = networks.in_layout(model.to(device).train(), torch.channels_last)
    batches = [torch.randn(8, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    target = torch.arange(8, device=device)

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with backends.backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # also the warm-up: what is loaded or chosen may not be captured
            for batch in batches:
                networks.training_step(model, batch, target, dtype)
                expected.append(gradients())
        torch.cuda.current_stream().wait_stream(stream)
        x, graph = batches[0].clone(memory_format=torch.preserve_format), torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            networks.training_step(model, x, target, dtype)
        wrong = []
        for number, (batch, gold) in enumerate(zip(batches, expected)):
            x.copy_(batch)
            graph.replay()
            size = 1e-3 * float(torch.stack([g.double().norm() for g in gold.values()]).square().mean().sqrt())
            found = gradients()
            errors = {name: networks.relative_error(found[name], g, size) for name, g in gold.items()}
            worst = max(errors, key=errors.__getitem__)
            if not errors[worst] <= GRAPH_LIMITS[dtype]:
                wrong.append(f"graph, {short(dtype)}, batch {number}: {worst} is off by {errors[worst]:.1e}")
    return wrong


# The script


def extension(name: str | None) -> tuple[CudaConvolutionKernels, torch.device]:
    """Every operator of backend ``name`` (None: "cuda"), its convolutions too, and the device that it runs on.

    Raises:
        UsageError: there is none here; says why.
    """
    name = name or "cuda"
    if name not in backends.available_backends():
        reason = backends.unavailable_backends().get(
            name, f"no such backend; there are {', '.join(backends.available_backends())}"
        )
        hint = "" if name != "cuda" else "; these checks and timings need an NVIDIA GPU, see README.md"
        raise UsageError(f"backend {name!r}: {reason}{hint}")
    found = backends.get(name)
    if not isinstance(found, CudaKernels):
        raise UsageError(f"backend {name!r} does not consist of the CUDA extension's operators")
    kernels = CudaConvolutionKernels()
    kernels.ops = found.ops
    return kernels, torch.device("cuda", torch.cuda.current_device()) if found.name == "cuda" else torch.device("cpu")


def opened(parser: Parser, backend: str | None) -> tuple[CudaConvolutionKernels, torch.device]:
    """``extension``, whose error ends the program; says so where nothing that follows is about a GPU."""
    try:
        kernels, device = extension(backend)
    except UsageError as error:
        parser.error(str(error))
    if device.type != "cuda":
        print(f"The kernels run by emulation on {info.processor()}: nothing below says anything about a GPU.")
    return kernels, device


def run(
    backend: str,
    dtypes: Sequence[str],
    operators: Sequence[str],
    small: bool,
    kernels: CudaConvolutionKernels,
    device: torch.device,
) -> int:
    """Checks the operators whose names begin with one of ``operators`` (none: all, and what is beyond single calls), and prints
    what is wrong and a summary; 1 when something is, or when nothing was checked."""
    emulated = device.type != "cuda"
    devices = [device]
    if not (small or emulated) and torch.cuda.device_count() > 1:
        devices.append(torch.device("cuda", (device.index + 1) % torch.cuda.device_count()))
    lines: list[list[str]] = []
    wrong: list[str] = []

    def report(label: str, count: int, found: list[str]) -> None:
        lines.append([label, str(count), str(len(found)) if found else "none"])
        wrong.extend(found)
        for line in found:
            warn(f"WRONG: {line}")

    with progress_bar() as progress:
        task = progress.add_task("operators", total=None)
        for here in devices:  # the first is the current one, also while the second works
            reference = torch.device("cpu") if small else here
            for name in dtypes:
                count, found = 0, []
                for where, case, offset in cases(networks.DTYPES[name], reference, small):
                    if operators and not case.name.startswith(tuple(operators)):
                        continue
                    progress.update(task, advance=1, description=f"{name} {case.name}")
                    count += 1
                    try:
                        told = check(case, Side(kernels, here, offset=offset), reference, not (small or emulated))
                    except RuntimeError as error:
                        # Of an operator: the others are still checked, unless the GPU is lost.
                        told = str(error).splitlines()[0]
                        if "CUDA error" in told:
                            raise
                    if told:
                        found.append(f"{case.name} {where}, {name}, on {here}: {told}")
                report(f"{name} on {here}", count, found)
    if emulated or small:
        why = "they need a GPU" if emulated else "left out with --small"
        print(f"Other streams, CUDA graphs, a second GPU, more than 2**31 elements: {why}.")
    elif operators:
        print("CUDA graphs, more than 2**31 elements: left out with --operator.")
    else:
        for dtype in GRAPH_LIMITS:
            try:
                found = check_graph(backend, device, dtype)
            except RuntimeError as error:  # what may not be captured
                found = [f"graph, {short(dtype)}: {str(error).splitlines()[0]}"]
            report(f"training step as a graph, {short(dtype)}", 2, found)
        needed = 3.5 * 2 * torch.Size(HUGE).numel()
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < needed:
            print(f"More than 2**31 elements: left out, {needed / 2**30:.0f} GiB are not free.")
        else:
            report("more than 2**31 elements", 2 * len(HUGE_IMAGES), check_huge(kernels, device))
        if len(devices) == 1:
            print("A second GPU: there is none.")
    print(f"Operators of {backend!r} on {info.device_name(str(device))}, commit {info.commit()}:")
    print_table("against float64", ["", "checks", "wrong"], lines, right=(1,))
    checked = any(count != "0" for _, count, _ in lines)
    if not checked:
        warn("nothing was checked: no operator's name begins so")
    return 0 if checked and not wrong else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=networks.DTYPES, default=list(networks.DTYPES))
    parser.add_argument("--operator", nargs="+", default=[], metavar="NAME", help="only those whose names begin so")
    parser.add_argument("--small", action="store_true", help="small inputs, for compute-sanitizer")
    parser.add_argument("--backend", metavar="NAME", help="a backend of these operators that runs here; default: cuda")
    options = parser.parse_args(argv)
    kernels, device = opened(parser, options.backend)
    return run(options.backend or "cuda", options.dtype, options.operator, options.small, kernels, device)


if __name__ == "__main__":
    sys.exit(main())
