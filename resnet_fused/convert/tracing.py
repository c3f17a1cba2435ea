"""Tracing one module's forward to an fx graph, and refusing whenever the graph would not be the whole truth.

A symbolic trace loses in-place operators, context managers, random draws, side effects and branches on the type of a value.
Each of these is recorded here or makes the trace fail with a reason, so that a graph that comes out can be relied upon.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import dispatch
from .sequential import FusedSequential

CONTAINERS = (nn.Sequential, FusedSequential, nn.ModuleList, nn.ModuleDict, nn.Module)
_TENSOR_MODULES = (nn.Conv2d, nn.ReLU, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_OPAQUE_CALLERS = {
    "torch.utils.checkpoint": "its forward uses activation checkpointing",
    "torch.autograd.function": "its forward calls a custom autograd function",
}


class LeftAlone(Exception):
    """A module is not converted; the message says why."""


@dataclass
class Trace:
    """What a method of a module does: ``graph``, in train and eval alike, given the tensors ``inputs``.

    ``reads`` counts how often it read each attribute of the module, ``calls`` how often it called each child (by id);
    ``tensors`` are the paths of children whose output it took for a Tensor.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    reads: Counter[str]
    calls: Counter[int]
    tensors: set[str]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs a hook of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators (fx would turn ``a += b`` into ``a + b``) and answers isinstance truthfully."""

    _is_param = False

    @property  # type: ignore[misc]
    def __class__(self):  # type: ignore[override]
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(("torch.fx", "resnet_fused")):
            return type(self)
        if self.tracer.returns_tensor(self.node):  # type: ignore[attr-defined]
            return Tensor
        if caller.split(".")[0] == "torch":
            return type(self)
        raise LeftAlone(f"its forward asks for the type of {self.node.name}, which a trace does not know")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


def _ambient() -> tuple[Any, ...]:
    saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch.get_default_dtype(),
        saved_tensor_hooks(True),
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()
        self.tensors: set[str] = set()
        self.ambient = _ambient()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def returns_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            if not returns_tensor(self.root.get_submodule(str(node.target))):
                return False
            self.tensors.add(str(node.target))
            return True
        return node.op == "placeholder"

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_inlined(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.calls[id(m)] += 1
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call"):
            if _ambient() != self.ambient:
                raise LeftAlone("its forward changes grad mode, autocast or saved-tensor hooks in a context manager")
            frame = sys._getframe(1)
            while frame is not None and frame.f_code is not _trace_once.__code__:
                reason = _OPAQUE_CALLERS.get(frame.f_globals.get("__name__", ""))
                if reason:
                    raise LeftAlone(reason)
                frame = frame.f_back  # type: ignore[assignment]
        return super().create_node(kind, *args, **kwargs)


def returns_tensor(module: nn.Module) -> bool:
    """Whether calling ``module`` gives a Tensor: by its type, or by that of the last child of a Sequential."""
    if type(module) in (nn.Sequential, FusedSequential):
        return len(module) > 0 and returns_tensor(module[-1])  # type: ignore[arg-type,index]
    return (
        type(module) in _TENSOR_MODULES
        or dispatch.is_batch_norm(module)
        or getattr(type(module), "_returns_tensor", False)
    )


def is_inlined(module: nn.Module) -> bool:
    """Whether a trace looks inside ``module``: a Sequential without hooks with a convolution or batch norm in it."""
    if type(module) not in (nn.Sequential, FusedSequential) or has_hooks(module):
        return False
    children = module.children()
    return any(type(m) is nn.Conv2d or dispatch.is_batch_norm(m) or is_inlined(m) for m in children)


def _required_inputs(function: Callable[..., Any]) -> tuple[str, ...]:
    names = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.kind == parameter.KEYWORD_ONLY:
            raise LeftAlone(f"its forward requires the keyword {parameter.name!r}")
        names.append(parameter.name)
    if not names:
        raise LeftAlone("its forward has no required argument")
    return tuple(names)


def _recording_class(
    cls: type[nn.Module], method: str, inputs: tuple[str, ...], reads: Counter[str]
) -> type[nn.Module]:
    """A subclass of ``cls`` that counts attribute reads and whose forward is ``method`` with the required arguments only."""
    arguments = ", ".join(("self", *inputs))
    namespace: dict[str, Any] = {"_forward": getattr(cls, method)}
    exec(f"def forward({arguments}):\n    return _forward({arguments})\n", namespace)

    class Recorder:
        def __init_subclass__(cls) -> None:
            pass  # not the user's: it may register classes

        def __getattribute__(self, name: str) -> Any:
            reads[name] += 1
            return super().__getattribute__(name)

    return type(cls)(cls.__name__, (Recorder, cls), {"forward": namespace["forward"], "__module__": cls.__module__})  # type: ignore[misc]


class _Snapshot:
    """The attributes of all modules in a tree, and the state of the random generators: what a pure forward leaves as it is."""

    def __init__(self, root: nn.Module) -> None:
        self.attributes = [
            (m, dict(m.__dict__), {k: v.copy() for k, v in m.__dict__.items() if isinstance(v, (list, dict, set))})
            for m in root.modules()
        ]
        self.random = self._random()

    @staticmethod
    def _random() -> list[Any]:
        state = [torch.get_rng_state(), random.getstate()]
        if "numpy" in sys.modules:
            kind, keys, *position = sys.modules["numpy"].random.get_state()
            state.append((kind, keys.tobytes(), *position))
        if torch.cuda.is_initialized():
            state.append(torch.cuda.get_rng_state())
        return state

    @staticmethod
    def _same(now: Any, before: Any) -> bool:
        if isinstance(before, dict):
            return now.keys() == before.keys() and all(now[k] is before[k] for k in before)
        return len(now) == len(before) and all(a is b for a, b in zip(now, before))

    def restore(self) -> str | None:
        """Put the attributes back; says what had changed, if anything."""
        changed = None
        for module, attributes, contents in self.attributes:
            now = module.__dict__
            if not self._same(now, attributes) or not all(self._same(now[k], v) for k, v in contents.items()):
                names = {k for k in now.keys() | attributes.keys() if now.get(k) is not attributes.get(k)}
                names |= {k for k, v in contents.items() if k in now and not self._same(now[k], v)}
                changed = f"its forward changes attributes ({', '.join(sorted(names))})"
                now.clear()
                now.update(attributes)
                for name, before in contents.items():
                    now[name].clear()
                    now[name].extend(before) if isinstance(before, list) else now[name].update(before)
        pairs = zip(self._random(), self.random, strict=True)
        if changed is None and not all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs):
            changed = "its forward draws random numbers outside the graph"
        return changed


def _trace_once(module: nn.Module, training: bool) -> _Tracer:
    for child in module.modules():
        child.training = training
    tracer = _Tracer()
    tracer.traced = tracer.trace(module)  # type: ignore[attr-defined]
    return tracer


def _outline(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph as comparable data."""
    return [(n.op, n.target, n.name, repr(n.args), repr(n.kwargs)) for n in graph.nodes]


