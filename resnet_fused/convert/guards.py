"""The condition under which a traced graph still is what the module's forward would do, as Python source.

Source rather than data: it costs about a microsecond per call and torch.compile reads through it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .sequential import FusedSequential
from .tracing import CONTAINERS, LeftAlone, Trace, is_inlined

_INTERNAL = frozenset(nn.Module().__dict__)
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def access(path: str, start: str = "self") -> str:
    """The expression that reads a dotted path."""
    for name in path.split("."):
        start = f"{start}.{name}" if name.isidentifier() else f"getattr({start}, {name!r})"
    return start


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_simple(item) for item in value)
    if isinstance(value, dict):
        return all(_is_simple(item) for pair in value.items() for item in pair)
    return isinstance(value, _SIMPLE)


class Guard:
    """Conditions in ``source``, which refer to ``self``, to its class before fusing, ``_Stock``, and to names in ``constants``.

    ``replaced`` names the methods that the fused class overrides.
    """

    def __init__(self, module: nn.Module, trace: Trace, skipped: Iterable[str], replaced: Iterable[str] = ()) -> None:
        self.conditions: dict[str, None] = {}
        self.constants: dict[str, Any] = {}
        self.replaced = frozenset(replaced)
        self._check_paths(module, trace)
        for name, count in sorted(trace.reads.items()):
            if name not in _INTERNAL and not name.startswith("__") and not hasattr(nn.Module, name):
                self._attribute(module, name, count, trace)
        walks_children = trace.reads["children"] or trace.reads["named_children"]
        if walks_children or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            self._require(f"tuple(self._modules) == {tuple(module._modules)!r}")
        for path in sorted(trace.tensors):
            self._tensor(access(path), module.get_submodule(path))
        for path in skipped:
            self._type(access(path), nn.Identity)
            self._no_hooks(access(path))

    @property
    def source(self) -> str:
        return " and ".join(self.conditions) or "True"

    def _require(self, condition: str) -> None:
        self.conditions.setdefault(condition)

    def _constant(self, value: Any) -> str:
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"_constant{len(self.constants)}"
        self.constants[name] = value
        return name

    @staticmethod
    def _check_paths(module: nn.Module, trace: Trace) -> None:
        for node in trace.graph.nodes:
            path = str(node.target).split(".")[:-1] if node.op == "call_module" else []
            for end in range(1, len(path) + 1):
                prefix = ".".join(path[:end])
                if type(module.get_submodule(prefix)) not in CONTAINERS:
                    raise LeftAlone(f"its forward reaches inside its child {prefix!r}")

    def _attribute(self, module: nn.Module, name: str, count: int, trace: Trace) -> None:
        expression = f"self.{name}"
        if name in module.__dict__:
            self._value(expression, name, module.__dict__[name])
        elif name in module._modules:
            child = module._modules[name]
            if child is None:
                self._require(f"{expression} is None")
            elif is_inlined(child) or trace.calls[id(child)] < count:
                self._child(expression, child)
        elif name in module._parameters or name in module._buffers:
            missing = getattr(module, name) is None
            self._require(f"{expression} is {'' if missing else 'not '}None")
        elif not hasattr(module, name):
            self._require(f"not hasattr(self, {name!r})")
        else:
            value = inspect.getattr_static(type(module), name)
            if name in self.replaced:
                self._require(f"{name!r} not in self.__dict__ and _Stock.{name} is {self._constant(value)}")
            elif inspect.isfunction(value):
                self._require(f"{expression}.__func__ is {self._constant(value)}")
            elif not isinstance(value, (property, classmethod, staticmethod)):
                self._value(expression, name, value)

    def _value(self, expression: str, name: str, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self._require(f"{expression} is {value}")
        elif isinstance(value, (int, str)):
            self._require(f"{expression} == {value!r}")
        elif _is_simple(value):
            self._require(f"{expression} == {self._constant(copy.deepcopy(value))}")
        elif inspect.isroutine(value) or inspect.isclass(value):
            self._require(f"{expression} is {self._constant(value)}")
        else:
            raise LeftAlone(f"its forward reads {name!r} ({type(value).__name__}), which could change unnoticed")

    def _type(self, expression: str, cls: type) -> None:
        self._require(f"type({expression}) is {self._constant(cls)}")

    def _no_hooks(self, expression: str) -> None:
        self._require("not (" + " or ".join(f"{expression}.{hooks}" for hooks in _HOOKS) + ")")

    def _kind(self, expression: str, child: nn.Module) -> None:
        if type(child) in (nn.Sequential, FusedSequential):
            stock, fused = self._constant(nn.Sequential), self._constant(FusedSequential)
            self._require(f"(type({expression}) is {stock} or type({expression}) is {fused})")
        else:
            self._type(expression, type(child))

    def _tensor(self, expression: str, child: nn.Module) -> None:
        """The forward asked whether the output of this child is a Tensor."""
        self._kind(expression, child)
        if isinstance(child, nn.Sequential):
            self._require(f"tuple({expression}._modules) == {tuple(child._modules)!r}")
            self._tensor(access(next(reversed(child._modules)), expression), child[-1])

    def _child(self, expression: str, child: nn.Module) -> None:
        """The forward looked at this child beyond calling it, or the trace looked inside."""
        self._kind(expression, child)
        if type(child) in CONTAINERS:
            self._require(f"tuple({expression}._modules) == {tuple(child._modules)!r}")
            for name, grandchild in child._modules.items():
                if grandchild is None:
                    self._require(f"{access(name, expression)} is None")
                elif is_inlined(grandchild):
                    self._child(access(name, expression), grandchild)
                elif not isinstance(child, nn.Sequential):
                    self._type(access(name, expression), type(grandchild))
            if is_inlined(child):
                self._no_hooks(expression)
            return
        for name, value in child.__dict__.items():
            if name not in _INTERNAL and _is_simple(value):
                self._value(f"{expression}.{name}", name, value)
