"""Finding fusable patterns in a traced graph by data flow, and rewriting them into calls of ``resnet_fused.layers.run_*``.

A pattern is accepted only when every value inside it has one user, no module with state is called twice, and nothing that
happens between its first and its last operation could see the difference. The rewritten graph fetches the modules at every
call, so that hooks, frozen flags and replaced modules are seen. No node outside a pattern is touched or removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node

from .. import dispatch, layers
from . import calls
from .dataflow import DataFlow
from .sequential import is_plain_conv, is_plain_norm


@dataclass(eq=False)
class Unit:
    """conv → bn (→ act); ``conv`` is None for a batch norm that stands alone. ``nodes`` includes identities passed through."""

    conv: Node | None
    bn: Node
    act: Node | None
    nodes: set[Node]

    @property
    def first(self) -> Node:
        return self.conv or self.bn

    @property
    def out(self) -> Node:
        return self.act or self.bn


@dataclass(eq=False)
class Group:
    """Nodes that become one call: ``build(graph)`` makes the call in place of ``last``."""

    nodes: set[Node]
    last: Node
    build: Callable[[fx.Graph], Node]
    pattern: str


@dataclass
class Rewritten:
    """Outcome: the patterns found, batch norms left with reasons, identities skipped, and the convolutions involved."""

    patterns: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


class Matcher(DataFlow):
    """Pattern finding over the graph of ``root.forward``."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph)
        self.result = Rewritten()
        self.taken: set[Node] = set()
        self.groups: list[Group] = []
        self.replaced: dict[Node, Node] = {}

    def _movable(self, nodes: set[Node]) -> bool:
        """Whether all of ``nodes`` may run at the place of the last one, and none was taken before."""
        if nodes & self.taken:
            return False
        indices = [self.order[node] for node in nodes]
        low, high = min(indices), max(indices)
        return all(n in nodes or self._harmless(n) for n, i in self.order.items() if low < i < high)

    def _input(self, unit: Unit, within: set[Node]) -> Node:
        """What a unit is applied to, behind those identities that are in ``within``."""
        node: Node = unit.first.args[0]  # type: ignore[assignment]
        while node in within:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _now(self, node: Node) -> Node:
        """The node that stands for ``node`` after the rewriting so far."""
        return self.replaced.get(node, node)

    # Units and chains

    def _unit(self, bn: Node) -> Unit | str:
        """The unit around a batch norm, or the reason why there is none."""
        name = str(bn.target)
        if not is_plain_norm(self.module[bn]) or not self._plain_call(bn):
            return "batch norm without parameters or running statistics, or called with more than one argument"
        if self.calls[id(self.module[bn])] > 1:
            return "called more than once in one forward"
        conv, nodes, reason = self._convolution(bn)
        passed: set[Node] = set()
        user = self._sole_user(bn, passed)
        act = user if user is not None and self._relu(user) else None
        if act is not None:
            nodes |= passed | {act}
        unit = Unit(conv, bn, act, nodes)
        if not self._movable(nodes):
            return "an operation between its parts may change a value in place"
        if conv is None and act is None and self._residual_add(unit) is None:
            return f"{reason}, and no ReLU follows {name}"
        return unit

    def _convolution(self, bn: Node) -> tuple[Node | None, set[Node], str]:
        """(convolution before a batch norm, nodes of both, ""); (None, the batch norm, the reason) where it cannot be taken."""
        nodes = {bn}
        conv = self._source(bn.args[0], nodes)  # type: ignore[arg-type]
        if not (self._plain_call(conv) and is_plain_conv(self.module.get(conv))):
            reason = "its input is not the output of a plain Conv2d"
        elif self._sole_user(conv, set()) is not bn:
            reason = f"the output of {conv.target} is used elsewhere too"  # type: ignore[str-bytes-safe]
        elif self.calls[id(self.module[conv])] > 1:
            reason = f"{conv.target} is called more than once in one forward"  # type: ignore[str-bytes-safe]
        else:
            return conv, nodes | {conv}, ""
        return None, {bn}, reason

    def _norm_act(self, bn: Node) -> None:
        """A group for timm's BatchNormAct2d, which applies its activation itself, and the convolution before it."""
        conv, nodes, reason = self._convolution(bn)
        name, act = str(bn.target), self.module[bn].act
        if not self._plain_call(bn) or self.calls[id(self.module[bn])] > 1:
            self.result.left[name] = "called more than once in one forward, or with more than one argument"
        elif conv is None and type(act) is nn.Identity:
            self.result.left[name] = f"{reason}, and {name} has no ReLU"
        else:

            def build(graph: fx.Graph) -> Node:
                x = self._now((conv or bn).args[0])  # type: ignore[arg-type]
                return graph.call_function(layers.run_norm_act, (x, self._fetch(graph, conv), self._fetch(graph, bn)))

            pattern = " → ".join(str(node.target) for node in (conv, bn) if node)
            kind = "conv-bn" if conv else "bn-relu"
            if not self._take(nodes, bn, build, f"{kind}: {pattern}"):
                self.result.left[name] = "an operation between its parts may change a value in place"

    def _residual_add(self, unit: Unit) -> tuple[Node, Node, Node, set[Node]] | None:
        """(add, relu, other operand, identities passed) when relu(unit + other) follows a unit without activation."""
        if unit.act is not None:
            return None
        passed: set[Node] = set()
        add = self._sole_user(unit.bn, passed)
        operands = self._add(add) if add is not None else None
        if add is None or operands is None:
            return None
        a, b, in_place = operands
        other = b if self._source(a, set()) is unit.bn else a
        relu = self._sole_user(add, passed)
        if relu is None or not self._relu(relu) or not self._is_tensor(other) or in_place and not self._is_private(a):
            return None
        return add, relu, other, passed

    def _chains(self, units: list[Unit]) -> list[list[Unit]]:
        starts = {unit.conv: unit for unit in units if unit.conv is not None}
        following: dict[Unit, tuple[Unit, set[Node]]] = {}
        for unit in units:
            passed: set[Node] = set()
            user = self._sole_user(unit.out, passed)
            if unit.conv is not None and user in starts:
                following[unit] = (starts[user], passed)  # type: ignore[index]
        heads = set(units) - {after for after, _ in following.values()}
        chains = []
        for head in (unit for unit in units if unit in heads):
            chain = [head]
            while chain[-1] in following:
                unit, passed = following[chain[-1]]
                unit.nodes |= passed
                chain.append(unit)
            chains.append(chain)
        return chains

    # Groups

    def match(self) -> list[Group]:
        """All groups, largest first per value; reasons for batch norms left over go to ``result.left``."""
        units = []
        for node, module in self.module.items():
            if dispatch.is_norm_act(module):
                self._norm_act(node)
            elif dispatch.is_batch_norm(module):
                unit = self._unit(node)
                if isinstance(unit, Unit):
                    units.append(unit)
                else:
                    self.result.left[str(node.target)] = unit
        chains = self._chains(units)
        single = {chain[0].out: chain[0] for chain in chains if len(chain) == 1 and chain[0].conv is not None}
        for chain in sorted(chains, key=len, reverse=True):
            if not set(chain[-1].nodes) & self.taken:
                self._residual_block(chain, single) or self._stem(chain) or self._plain_chain(chain)
        for node in self.order:
            self._add_relu(node)
        return self.groups

    def _take(self, nodes: set[Node], last: Node, build: Callable[[fx.Graph], Node], pattern: str) -> bool:
        if not self._movable(nodes):
            return False
        self.taken |= nodes
        self.groups.append(Group(nodes, last, build, pattern))
        for node in nodes & self.module.keys():
            kept = self.result.skipped if self._is_module(node, nn.Identity) else self.result.modules
            kept.add(str(node.target))
        return True

    def _fetch(self, graph: fx.Graph, node: Node | None) -> Any:
        """An expression for the module (or function) that ``node`` calls."""
        if node is None:
            return None
        if node.op == "call_module":
            return graph.create_node("get_attr", str(node.target))
        return graph.call_function(calls.functional_relu if self._relu(node) else calls.stem_pool)

    def _fetch_units(self, graph: fx.Graph, chain: list[Unit]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(self._fetch(graph, node) for node in (u.conv, u.bn, u.act)) for u in chain)

    @staticmethod
    def _describe(chain: list[Unit]) -> str:
        names = [str(n.target) if n.op == "call_module" else "relu" for u in chain for n in (u.conv, u.bn, u.act) if n]
        return " → ".join(names)

    def _residual_block(self, chain: list[Unit], single: dict[Node, Unit]) -> bool:
        found = self._residual_add(chain[-1])
        if found is None:
            return False
        add, relu, other, passed = found
        nodes = set().union(*(unit.nodes for unit in chain)) | passed | {add, relu}
        behind: set[Node] = set()
        shortcut = single.get(self._source(other, behind))
        if shortcut is not None and shortcut.act is None and not shortcut.nodes & self.taken:
            ahead: set[Node] = set()
            start, other_start = (self._source(u.first.args[0], ahead) for u in (chain[0], shortcut))  # type: ignore[arg-type]
            same_input = start is other_start and all(len(identity.users) == 1 for identity in ahead)
            if same_input and chain[0].conv is not None and self._sole_user(shortcut.bn, set()) is add:
                whole = nodes | shortcut.nodes | behind | ahead

                def with_projection(graph: fx.Graph) -> Node:
                    projection = (self._fetch(graph, shortcut.conv), self._fetch(graph, shortcut.bn))
                    keywords = {"projection": projection, "act": self._fetch(graph, relu)}
                    x = self._now(self._input(chain[0], whole))
                    return graph.call_function(layers.run_units, (x, self._fetch_units(graph, chain)), keywords)

                pattern = f"{self._describe(chain)} + {self._describe([shortcut])} → relu"
                if self._take(whole, relu, with_projection, f"residual block: {pattern}"):
                    return True

        in_place = bool(self._add(add) and self._add(add)[-1])  # type: ignore[index]

        def with_residual(graph: fx.Graph) -> Node:
            keywords = {"residual": self._now(other), "act": self._fetch(graph, relu)}
            x = self._now(self._input(chain[0], nodes))
            if chain[0].conv is None:
                alone = calls.run_bn_act_in_place if in_place else layers.run_bn_act
                return graph.call_function(alone, (x, self._fetch(graph, chain[0].bn)), keywords)
            target: Callable[..., Tensor] = calls.run_units_in_place if in_place else layers.run_units
            return graph.call_function(target, (x, self._fetch_units(graph, chain)), keywords)

        kind = "bn-add-relu" if chain[0].conv is None else "residual block"
        return self._take(nodes, relu, with_residual, f"{kind}: {self._describe(chain)} + {other.name} → relu")

    def _stem(self, chain: list[Unit]) -> bool:
        last = chain[-1]
        passed: set[Node] = set()
        pool = self._sole_user(last.out, passed)
        if last.conv is None or last.act is None or pool is None or not self._is_stem_pool(pool):
            return False
        nodes = last.nodes | passed | {pool}

        def build(graph: fx.Graph) -> Node:
            x = self._now(self._input(last, nodes))
            return graph.call_function(
                layers.run_stem, (x, *self._fetch_units(graph, [last])[0], self._fetch(graph, pool))
            )

        taken = self._take(nodes, pool, build, f"stem: {self._describe([last])} → max-pool")
        if taken and len(chain) > 1:
            self._plain_chain(chain[:-1])
        return taken

    def _plain_chain(self, chain: list[Unit]) -> bool:
        """conv-bn(-relu) units in one call, or one by one where they cannot move together; or bn-relu alone."""
        nodes = set().union(*(unit.nodes for unit in chain))
        head = chain[0]

        def build(graph: fx.Graph) -> Node:
            x = self._now(self._input(head, nodes))
            if head.conv is None:
                return graph.call_function(
                    layers.run_bn_act, (x, self._fetch(graph, head.bn), self._fetch(graph, head.act))
                )
            return graph.call_function(layers.run_units, (x, self._fetch_units(graph, chain)))

        if head.conv is None and head.act is None:
            self.result.left[str(head.bn.target)] = "the residual that is added may be changed in place meanwhile"
            return False
        kind = "bn-relu" if head.conv is None else "conv-bn"
        if self._take(nodes, chain[-1].out, build, f"{kind}: {self._describe(chain)}"):
            return True
        if len(chain) == 1:
            self.result.left[str(head.bn.target)] = "an operation between its parts may change a value in place"
            return False
        for unit in chain:
            self._plain_chain([unit])
        return True

    def _add_relu(self, relu: Node) -> None:
        matched = self._relu(relu)
        if relu in self.taken or matched is None:
            return
        passed: set[Node] = set()
        add = self._source(matched[0], passed)
        operands = self._add(add)
        if operands is None or self._sole_user(add, set()) is not relu:
            return
        a, b, in_place = operands
        if not (self._is_tensor(a) and self._is_tensor(b)) or in_place and not self._is_private(a):
            return

        def build(graph: fx.Graph) -> Node:
            target = calls.run_add_act_in_place if in_place else layers.run_add_act
            return graph.call_function(target, (self._now(a), self._now(b), self._fetch(graph, relu)))

        self._take({add, relu} | passed, relu, build, f"add-relu: {a.name} + {b.name} → relu")


def rewrite(root: nn.Module, graph: fx.Graph) -> Rewritten:
    """Rewrite the patterns of ``graph`` (the trace of ``root.forward``) in place and say what was found."""
    matcher = Matcher(root, graph)
    for group in sorted(matcher.match(), key=lambda group: matcher.order[group.last]):
        with graph.inserting_before(group.last):
            call = group.build(graph)
        call.meta["fused"] = True
        group.last.replace_all_uses_with(call)
        matcher.replaced[group.last] = call
        for node in sorted(group.nodes, key=matcher.order.__getitem__, reverse=True):
            graph.erase_node(node)
        matcher.result.patterns.append(group.pattern)
    graph.lint()
    return matcher.result
