"""What a node of a traced graph computes, and who can see its value."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn import functional as F

from .. import dispatch
from .sequential import is_stem_pool

_RELU_FUNCTIONS = {F.relu: False, torch.relu: False, F.relu_: True, torch.relu_: True}
_ADD_FUNCTIONS = {operator.add: False, torch.add: False, operator.iadd: True}
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)
_PURE_MODULES = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class DataFlow:
    """Questions about the graph of ``root.forward``."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.module: dict[Node, nn.Module] = {
            node: root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
        }
        self.calls = Counter(id(module) for module in self.module.values())

    # What a node is

    def _is_pure(self, node: Node) -> bool:
        module = self.module.get(node)
        return type(module) in _PURE_MODULES or dispatch.is_batch_norm(module)

    def _plain_call(self, node: Node) -> bool:
        return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs

    def _is_module(self, node: Node, kind: type[nn.Module]) -> bool:
        return type(self.module.get(node)) is kind and self._plain_call(node)

    def _relu(self, node: Node) -> tuple[Node, bool] | None:
        """(operand, in place?) when ``node`` is a ReLU."""
        if self._is_module(node, nn.ReLU):
            return node.args[0], bool(self.module[node].inplace)  # type: ignore[return-value]
        if not node.args or not isinstance(node.args[0], Node):
            return None
        if node.op == "call_method" and node.target in ("relu", "relu_") and self._plain_call(node):
            return node.args[0], node.target == "relu_"
        if node.op == "call_function" and node.target in _RELU_FUNCTIONS:
            flags = [*node.args[1:], *node.kwargs.values()]
            if all(isinstance(flag, bool) for flag in flags) and len(flags) <= 1 and set(node.kwargs) <= {"inplace"}:
                return node.args[0], _RELU_FUNCTIONS[node.target] or any(flags)  # type: ignore[index]
        return None

    def _add(self, node: Node) -> tuple[Node, Node, bool] | None:
        """(a, b, in place?) when ``node`` is a + b of two different values."""
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) for a in node.args):
            return None
        a, b = node.args
        if a is b:
            return None
        if node.op == "call_function" and node.target in _ADD_FUNCTIONS:
            return a, b, _ADD_FUNCTIONS[node.target]  # type: ignore[index,return-value]
        if node.op == "call_method" and node.target in ("add", "add_"):
            return a, b, node.target == "add_"  # type: ignore[return-value]
        return None

    def _is_stem_pool(self, node: Node) -> bool:
        if node in self.module:
            return self._plain_call(node) and is_stem_pool(self.module[node])
        if node.op != "call_function" or node.target not in _POOL_FUNCTIONS:
            return False
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        sizes = [given.get(n, 1 if n == "dilation" else None) for n in names[1:5]]
        flags = [given.get(n, False) for n in names[5:]]
        want = (3, 2, 1, 1)
        return (
            all(s in (w, (w, w), [w, w]) for s, w in zip(sizes, want)) and not any(flags) and set(given) <= set(names)
        )

    # How values flow

    def _source(self, node: Node, passed: set[Node]) -> Node:
        """The value behind identities; adds those to ``passed``."""
        while self._is_module(node, nn.Identity):
            passed.add(node)
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _sole_user(self, node: Node, passed: set[Node]) -> Node | None:
        """The only user of a value, beyond identities; adds those to ``passed``. None when there are several."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self._is_module(user, nn.Identity):
                return user
            passed.add(user)
            node = user
        return None

    def _is_private(self, node: Node) -> bool:
        """Whether no one but the only user of ``node`` can see this memory: writing to it in place is unobservable."""
        if len(node.users) != 1:
            return False
        if self._is_pure(node):
            return True
        for operation in (self._relu(node), self._add(node)):
            if operation is not None:
                return self._is_private(operation[0]) if operation[-1] else True
        inputs = node.all_input_nodes
        return node.op == "call_module" and bool(inputs) and all(self._is_private(value) for value in inputs)

    def _is_tensor(self, node: Node) -> bool:
        return node.op in ("placeholder", "call_module") or bool(self._relu(node) or self._add(node))

    def _harmless(self, node: Node) -> bool:
        """Whether ``node`` may run before operations that preceded it: it changes no value that others see."""
        if node.op in ("placeholder", "get_attr") or self._is_module(node, nn.Identity):
            return True
        if self._is_pure(node):
            return True
        for operation in (self._relu(node), self._add(node)):
            if operation is not None:
                return self._is_private(operation[0]) if operation[-1] else True
        return False
