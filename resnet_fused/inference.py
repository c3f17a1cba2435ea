"""``optimize_for_inference``: any model with its batch norms folded into its convolutions and the ReLUs and residual additions
that follow them run in the same call.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from . import dispatch
from .convert import unfuse
from .folded import FoldedConv2d
from .layers import BNAddReLU2d, BNReLU2d

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_MUTATORS = {getattr(operator, name) for name in _IN_PLACE_OPERATORS} | {operator.setitem}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class InferenceModel(nn.Module):
    """What ``optimize_for_inference`` returns: ``network`` without gradients, in ``dtype``, in eval mode only.

    Args of ``forward`` are those of the source model; floating-point tensors are cast to ``dtype``.
    ``left`` names each submodule that could not be traced, with the reason; it runs as it was, its children are folded.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None, left: dict[str, str]) -> None:
        super().__init__()
        self.network, self.dtype, self.left = network, dtype, left
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError(
                "a model from optimize_for_inference cannot be trained: its batch norms are folded away; "
                "train the model it was made from and call optimize_for_inference again"
            )
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def cast(t: Tensor) -> Tensor:
            return t.to(self.dtype) if t.is_floating_point() and t.dtype != self.dtype else t

        if self.dtype is not None:
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return self.network(*args, **kwargs)


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> InferenceModel:
    """A copy of ``model`` for inference: batch norms folded, weights packed, no gradients; eval semantics in any mode.

    Conv2d (→ BatchNorm2d) (→ + residual) (→ ReLU) becomes one call, wherever an fx trace of the forward shows that nothing
    else sees the values in between. ReLU before a max pool is applied after it, to a quarter of the data. Everything else
    (other norms, batch norm without a convolution before it, modules with hooks or parametrisations) runs as it is.

    **The folded weights are copies**: unlike ``model.eval()``, the result does not see later changes of ``model`` (an
    optimiser step, a loaded checkpoint, an in-place edit). Call this function again after any.

    Args:
        model (nn.Module): of this package, torchvision, timm or anyone; fused or not; never changed. Arguments of its forward
            that have a plain default (None, a number, a string) keep that default.
        dtype (torch.dtype, optional): bfloat16, float16, float32 or float64 for parameters, activations and outputs;
            by default that of the model's parameters. Inputs of another floating-point dtype are cast to it.
    Returns:
        InferenceModel: takes contiguous and channels_last images of any batch and image size, and gives the same result for
        both. deepcopy, pickle, ``torch.save`` and ``.to(device)`` work; ``.train()`` raises.
    Raises:
        TypeError: model is not an nn.Module.
        ValueError: dtype is not one of the four; or nothing could be folded because nothing could be traced: says why.
    Numerics: folded in float64 and rounded once. NaN and infinity propagate as in stock PyTorch on every path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"optimize_for_inference: dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    if isinstance(model, InferenceModel):
        raise TypeError("optimize_for_inference: the model is optimised already; pass the model that it was made from")
    floating = (t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    dtype = dtype or next(floating, None)
    network = unfuse(copy.deepcopy(model)).eval()
    left: dict[str, str] = {}
    network = _convert(network, dtype, "", left)
    if left and not any(isinstance(module, FoldedConv2d) for module in network.modules()):
        reasons = "; ".join(f"{path or type(model).__name__}: {reason}" for path, reason in left.items())
        raise ValueError(f"optimize_for_inference: no convolution could be folded ({reasons})")
    return InferenceModel(network if dtype is None else network.to(dtype), dtype, left)


def _convert(module: nn.Module, dtype: torch.dtype | None, path: str, left: dict[str, str]) -> nn.Module:
    """``module`` as a folded graph; where it cannot be traced, itself with each of its children converted."""
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()) or isinstance(module, nn.Conv2d):
        return module
    try:
        graph = _trace(module)
    except Exception as error:  # whatever a user's forward raises when it meets a Proxy
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            text = str(error).strip().splitlines()
            left[path] = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        for name, child in list(module.named_children()):
            setattr(module, name, _convert(child, dtype, f"{path}.{name}".lstrip("."), left))
        return module
    _Folder(module, graph, dtype).run()
    return fx.GraphModule(module, graph, type(module).__name__)


class _Proxy(fx.Proxy):
    """Records in-place operators, which fx would turn into out-of-place ones."""


def _in_place(function: Any) -> Any:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


def _is_frozen_norm(module: nn.Module) -> bool:
    names = ("weight", "bias", "running_mean", "running_var", "eps")
    return type(module).__name__ == "FrozenBatchNorm2d" and all(hasattr(module, name) for name in names)


class _Tracer(fx.Tracer):
    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.modules.batchnorm._NormBase)) or _is_frozen_norm(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> fx.Graph:
    import inspect

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str))
    }
    with torch.no_grad():
        return _Tracer().trace(module, concrete_args=defaults)


@dataclass
class _Unit:
    """conv (→ bn) (→ + residual) (→ relu): ``nodes`` from the convolution to ``last``, identities between them included."""

    conv: Node
    last: Node
    nodes: set[Node]
    bn: nn.Module | None = None
    residual: Node | None = None
    relu: bool = False


class _Folder:
    """Rewrites the graph of ``root`` so that each unit is one call of a ``FoldedConv2d``, which takes its convolution's place."""

    def __init__(self, root: nn.Module, graph: fx.Graph, dtype: torch.dtype | None) -> None:
        self.root, self.graph, self.dtype = root, graph, dtype
        self.modules = {n: root.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.calls = Counter(id(module) for module in self.modules.values())
        self.fresh: set[Node] = set()

    def run(self) -> None:
        for conv in [n for n, m in self.modules.items() if dispatch.conv_is_plain(m)]:
            self._replace(self._unit(conv))
        self._reuse_residuals()
        self.graph.lint()

    def _is(self, node: Node, kind: type | tuple[type, ...]) -> bool:
        module = self.modules.get(node)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        one_argument = len(node.args) == 1 and not node.kwargs
        return module is not None and one_argument and any(dispatch.is_plain(module, k) for k in kinds)

    def _sole_user(self, node: Node, passed: set[Node]) -> Node | None:
        """The only user of a value, behind identities, which are added to ``passed``."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self._is(user, _IDENTITIES):
                return user
            passed.add(user)
            node = user
        return None

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
        if type(bn) in (nn.BatchNorm2d, BNReLU2d, BNAddReLU2d):
            return None if bn.running_mean is None else type(bn) is not nn.BatchNorm2d
        if _is_frozen_norm(bn):
            return False
        if type(bn).__name__ == "BatchNormAct2d" and type(getattr(bn, "drop", None)) is nn.Identity:
            return {nn.ReLU: True, nn.Identity: False}.get(type(bn.act)) if bn.running_mean is not None else None
        return None

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
        return node.target in _MUTATORS or name.endswith("_") and not dunder or bool(node.kwargs.get("inplace"))

    def _unit(self, conv: Node) -> _Unit:
        """The longest unit that starts at ``conv``."""
        unit = _Unit(conv, conv, {conv})

        def extend(node: Node, passed: set[Node], **changes: Any) -> bool:
            nodes = unit.nodes | passed | {node}
            if not self._movable(nodes, node):
                return False
            unit.nodes, unit.last = nodes, node
            for name, value in changes.items():
                setattr(unit, name, value)
            return True

        passed: set[Node] = set()
        user = self._sole_user(conv, passed)
        relu = self._norm(self.modules.get(user)) if user is not None else None
        if user is not None and relu is not None and not user.kwargs:
            residual = user.args[1] if len(user.args) == 2 else None
            if user.args[0] is not residual and not extend(
                user, passed, bn=self.modules[user], relu=relu, residual=residual
            ):
                return unit
        if unit.relu:
            return unit

        passed = set()
        user = self._sole_user(unit.last, passed)
        value = next((n for n in passed if user in n.users), unit.last)
        residual = self._added(user, value) if user is not None else None
        if user is not None and residual is not None and residual not in unit.nodes:
            if not extend(user, passed, residual=residual):
                return unit
            passed = set()
            user = self._sole_user(unit.last, passed)
        if user is not None and self._is_relu(user):
            extend(user, passed, relu=True)
        return unit

    def _replace(self, unit: _Unit) -> None:
        conv = self.modules[unit.conv]
        pool = self._sole_user(unit.last, set()) if unit.relu else None
        pool_first = pool is not None and self._is(pool, nn.MaxPool2d) and not self.modules[pool].return_indices
        folded = FoldedConv2d(conv, unit.bn, unit.relu and not pool_first, self.dtype)  # type: ignore[arg-type]
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
