"""Finding convolutions and what follows them in a traced graph, by data flow; each becomes a call of a FoldedConv2d."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn import functional as F

from . import dispatch
from .folded import Folded, FoldedConv2d, fold, fold_all, is_finite
from .norms import BNAddReLU2d, BNReLU2d

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_MUTATORS = {getattr(operator, name) for name in _IN_PLACE_OPERATORS} | {operator.setitem}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Proxy(fx.Proxy):
    """Records in-place operators, which fx would turn into out-of-place ones."""


def _in_place(function: Any) -> Any:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.modules.batchnorm._NormBase)) or dispatch.is_frozen_norm(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of ``module.forward``; arguments with a plain default keep that default."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
    }
    with torch.no_grad():
        graph = _Tracer().trace(module, concrete_args=defaults)
    for node in graph.nodes:
        node.type = None  # a postponed annotation is a string, with which a GraphModule cannot be pickled
    return graph


@dataclass
class _Unit:
    """conv (→ bn) (→ + residual) (→ relu): ``nodes`` from the convolution to ``last``."""

    conv: Node
    last: Node
    nodes: set[Node]
    bn: nn.Module | None = None
    residual: Node | None = None
    relu: bool = False


class Folder:
    """Rewrites the graph of ``root``: each unit becomes one call of a ``FoldedConv2d`` in its convolution's place."""

    def __init__(self, root: nn.Module, graph: fx.Graph, dtype: torch.dtype | None) -> None:
        self.root, self.graph, self.dtype = root, graph, dtype
        self.modules = {n: root.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.calls = Counter(id(module) for module in self.modules.values())
        self.fresh: set[Node] = set()
        self.folded: dict[Node, Folded] = {}

    def run(self) -> None:
        self._skip_identities()
        convs = [n for n, m in self.modules.items() if dispatch.conv_is_plain(m)]
        norms = [(conv, found[0]) for conv in convs if (found := self._norm_behind(conv)) is not None]
        pairs = [(self.modules[conv], self.modules[norm]) for conv, norm in norms]
        self.folded = dict(zip((conv for conv, _ in norms), fold_all(pairs, self.dtype)))  # type: ignore[arg-type]
        for conv in convs:
            self._replace(self._unit(conv))
        self._reuse_residuals()
        self.graph.lint()

    def _is(self, node: Node, kind: type | tuple[type, ...]) -> bool:
        module = self.modules.get(node)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        one_argument = len(node.args) == 1 and not node.kwargs
        return module is not None and one_argument and any(dispatch.is_plain(module, k) for k in kinds)

    def _skip_identities(self) -> None:
        for node in [n for n in self.modules if self._is(n, _IDENTITIES)]:
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)
            del self.modules[node], self.order[node]

    @staticmethod
    def _sole_user(node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _is_relu(self, node: Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELUS and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs
        return self._is(node, nn.ReLU)

    def _added(self, node: Node, value: Node) -> Node | None:
        """What ``node`` adds to ``value``, when it is such an addition and does not write over the other operand."""
        functional = node.op == "call_function" and node.target in (operator.add, torch.add, operator.iadd)
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (functional or method) or len(node.args) != 2 or node.kwargs:
            return None
        a, b = node.args
        if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
            return None
        in_place = node.target in (operator.iadd, "add_")
        return b if a is value else None if in_place else a

    def _norm(self, bn: nn.Module | None) -> bool | None:
        """Whether a norm applies ReLU too; None where it is none that can be folded."""
        if bn is None or bn._forward_hooks or bn._forward_pre_hooks:
            return None
        fused = type(bn) in (BNReLU2d, BNAddReLU2d)
        if fused or type(bn) in dispatch.BATCH_NORMS:
            return None if bn.running_mean is None else fused
        if dispatch.is_frozen_norm(bn):
            return False
        if type(bn).__name__ == "BatchNormAct2d" and type(getattr(bn, "drop", None)) is nn.Identity:
            return {nn.ReLU: True, nn.Identity: False}.get(type(bn.act)) if bn.running_mean is not None else None
        return None

    def _norm_behind(self, conv: Node) -> tuple[Node, bool] | None:
        """The norm that a convolution can be folded with, the only one to read it, and whether that applies ReLU too."""
        user = self._sole_user(conv)
        relu = self._norm(self.modules.get(user)) if user is not None else None
        if user is None or relu is None or user.args[0] is not conv or user.kwargs:
            return None
        return user, relu

    def _movable(self, nodes: set[Node], last: Node) -> bool:
        """Whether all of ``nodes`` may run at the place of ``last``: nothing in between changes a value in place."""
        low = min(self.order[n] for n in nodes)
        between = (n for n, i in self.order.items() if low < i < self.order[last] and n not in nodes)
        return not any(self._mutates(n) for n in between)

    def _mutates(self, node: Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.modules.get(node), "inplace", False))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        dunder = name.startswith("__")
        return node.target in _MUTATORS or (name.endswith("_") and not dunder) or bool(node.kwargs.get("inplace"))

    def _unit(self, conv: Node) -> _Unit:
        """The longest unit that starts at ``conv``."""
        unit = _Unit(conv, conv, {conv})

        def extend(node: Node, **changes: Any) -> bool:
            nodes = unit.nodes | {node}
            if not self._movable(nodes, node):
                return False
            unit.nodes, unit.last = nodes, node
            for name, value in changes.items():
                setattr(unit, name, value)
            return True

        found = self._norm_behind(conv)
        if found is not None and is_finite(self.modules[conv], self.folded[conv]):  # type: ignore[arg-type]
            norm, relu = found
            added = norm.args[1] if len(norm.args) == 2 else None
            if not extend(norm, bn=self.modules[norm], relu=relu, residual=added):
                return unit
        if unit.relu:
            return unit

        user = self._sole_user(unit.last)
        residual = self._added(user, unit.last) if user is not None else None
        if user is not None and residual is not None:
            if not extend(user, residual=residual):
                return unit
            user = self._sole_user(unit.last)
        if user is not None and self._is_relu(user):
            extend(user, relu=True)
        return unit

    def _replace(self, unit: _Unit) -> None:
        conv = self.modules[unit.conv]
        pool = self._sole_user(unit.last) if unit.relu else None
        pool_first = pool is not None and self._is(pool, nn.MaxPool2d) and not self.modules[pool].return_indices
        weight_and_bias = fold(conv, None, self.dtype) if unit.bn is None else self.folded[unit.conv]  # type: ignore[arg-type]
        folded = FoldedConv2d(conv, weight_and_bias, unit.relu and not pool_first)  # type: ignore[arg-type]
        target = str(unit.conv.target)
        if self.calls[id(conv)] > 1:
            target = f"{target}_{unit.conv.name}"
        self.root.set_submodule(target, folded)

        args = (unit.conv.args[0],) if unit.residual is None else (unit.conv.args[0], unit.residual)
        with self.graph.inserting_before(unit.last):
            node = self.graph.call_module(target, args)
        self.modules[node] = folded
        self.fresh.add(node)
        self.order[node] = self.order[unit.last]
        unit.last.replace_all_uses_with(node)
        if pool_first and pool is not None:
            with self.graph.inserting_after(pool):
                relu = self.graph.call_function(torch.relu, (pool,))
            self.fresh.add(relu)
            self.order[relu] = self.order[pool]
            pool.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
        for old in sorted(unit.nodes, key=self.order.__getitem__, reverse=True):
            self.graph.erase_node(old)
            del self.order[old]

    def _reuse_residuals(self) -> None:
        """Lets a unit write over its residual where the graph owns it and nothing reads it afterwards."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        for node in self.fresh:
            module = self.modules.get(node)
            if not isinstance(module, FoldedConv2d) or len(node.args) != 2:
                continue
            x, residual = node.args
            others = [n for n in residual.users if n is not node]  # type: ignore[union-attr]
            module.reuse_residual = (
                residual in self.fresh
                and residual is not x
                and all(isinstance(self.modules.get(n), FoldedConv2d) and order[n] < order[node] for n in others)
            )
