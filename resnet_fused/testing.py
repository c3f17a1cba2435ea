"""Tolerances, inputs and stock models, shared by the tests, the benchmarks and ``resnet-fused verify``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn


def import_torchvision() -> ModuleType:
    """torchvision, also beside a processor build of PyTorch.

    torchvision's fake kernels name two of its operators, which a build that could not load its own library never defined;
    their schemas are defined here, and only when the import failed for that reason.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        import torchvision
    return torchvision


_kept_alive: list[torch.library.Library] = []


def max_error(t: Tensor, gold64: Tensor) -> float:
    """Largest absolute difference from the float64 reference."""
    return (t.double() - gold64).abs().max().item() if t.numel() else 0.0


def assert_as_accurate(
    ours: Tensor,
    stock: Tensor,
    gold64: Tensor,
    slack: float = 2,
    ulps: float = 2,
    rows: int = 1,
    name: str = "result",
    scale: float = 0,
) -> None:
    """``ours`` is as close to the float64 reference as stock PyTorch in the same dtype, up to ``slack`` and a floor.

    The floor is ``ulps`` units in the last place of the largest reference value; a sum over ``rows`` rows gets a floor that
    grows with their square root. ``scale`` is the size of the terms of a sum that cancels, where the result says nothing
    about it.
    """
    assert ours.shape == gold64.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(gold64.shape)}"
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, stock has {stock.dtype}"
    assert ours.isfinite().all(), f"{name}: not finite"
    if not ours.numel():
        return
    floor = ulps * torch.finfo(ours.dtype).eps * max(gold64.abs().max().item(), scale) * rows**0.5
    error, allowed = max_error(ours, gold64), slack * max_error(stock, gold64) + floor
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (stock {max_error(stock, gold64):.3e})"


def randomise_norms(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Give every batch norm of ``model`` weights, biases and running statistics that differ from their initial 1 and 0."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model
