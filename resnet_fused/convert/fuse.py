"""``fuse(model)`` and ``unfuse(model)``: swapping the classes of modules, so that everything but ``forward`` stays as it was."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from .graph import Rewritten, rewrite
from .guards import Guard
from .sequential import FusedSequential, neighbours, stock_tree
from .tracing import LeftAlone, Trace, trace

Model = TypeVar("Model", bound=nn.Module)
_OWN_PACKAGE = __name__.split(".")[0]


@dataclass
class FusionReport:
    """What ``fuse`` did: ``fused`` holds (module path, pattern), ``left`` holds (module path, reason).

    What runs a fused unit is chosen at every call, by device, dtype and shape: ``resnet-fused info`` says how.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("fused", *row) for row in self.fused] + [("left", *row) for row in self.left]
        width = max((len(path) for _, path, _ in rows), default=0)
        lines = [f"{len(self.fused)} fused, {len(self.left)} left"]
        return "\n".join(lines + [f"  {kind:<5}  {path:<{width}}  {text}" for kind, path, text in rows])


class _Fused:
    """Mixed into the class of a fused module; instances differ from stock ones in their class only."""

    _stock_class: type[nn.Module]

    def __init_subclass__(cls) -> None:
        # The user's __init_subclass__ may register classes: this one is none of the user's.
        pass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle is the stock module, fused again when its state has been restored."""
        constructor, arguments, *state = _stock_view(self).__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return (_rebuild, (self._stock_class, constructor, arguments), *state)

    def __prepare_scriptable__(self) -> nn.Module:
        return stock_tree(self)  # type: ignore[arg-type]


class _Pending:
    """Mixed into the class of a copy between its construction and the restoring of its state."""

    _stock_class: type[nn.Module]

    def __init_subclass__(cls) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__class__ = self._stock_class  # type: ignore[assignment]
        self.__setstate__(state)
        _fuse_quietly(self)  # type: ignore[arg-type]


def _stock_view(module: Any) -> nn.Module:
    """An object of the stock class that shares the module's attributes."""
    view = object.__new__(module._stock_class)
    view.__dict__ = module.__dict__
    return view


def _deepcopy(module: Any, memo: dict[int, Any]) -> Any:
    """For stock classes that define ``__deepcopy__`` themselves."""
    copied = _stock_view(module).__deepcopy__(memo)  # type: ignore[operator]
    _fuse_quietly(copied)
    return copied


def _recompile(module: Any) -> Any:
    """For an fx.GraphModule, which compiles its graph into its class, which must be its own."""
    module.__class__ = module._stock_class
    try:
        return module.recompile()
    finally:
        _fuse_quietly(module)


@functools.cache
def _pending_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(stock)(stock.__name__, (_Pending, stock), {"_stock_class": stock, "__module__": stock.__module__})  # type: ignore[misc]


