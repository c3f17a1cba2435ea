"""Calls recorded once as CUDA graphs and replayed: the host starts all of their kernels at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .dispatch import transforms_active

MOST_GRAPHS = 8
WARM_UP = 3

T = TypeVar("T")

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)
_one_at_a_time = threading.Lock()  # PyTorch records one graph at a time in a process


def is_recording() -> bool:
    """Whether launches on the current stream go into a graph: nothing may then be made that outlives it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Recorder:
    """Records what calls launch on ``device``. Its graphs share memory, so that only one of them may run at a time (``turn``)."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Calls on a side stream: what compiles, chooses an algorithm or makes tensors that stay must not be recorded."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What launches again all that ``call`` launched, and where it leaves its results."""
        graph = torch.cuda.CUDAGraph()
        recording: Any = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        # A recording that fails leaves its stream current, and only the outer context puts the caller's back.
        with _one_at_a_time, torch.cuda.device(self._device), torch.cuda.stream(self._stream), recording:
            result = call()
        return graph.replay, result

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched inside waits for the turn before, on whatever streams the two are."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def finish(self) -> None:
        """Waits for the last turn."""
        self._done.synchronize()


@dataclass(frozen=True)
class _Recorded:
    """A graph, the tensors it reads and the results it writes."""

    replay: Callable[[], None]
    inputs: Sequence[Tensor]
    result: Any
    recorder: Recorder

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        with torch.no_grad(), self.recorder.turn():
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            self.replay()
            return tree_map_only(Tensor, torch.clone, self.result)


def _outside_inference_mode() -> AbstractContextManager:
    """Tensors made in inference mode could not be written by a later call outside of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Graphs:
    """Calls of ``function``: each kind of arguments is recorded once and replayed from then on.

    Kinds differ in the structure of the arguments, in shapes, strides, dtypes and devices of tensors, and in other values;
    the last ``most`` stay. Results are copies. ``function`` runs without a graph where arguments are not all dense tensors of
    one GPU and plain values, where it returns anything but tensors and such values, where a graph is being recorded already,
    and where something watches the calls (torch.compile, fx, jit, functorch, a dispatch mode).

    Args:
        function: launches the same kernels for the same kind of arguments, and never waits for a GPU.
        state: where its answer changes, all graphs are forgotten: say, the addresses of weights.
        recorder: the class that records.
    Raises (when called):
        RuntimeError: ``function`` cannot be recorded: says why. What it raises without recording passes as it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        state: Callable[[], list[Any]] = list,
        most: int = MOST_GRAPHS,
        recorder: type[Recorder] = Recorder,
    ) -> None:
        self._function, self._state, self._most, self._recorder = function, state, most, recorder
        self._lock = threading.Lock()
        self._recorders: dict[torch.device, Recorder] = {}
        self._recorded: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        self._state_then: list[Any] = []

    def __call__(self, args: tuple, kwargs: dict[str, Any], setting: Hashable = ()) -> Any:
        """``function(*args, **kwargs)``. ``setting``: on what else the launches depend."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._takes(leaves, tensors):
            return self._function(*args, **kwargs)
        kind = structure, setting, tuple(map(_kind, leaves))
        with self._lock:
            if self._recorded and self._state() != self._state_then:
                self._forget()
            if kind in self._recorded:
                self._recorded.move_to_end(kind)
            else:
                self._recorded[kind] = self._record(leaves, structure)
                self._state_then = self._state()
                if len(self._recorded) > self._most:
                    self._recorded.popitem(last=False)
            found = self._recorded[kind]
            if found is not None:
                return found(tensors)
        return self._function(*args, **kwargs)

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        for recorder in self._recorders.values():
            recorder.finish()
        self._recorded.clear()
        self._recorders.clear()

    def _takes(self, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        if not tensors or tensors[0].device.type != self._recorder.device_type:
            return False
        fits = all(
            type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.device == tensors[0].device
            for t in tensors
        )
        plain = all(isinstance(leaf, Tensor) or type(leaf) in _VALUES for leaf in leaves)
        watched = torch._C._len_torch_dispatch_stack() > 0 or transforms_active(tensors[0])
        return fits and plain and not watched and not is_recording()

    def _record(self, leaves: Sequence[Any], structure: Any) -> _Recorded | None:
        """A graph for arguments like these; None where the results could not be copied."""
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        recorder = self._recorders.get(device) or self._recorders.setdefault(device, self._recorder(device))
        with torch.no_grad(), _outside_inference_mode():
            own = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(own, structure)

            def call() -> Any:
                return self._function(*args, **kwargs)

            with recorder.turn():
                recorder.warm_up(call)
            try:
                replay, result = recorder.record(call)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise RuntimeError(f"the call cannot be recorded as a CUDA graph: {error}") from error
        if not all(isinstance(leaf, Tensor) or type(leaf) in _VALUES for leaf in tree_leaves(result)):
            return None
        return _Recorded(replay, [t for t in own if isinstance(t, Tensor)], result, recorder)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), repr(leaf)  # of 1, 1.0 and True, which are equal, and of NaN, which is not


def captured(
    step: Callable[..., T], module: nn.Module, *inputs: Tensor, recorder: type[Recorder] = Recorder
) -> Callable[..., T]:
    """A training step as one graph.

    ``step(*inputs)`` runs forward and backward of ``module``, and may run an optimizer that can be recorded. It is called
    ``WARM_UP`` times first, and what that changes (running statistics, parameters under an optimizer) stays changed.

    Args:
        inputs: tensors of one GPU, like those of every later step.
    Returns:
        A function of as many tensors, which runs a step on them. Gradients are None before each backward, so it writes them
        anew; results and gradients are the same tensors every time, overwritten by the next step.
    Raises:
        ValueError (by the function): a tensor of another shape, dtype or device.
    """
    made = recorder(inputs[0].device)
    own = [t.detach().clone() for t in inputs]

    def call() -> T:
        module.zero_grad(set_to_none=True)
        return step(*own)

    made.warm_up(call)
    replay, result = made.record(call)
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]

    def run(*given: Tensor) -> T:
        for i, (mine, t) in enumerate(zip(own, given, strict=True)):
            if (t.shape, t.dtype, t.device) != (mine.shape, mine.dtype, mine.device):
                expected, came = (f"{tuple(of.shape)} {of.dtype} on {of.device}" for of in (mine, t))
                raise ValueError(f"input {i}: expected {expected}, as recorded, got {came}")
        with torch.no_grad():
            for mine, t in zip(own, given, strict=True):
                mine.copy_(t)
        replay()
        for parameter, gradient in gradients:  # also where they were set to None since
            parameter.grad = gradient
        return result

    return run