def trace(module: nn.Module, method: str = "forward") -> Trace:
    """Trace ``module.forward``, or another method of tensors, in train and eval mode, with and without gradients.

    Raises:
        LeftAlone: the forward cannot be traced, or its graph would not be the whole truth.
    """
    cls = type(module)
    if method in module.__dict__:
        raise LeftAlone(f"its {method} is replaced on the instance")
    inputs = _required_inputs(getattr(cls, method))
    reads: Counter[str] = Counter()
    flags = [(child, child.training) for child in module.modules()]
    result: Trace | None = None
    try:
        recording = _recording_class(cls, method, inputs, reads)
        for training, grad in ((True, True), (True, False), (False, True), (False, False)):
            for child, _ in flags:
                child.training = training
            snapshot, changed = _Snapshot(module), None
            reads.clear()
            try:
                module.__class__ = recording
                with torch.set_grad_enabled(grad):
                    tracer = _trace_once(module, training)
            finally:
                module.__class__ = cls
                counted = Counter(reads)
                changed = snapshot.restore()
            if changed:
                raise LeftAlone(changed)
            graph: fx.Graph = tracer.traced  # type: ignore[attr-defined]
            if result is None:
                result = Trace(graph, inputs, counted, tracer.calls, tracer.tensors)
            elif _outline(graph) != _outline(result.graph):
                raise LeftAlone("its forward differs between train and eval, or with and without gradients")
            result.reads |= counted
            result.tensors |= tracer.tensors
    except LeftAlone:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise LeftAlone(f"its forward cannot be traced: {type(error).__name__}: {text[0] if text else ''}") from error
    finally:
        for child, training in flags:
            child.training = training
    assert result is not None
    return result
