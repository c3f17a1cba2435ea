"""Whether whole networks behave on a GPU as stock PyTorch does, whatever surrounds them.

Training and inference as CUDA graphs, other streams, torch.compile, autocast with a GradScaler, TF32, deterministic mode, memory,
inputs of any layout and number of channels, PyTorch without cuDNN, a second GPU, and processes in which a backend is asked for
that may not be there. Every check runs on every backend of the device, and under ``auto``, which follows the measured routes.
``check_cuda.py`` checks the operators one by one.

On a processor (``--device cpu``) what has a meaning there runs, so that no minute on a GPU is lost to a mistake in a check.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from step_answers import Wrong, as_accurate, copied, one_step, same_bits, state, worst_share
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from resnet_fused import backends, info, networks, optimize_for_inference
from resnet_fused.arguments import Parser, device_name, one_of
from resnet_fused.console import print_table, progress_bar, warn

BITS = "the same bits"


class LeftOut(Exception):
    """Why a check says nothing here."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and how large their inputs are."""

    device: torch.device
    small: bool

    @property
    def model(self) -> str:
        return "resnet18" if self.small else "resnet50"

    def network(self, fused: bool = True, clear: bool = True) -> nn.Module:
        """The same values at each call; with every ReLU ``clear`` of its kink, or as they are to be trained."""
        torch.manual_seed(0)
        source = networks.stock_model(self.model, 10)
        if clear:
            networks.hold_clear_of_kinks(source)
        made = networks.copy_of(self.model, source.state_dict(), 10, fused=fused) if fused else source
        return networks.in_layout(made.to(self.device), torch.channels_last).train()

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        count, size = (4, 32) if self.small else (16, 96)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 3, size, size, generator=generator)
        target = torch.randint(10, (count,), generator=generator)
        return x.to(self.device, memory_format=torch.channels_last), target.to(self.device)

    def needs_gpu(self, why: str) -> None:
        if self.device.type != "cuda":
            raise LeftOut(why)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def on_side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of a CUDA graph of ``call``, and the tensors in which its results will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


# The checks: each returns what it saw in a few words, or raises


def training_graph(s: Setting) -> str:
    """Steps with SGD, replayed on three batches, against the same steps without a graph."""
    s.needs_gpu("CUDA graphs need a GPU")
    with deterministic_convolutions():
        eager, model = s.network(), s.network()
        optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (eager, model)]
        x, target = s.batch()
        before = copied(model.state_dict())
        with on_side_stream():  # what is loaded or chosen at the first call may not be captured
            for _ in range(3):
                step(model, optimizers[1], x, target)
        replay, _ = captured(lambda: step(model, optimizers[1], x, target))
        model.load_state_dict(before)
        for buffers in optimizers[1].state.values():
            buffers["momentum_buffer"].zero_()
        for seed in range(3):
            images, labels = s.batch(seed)
            x.copy_(images)
            target.copy_(labels)
            replay()
            step(eager, optimizers[0], images, labels)
            same_bits(state(model), state(eager), f"replay {seed + 1}")
    return f"{BITS} in three replays"


def inference_graph(s: Setting) -> str:
    """The network in eval mode, and optimised for inference, captured and replayed on two batches."""
    s.needs_gpu("CUDA graphs need a GPU")
    with deterministic_convolutions(), torch.no_grad():
        for name, model in (("eval", s.network().eval()), ("optimised", optimize_for_inference(s.network()))):
            x, _ = s.batch()
            with on_side_stream():
                model(x)
            replay, out = captured(functools.partial(model, x))
            for seed in (1, 2):
                x.copy_(s.batch(seed)[0])
                replay()
                same_bits({"logits": out}, {"logits": model(x)}, name)
    return BITS


def side_stream(s: Setting) -> str:
    """A step on a stream that still waits for its inputs, while the default stream is free."""
    s.needs_gpu("streams are a GPU's")
    with deterministic_convolutions():
        found = []
        for busy in (False, True):
            model = s.network()
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            images, target = s.batch()
            x = torch.zeros_like(images)
            torch.cuda.synchronize()
            stream = torch.cuda.Stream() if busy else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000 if busy else 0)  # clock cycles: longer than the launches of a step take
                x.copy_(images)
                step(model, optimizer, x, target)
            stream.synchronize()
            found.append(copied(state(model)))
    same_bits(found[1], found[0], "on a busy stream")
    return BITS


