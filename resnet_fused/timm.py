"""timm's registry: ``import resnet_fused.timm``, then ``timm.create_model("fused_resnet50", ...)``.

A ``fused_NAME`` is what timm builds under NAME, passed through ``fuse``. So every argument, method, feature extractor,
pretrained tag and checkpoint is timm's: ``pretrained=True`` takes the weights of NAME, and ``pretrained_cfg`` says NAME, so
that what is saved loads without this package too. What no fused unit computes (attention, anti-aliasing, other norms or
activations) runs as timm's modules; ``model.fusion_report`` lists it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .convert import fuse
from .models import BUILDERS
from .testing import import_torchvision

try:
    import_torchvision()  # which timm imports, and which a processor's PyTorch refuses without this
    from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, model_entrypoint, register_model
except ImportError as error:
    raise ImportError(
        f"resnet_fused.timm needs timm and torchvision (pip install timm torchvision): {error}"
    ) from error

PREFIX = "fused_"

__all__: list[str] = ["PREFIX"]  # ``register_model`` adds the names of the models

default_cfgs = generate_default_cfgs(
    {PREFIX + name: config for stock in BUILDERS for name, config in get_arch_pretrained_cfgs(stock).items()}
)


def _register(stock_name: str) -> Callable[..., nn.Module]:
    stock = model_entrypoint(stock_name)

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return fuse(stock(pretrained=pretrained, **kwargs))

    build.__name__ = build.__qualname__ = PREFIX + stock_name
    build.__doc__ = f"timm's ``{stock_name}``, fused; the arguments are timm's."
    return register_model(build)


globals().update({PREFIX + name: _register(name) for name in BUILDERS})