def _rebuild(stock: type[nn.Module], constructor: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = constructor(*arguments)
    if module.__dict__:
        _fuse_quietly(module)
    else:
        module.__class__ = _pending_class(stock)  # type: ignore[arg-type]
    return module


def _fuse_quietly(module: nn.Module) -> None:
    with contextlib.suppress(LeftAlone):
        _swap(module)


# ``forward_features`` is a method of timm's models that others call too.
_METHODS = ("forward", "forward_features")
_METHOD = """\
def {method}({inputs}, *args, **kwargs):
    if args or kwargs or not ({tensors}) or _is_tracing() or _Stock.{method} is not _stock_method or not ({guard}):
        return _Stock.{method}({inputs}, *args, **kwargs)
    return _run({inputs})
"""
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


def _compile(source: str, namespace: dict[str, Any], name: str) -> None:
    """Execute source text, known to tracebacks and debuggers under ``name``."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


@dataclass(frozen=True)
class _Method:
    """A method of a stock class: what it does, and while which condition holds."""

    stock: type[nn.Module]
    name: str
    traced: Trace
    guard: Guard

    @functools.cached_property
    def code(self) -> Any:
        """The rewritten graph as Python."""
        return self.traced.graph.python_code("self")

    @functools.cached_property
    def source(self) -> str:
        inputs = ", ".join(("self", *self.traced.inputs))
        tensors = " and ".join(f"isinstance({name}, _Tensor)" for name in self.traced.inputs)
        return _METHOD.format(method=self.name, inputs=inputs, tensors=tensors, guard=self.guard.source)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods that run the same code under the same condition."""
        constants = tuple(
            id(c) if inspect.isroutine(c) or inspect.isclass(c) else repr(c) for c in self.guard.constants.values()
        )
        functions = tuple((name, id(value)) for name, value in self.code.globals.items())
        return (getattr(self.stock, self.name), self.code.src, functions, self.source, constants)

    @property
    def returns_tensor(self) -> bool:
        (output,) = (node.args[0] for node in self.traced.graph.nodes if node.op == "output")
        return isinstance(output, Node) and output.meta.get("fused", False)

    def compile(self, name: str) -> Callable[..., Any]:
        """The method, known to tracebacks and debuggers under ``name``."""
        body = dict(self.code.globals)
        _compile(self.code.src, body, f"{name} graph>")
        stock = getattr(self.stock, self.name)
        # Neither namespace has a __name__: torch.compile takes namespaces of the same name for one module.
        namespace: dict[str, Any] = {
            "_Tensor": Tensor,
            "_is_tracing": torch.jit.is_tracing,
            "_Stock": self.stock,
            "_stock_method": stock,
            "_run": body["forward"],
            **self.guard.constants,
        }
        _compile(self.source, namespace, f"{name}>")
        return functools.wraps(stock)(namespace[self.name])


def _fused_class(stock: type[nn.Module], methods: list[_Method]) -> type[nn.Module]:
    """The subclass of ``stock`` that runs the rewritten graphs; instances with the same graphs and guards share it."""
    key = (stock, *(method.key for method in methods))
    if key not in _classes:
        name = f"<{_OWN_PACKAGE} {stock.__module__}.{stock.__qualname__} {len(_classes)}"
        attributes: dict[str, Any] = {method.name: method.compile(f"{name} {method.name}") for method in methods}
        attributes |= {
            "_stock_class": stock,
            "_returns_tensor": methods[0].name == "forward" and methods[0].returns_tensor,
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
        }
        if hasattr(stock, "__deepcopy__"):
            attributes["__deepcopy__"] = _deepcopy
        if issubclass(stock, fx.GraphModule):
            attributes["recompile"] = _recompile
        _classes[key] = type(stock)(stock.__name__, (_Fused, stock), attributes)  # type: ignore[misc]
    return _classes[key]


def _rewritten(module: nn.Module) -> tuple[Rewritten, list[_Method]]:
    """What was found in the first method in which there is something to fuse, and all methods to replace.

    Raises:
        LeftAlone: no method could be traced; the reason is that of ``forward``.
    """
    stock, results, reasons = type(module), {}, []
    for name in _METHODS:
        if inspect.isfunction(getattr(stock, name, None)):
            try:
                traced = trace(module, name)
                results[name] = (traced, rewrite(module, traced.graph))
            except LeftAlone as reason:
                reasons.append(reason)
    if not results:
        raise reasons[0]
    replaced = {name: result for name, result in results.items() if result[1].patterns}
    found = next(iter((replaced or results).values()))[1]
    return found, [
        _Method(stock, name, traced, Guard(module, traced, sorted(rewritten.skipped), replaced))
        for name, (traced, rewritten) in replaced.items()
    ]


def _swap(module: nn.Module) -> Rewritten:
    """Give ``module`` the class that runs its rewritten graphs, when there is something to rewrite.

    Raises:
        LeftAlone: it cannot be proven that the graph does what the forward does.
    """
    try:
        found, methods = _rewritten(module)
        if methods:
            module.__class__ = _fused_class(type(module), methods)
    except LeftAlone:
        raise
    except Exception as error:
        raise LeftAlone(f"its class cannot be replaced: {type(error).__name__}: {error}") from error
    return found


def _is_own(module: nn.Module) -> bool:
    origin = type(module).forward.__module__ or ""
    return origin.split(".")[0] == _OWN_PACKAGE and not isinstance(module, FusedSequential)


def _norms(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of batch norms that belong to ``module`` itself: direct children, or in containers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            yield prefix + name
        elif isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _norms(child, f"{prefix}{name}.")


def _is_candidate(module: nn.Module) -> bool:
    name = type(module).__module__
    if isinstance(module, FusedSequential) or name.startswith("torch.") and not name.startswith("torch.fx."):
        return False
    return any(True for _ in module.children())


class _Conversion:
    """One call of ``fuse``: walks the tree and writes the report."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = list(model.named_modules())
        self.report = FusionReport()
        self.covered: set[int] = set()
        self.own = {id(child) for _, m in self.paths if _is_own(m) for child in m.children()}

    def run(self) -> FusionReport:
        # Children first: a parent's guard may name the class of a child.
        for path, module in reversed(self.paths):
            if _is_own(module):
                if any(isinstance(child, _BatchNorm) for child in module.children()):
                    self.report.left.append((path, f"{_OWN_PACKAGE}'s own module: fused already"))
            elif _is_candidate(module):
                self._module(path, module)
        for path, module in self.paths:
            if type(module) in (nn.Sequential, FusedSequential) and id(module) not in self.own:
                self._sequential(path, module)
        order = {path: i for i, (path, _) in enumerate(self.paths)}
        for rows in (self.report.fused, self.report.left):
            rows.sort(key=lambda row: order[row[0]])
        return self.report

    def _module(self, path: str, module: nn.Module) -> None:
        if isinstance(module, _Fused):
            module.__class__ = module._stock_class  # type: ignore[assignment]
        norms = [id(module.get_submodule(name)) for name in _norms(module)]
        try:
            found = _swap(module)
        except LeftAlone as reason:
            if norms:
                self.report.left.append((path, str(reason)))
            return
        self.report.fused += [(path, pattern) for pattern in found.patterns]
        inside = f"{path}." if path else ""
        self.report.left += [(inside + name, reason) for name, reason in found.left.items()]
        self.covered |= {id(module.get_submodule(name)) for name in found.modules}

    def _sequential(self, path: str, module: nn.Module) -> None:
        children = list(module.children())
        runs = [(kind, start, end) for kind, start, end in neighbours(children) if kind]
        if not runs:
            return
        module.__class__ = FusedSequential
        for kind, start, end in runs:
            if id(children[start]) not in self.covered:
                names = " → ".join(list(module._modules)[start:end])
                self.report.fused.append((path, f"{'conv-bn' if kind == 'units' else kind}: {names} (neighbours)"))


def fuse(model: Model) -> Model:
    """Run the fusable patterns of any model as fused operations, in place.

    Conv2d → BatchNorm2d (→ ReLU), BatchNorm2d → ReLU, residual add → ReLU, whole residual blocks and the stem with its pool
    are found by data flow (an fx trace of each module's forward; neighbours in a Sequential), never by names. Parameters,
    buffers, state_dict keys, hooks, attributes and isinstance are untouched: a module changes its class to a subclass of it.
    Whenever a module is not what it was when it was traced (an attribute that its forward reads, hooks on a Sequential, other
    arguments, fx or jit tracing), its original forward runs.

    Args:
        model (nn.Module): changed in place.
    Returns:
        model itself, with the attribute ``fusion_report`` (printable).
    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    model.fusion_report = _Conversion(model).run()  # type: ignore[assignment]
    return model


def unfuse(model: Model) -> Model:
    """Undo ``fuse`` in place: every module has its stock class again. The memory format of weights is kept.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, FusedSequential):
            module.__class__ = nn.Sequential  # type: ignore[assignment]
        elif isinstance(module, _Fused):
            module.__class__ = module._stock_class  # type: ignore[assignment]
        module.__dict__.pop("fusion_report", None)
    return model
