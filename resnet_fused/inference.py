"""``optimize_for_inference``: any model with its batch norms folded away, its weights packed, and no gradients."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from . import backends, routes
from .convert import unfuse
from .cuda_graphs import Graphs
from .folded import FoldedConv2d
from .folding import Folder, trace


class InferenceModel(nn.Module):
    """What ``optimize_for_inference`` returns: ``network`` without gradients, in ``dtype``, in eval mode only.

    Args of ``forward`` are those of the source model; floating-point tensors are cast to ``dtype``.
    ``left`` names each submodule that could not be traced, with the reason; it runs as it was, its children are folded.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype | None, left: dict[str, str], cuda_graph: bool = False
    ) -> None:
        super().__init__()
        self.network, self.dtype, self.left, self.cuda_graph = network, dtype, left, cuda_graph
        self._graphs: Graphs | None = None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError(
                "a model from optimize_for_inference cannot be trained: its batch norms are folded away; "
                "train the model it was made from and call optimize_for_inference again"
            )
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None}

    def _apply(self, fn: Any, recurse: bool = True) -> InferenceModel:
        if self._graphs is not None:
            self._graphs.clear()
        return super()._apply(fn, recurse)

    def _recorded(self) -> Graphs:
        if self._graphs is None:
            folded = [m for m in self.network.modules() if isinstance(m, FoldedConv2d)]
            others = [m for m in self.network.modules() if not isinstance(m, FoldedConv2d)]
            own = [tensors for m in others for tensors in (m._parameters, m._buffers) if tensors]

            def state() -> list[Any]:
                """What graphs read: folded weights with what was made from them, and where all others are."""
                found = [(t.data_ptr(), t.dtype) for tensors in own for t in tensors.values() if t is not None]
                return [*(conv._layer for conv in folded), *found]

            self._graphs = Graphs(self._run, state)
        return self._graphs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.cuda_graph and not torch.compiler.is_compiling():
            return self._recorded()(args, kwargs, _setting())
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
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


def _setting() -> tuple:
    """What the user may change from call to call, and kernels depend on."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return (
        backends.current(),
        routes.reloads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        convolutions.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, *, cuda_graph: bool = False
) -> InferenceModel:
    """A copy of ``model`` for inference: batch norms folded, weights packed, no gradients; eval semantics in any mode.

    Conv2d (→ BatchNorm2d) (→ + residual) (→ ReLU) becomes one call, wherever an fx trace of the forward shows that
    nothing else sees the values in between. ReLU before a max pool is applied after it, to less data. Everything else
    (other norms, batch norm without a convolution before it or with infinite statistics, modules with hooks or
    parametrisations) runs as it is.

    **The folded weights are copies**: unlike ``model.eval()``, the result does not see later changes of ``model`` (an
    optimiser step, a loaded checkpoint, an in-place edit). Call this function again after any.

    Args:
        model (nn.Module): of this package, torchvision, timm or anyone; fused or not; never changed. Arguments of its
            forward that have a plain default (None, a number, a string) keep that default.
        dtype (torch.dtype, optional): bfloat16, float16, float32 or float64 for parameters, activations and outputs;
            by default that of the model's parameters. Inputs of another floating-point dtype are cast to it.
        cuda_graph (bool): on a GPU record the whole network as a CUDA graph on the first call with inputs of a kind (shape,
            dtype, layout), and replay it on the next, for the last eight kinds. Calls then take turns, also from several threads;
            Python code in the model, hooks too, runs when a graph is recorded only. ``cuda_graphs.Graphs`` says what runs
            without a graph: inputs on a processor do.
    Returns:
        InferenceModel: takes contiguous and channels_last images of any batch and image size, with the same result for
        both. deepcopy, pickle, ``torch.save`` and ``.to(device)`` work; ``.train()`` raises.
    Raises:
        TypeError: model is not an nn.Module.
        ValueError: dtype is not one of the four; or nothing could be folded because nothing could be traced: says why.
    Numerics: folded in float64 and rounded once. NaN and infinity propagate as in stock PyTorch on every path, but that on a
        GPU where ``space_to_depth`` was measured to be the fastest stem they reach the stem's outputs a pixel further.
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
    return InferenceModel(network if dtype is None else network.to(dtype), dtype, left, cuda_graph)


def _convert(module: nn.Module, dtype: torch.dtype | None, path: str, left: dict[str, str]) -> nn.Module:
    """``module`` as a folded graph; where it cannot be traced, itself with each of its children converted."""
    if not any(isinstance(m, nn.Conv2d) for m in module.modules()) or isinstance(module, nn.Conv2d):
        return module
    try:
        graph = trace(module)
    except Exception as error:  # whatever a user's forward raises when it meets a Proxy
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            text = str(error).strip().splitlines()
            left[path] = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        for name, child in list(module.named_children()):
            setattr(module, name, _convert(child, dtype, f"{path}.{name}".lstrip("."), left))
        return module
    Folder(module, graph, dtype).run()
    return fx.GraphModule(module, graph, type(module).__name__)