def compiled(s: Setting) -> str:
    """Forward and backward through torch.compile, without a break of the graph; on a processor of one stage, not lowered."""
    on_gpu = s.device.type == "cuda"
    eager, model = s.network(), s.network()
    x, _ = s.batch()
    if not on_gpu:
        eager, model = (m.get_submodule("layer2") for m in (eager, model))
        x = x.repeat(1, eager[0].conv1.in_channels // 3 + 1, 1, 1)[:, : eager[0].conv1.in_channels]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if on_gpu else "eager")
    outs = [m(x) for m in (torch.compile(model, fullgraph=True, backend=counter), eager)]
    for out in outs:
        out.square().mean().backward()
    found, expected = (state(m) | {"out": out.detach()} for m, out in zip((model, eager), outs))
    size = 1e-3 * max(float(t.norm()) for name, t in expected.items() if name.startswith("gradient"))
    for name, t in expected.items():
        if t.is_floating_point() and not networks.relative_error(found[name], t, size) <= 1e-2:
            raise Wrong(f"{name} is not as without torch.compile")
    units = counter.graphs[0].code.count("torch.ops.resnet_fused.chain(") if counter.graphs else 0
    if backends.current() != "auto" and not units:
        raise Wrong("no fused operator in the graph")
    if counter.frame_count != 1:
        raise Wrong(f"{counter.frame_count} graphs")
    return f"one graph, {units} fused units"


def autocast(s: Setting) -> str:
    """Steps on one batch in bf16, and in fp16 with a GradScaler: the loss stays finite and falls."""
    told, steps = [], 4 if s.small else 12
    for dtype in (torch.bfloat16, torch.float16):
        model = s.network(clear=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
        scaler = torch.amp.GradScaler(s.device.type, init_scale=256, enabled=dtype == torch.float16)
        x, target = s.batch()
        losses = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(s.device.type, dtype):
                loss = F.cross_entropy(model(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        if not all(map(torch.isfinite, torch.tensor(losses))) or not losses[-1] < losses[0]:
            raise Wrong(f"{dtype}: losses {', '.join(f'{loss:.3f}' for loss in losses)}")
        told.append(f"{str(dtype)[6:]} {losses[0]:.2f} → {losses[-1]:.2f}")
    return ", ".join(told)


def tf32(s: Setting) -> str:
    """fp32 with and without TF32 in convolutions: as accurate as stock under the same setting."""
    s.needs_gpu("a processor has no TF32")
    x, target = s.batch()
    gold = one_step(networks.double_copy(s.network(fused=False)), x.double(), target)
    told, before = [], torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            ours, stock = (one_step(s.network(fused), x, target) for fused in (True, False))
            other = one_step(networks.in_layout(s.network(False), torch.contiguous_format), x.contiguous(), target)
            share = as_accurate(ours, (stock, other), gold, torch.float32, precision)
            told.append(f"{precision} {share:.2f} of the limit")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    return ", ".join(told)


def deterministic(s: Setting) -> str:
    """Two steps under ``torch.use_deterministic_algorithms``, each from the start, and once more after other work."""
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(3):
            found.append(one_step(s.network(), *s.batch()))
            one_step(s.network(), *s.batch(7))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        same_bits(other, found[0], "another run")
    return f"{BITS} in three runs"


def memory(s: Setting) -> str:
    """What the caching allocator has handed out is after ten steps what it was after three."""
    s.needs_gpu("PyTorch counts no memory of a processor")
    model = s.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, target = s.batch()
    allocated = []
    for steps in (3, 7):
        for _ in range(steps):
            step(model, optimizer, x, target)
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated(s.device))
    if allocated[0] != allocated[1]:
        raise Wrong(f"{allocated[1] - allocated[0]:+,} bytes after seven steps")
    return f"{allocated[0] / 2**20:.0f} MiB, no byte more"


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def odd_inputs(s: Setting) -> str:
    """17 and 35 channels, odd extents, contiguous and channels_last, fp64 to fp16, training and eval, beside stock modules."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return f"{worst_share(s.device, DTYPES[: 2 if s.small else None]):.2f} of the limit"


def without_cudnn(s: Setting) -> str:
    s.needs_gpu("cuDNN is a GPU's")
    with torch.backends.cudnn.flags(enabled=False):
        return f"{worst_share(s.device, (torch.float32, torch.bfloat16)):.2f} of the limit"


def second_gpu(s: Setting) -> str:
    """Tensors on another GPU than the current one."""
    s.needs_gpu("there is no GPU")
    if torch.cuda.device_count() < 2:
        raise LeftOut("there is one GPU")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return f"{worst_share(other, (torch.float32, torch.bfloat16)):.2f} of the limit"


def ladder(s: Setting) -> str:
    """Processes with RESNET_FUSED_BACKEND set: the same answers where the backend is there, else its reason as an error."""
    told = []
    for name in ("aten", "cuda", "triton"):
        arguments = ["--device", str(s.device), "--only", "odd inputs", "--backend", ENVIRONMENT]
        done = subprocess.run(
            [sys.executable, __file__, *arguments, *(["--small"] if s.small else [])],
            env=os.environ | {backends.ENVIRONMENT_VARIABLE: name},
            capture_output=True,
            text=True,
        )
        reason = backends.unavailable_backends().get(name)
        if reason is None and done.returncode != 0:
            raise Wrong(f"{name}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        if reason is not None and (done.returncode == 0 or reason.splitlines()[0] not in done.stderr):
            raise Wrong(f"{name}, which is not there, ended with {done.returncode} and without its reason")
        told.append(f"{name} {'ran' if reason is None else 'said why not'}")
    return ", ".join(told)


CHECKS: dict[str, Callable[[Setting], str]] = {
    "odd inputs": odd_inputs,
    "training as a graph": training_graph,
    "inference as a graph": inference_graph,
    "side stream": side_stream,
    "torch.compile": compiled,
    "autocast": autocast,
    "TF32": tf32,
    "deterministic": deterministic,
    "memory": memory,
    "without cuDNN": without_cudnn,
    "second GPU": second_gpu,
    "fall-back ladder": ladder,
}
ONCE = ("fall-back ladder",)  # chooses its backends itself
ENVIRONMENT = "environment"  # as a name of a backend: whatever is chosen already


# The script


def outcome(check: Callable[[Setting], str], setting: Setting, backend: str) -> tuple[str, str]:
    """("ok", "FAILED" or "left out", and what was seen)."""
    try:
        with backends.backend(backends.current() if backend == ENVIRONMENT else backend):
            return "ok", check(setting)
    except LeftOut as reason:
        return "left out", str(reason)
    except Wrong as problem:
        return "FAILED", str(problem)
    except Exception as error:  # whatever a library raises: the other checks still run
        lines = str(error).strip().splitlines() or ["no message"]
        return "FAILED", f"{type(error).__name__}: {lines[0]}"


def run(names: Sequence[str], chosen: Sequence[str], setting: Setting) -> int:
    """Runs the checks on each backend, prints a table; 1 when one failed."""
    todo = [(name, backend) for name in names for backend in (chosen if name not in ONCE else chosen[:1])]
    rows: list[list[str]] = []
    with progress_bar() as progress:
        task = progress.add_task("checks", total=len(todo))
        for name, backend in todo:
            progress.update(task, description=f"{name}, {backend}")
            state, told = outcome(CHECKS[name], setting, backend)
            rows.append([name, "" if name in ONCE else backend, state, told])
            progress.advance(task)
            if state == "FAILED":
                warn(f"FAILED: {name}, {backend}: {told}")
            if "CUDA error" in told:  # the context is lost, and with it every check that follows
                break
    styles: list[Any] = [{"FAILED": "red", "left out": "dim"}.get(row[2]) for row in rows]
    where = f"{info.device_name(str(setting.device))}, {setting.model}, commit {info.commit() or 'none'}"
    print_table(f"behaviour on {where}", ["check", "backend", "", ""], rows, styles=styles)
    failed, missing = sum(row[2] == "FAILED" for row in rows), len(todo) - len(rows)
    print(f"{sum(row[2] == 'ok' for row in rows)} ok, {failed} FAILED" + (f", {missing} not run" if missing else ""))
    return 1 if failed else 0


def backends_of(device: torch.device) -> list[str]:
    """``auto``, and those with kernels for the device."""
    own = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    return ["auto", *(name for name in own if name in backends.available_backends())]


def main(argv: Sequence[str] | None = None) -> int:
    # cuBLAS asks for it in deterministic mode, and reads it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="ResNet-18 on small images, fewer dtypes")
    parser.add_argument("--only", nargs="+", type=one_of("check", list(CHECKS)), default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="default: auto, and all that the device has")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    there = ["auto", *backends.available_backends(), ENVIRONMENT]
    for name in options.backend or ():
        if name not in there:
            parser.error(f"--backend: expected some of {', '.join(there)}, got {name!r}")
    return run(options.only, options.backend or backends_of(device), Setting(device, options.small))


if __name__ == "__main__":
    sys.exit(main())
