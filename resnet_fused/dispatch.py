"""When the fused operators may run on the modules and tensors at hand; otherwise the plain PyTorch path does.

Nothing is remembered: the modules are looked at on every call, so a hook, a parametrisation, a converted norm or a changed
flag is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks

from . import collectives

Activation = nn.Module | Callable[[Tensor], Tensor] | None

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)


def transforms_active(x: Any) -> bool:
    """Whether something other than eager autograd or torch.compile is watching: fx, jit, ONNX, functorch, forward-mode AD."""
    if isinstance(x, Proxy):
        return True
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return True
    # Not "is not None": torch.compile has an object of NoneType here, which it takes for something else than None.
    functorch = isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
    return functorch or forward_ad._current_level >= 0


def any_global_hooks() -> bool:
    return bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Exactly a ``kind`` (a parametrised module is not), whose ``forward`` nobody replaced and whose call nobody listens to."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def conv_is_plain(conv: nn.Module) -> bool:
    return is_plain(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


# Whose calls the operators may replace: exactly these, and synchronised norms of this package, which adds them.
BATCH_NORMS: set[type] = {nn.BatchNorm2d, nn.SyncBatchNorm}


def is_frozen_norm(bn: nn.Module) -> bool:
    """torchvision's ``FrozenBatchNorm2d`` or one like it: four buffers, ``eps``, and the formula of a batch norm in eval mode."""
    return type(bn).__name__ == "FrozenBatchNorm2d" and all(
        hasattr(bn, name) for name in ("weight", "bias", "running_mean", "running_var", "eps")
    )


def is_batch_norm(module: nn.Module | None) -> bool:
    """A batch norm that a fused unit may hold, by its type."""
    return type(module) in BATCH_NORMS or (module is not None and is_frozen_norm(module))


def has_values(bn: nn.Module) -> bool:
    """Whether a batch norm has affine parameters and running statistics."""
    return bn.weight is not None and bn.bias is not None and bn.running_mean is not None


def norm_is_plain(bn: nn.Module) -> bool:
    """A batch norm with affine parameters and running statistics."""
    return is_batch_norm(bn) and is_plain(bn, type(bn)) and has_values(bn)


def is_norm_act(module: nn.Module | None) -> bool:
    """Exactly timm's BatchNormAct2d with parameters and running statistics, without dropout, and with ReLU or no activation."""
    cls = type(module)
    if (cls.__module__, cls.__qualname__) != ("timm.layers.norm_act", "BatchNormAct2d"):
        return False
    return type(module.drop) is nn.Identity and type(module.act) in (nn.ReLU, nn.Identity) and has_values(module)


def group_name(bn: nn.Module) -> str:
    """Over which processes the statistics of a batch norm go, as in ``collectives``; "" for this one alone."""
    if type(bn) is nn.SyncBatchNorm:
        return collectives.name_of(bn.process_group)
    return getattr(bn, "group_name", "")


def act_is_plain(act: Activation) -> bool:
    if act is None or any(act is function for function in _RELU_FUNCTIONS):
        return True
    return isinstance(act, nn.Module) and is_plain(act, nn.ReLU)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts a convolution's operands on the device of ``x``, or None where it is off."""
    device = x.device.type
    if device == "meta":  # has no autocast: PyTorch raises on the question
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_activation(x: Any, may_lack_images: bool = False) -> bool:
    """A floating 4-D strided tensor, which the operators can work on: not empty, or of no images where that is allowed."""
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.is_floating_point()
        and x.layout == torch.strided
        and (x.numel() > 0 or (may_lack_images and x.shape[0] == 0 and 0 not in x.shape[1:]))
        and x.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
