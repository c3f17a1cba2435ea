"""A fused network beside the stock one with the same values, in float64, where the two agree to rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.testing import import_torchvision, randomise_norms

tv = import_torchvision().models.resnet
SHORT = (1, 1, 1, 1)  # one block a stage: identity and projection shortcuts, the stem with its pooling


def networks(
    layers: tuple[int, ...] = SHORT, dtype: torch.dtype = torch.float64, **kwargs
) -> tuple[nn.Module, nn.Module]:
    """``(ours, stock)`` in training mode; ``layers=(2, 2, 2, 2)`` is resnet18."""
    torch.manual_seed(0)
    ours = resnet_fused.ResNet(resnet_fused.BasicBlock, layers, num_classes=10, **kwargs)
    stock = tv.ResNet(tv.BasicBlock, layers, num_classes=10, **kwargs)
    randomise_norms(stock)
    ours.load_state_dict(stock.state_dict())
    return ours.to(dtype), stock.to(dtype)


def projection(
    inplanes: int, outplanes: int, stride: int, norm: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))


def blocks(norm: Callable[..., nn.Module] = nn.BatchNorm2d, project: bool = True) -> tuple[nn.Module, nn.Module]:
    """``(ours, stock)``: one BasicBlock of 4 channels, to 6 channels where it projects."""
    torch.manual_seed(0)
    made = []
    for block in (resnet_fused.BasicBlock, tv.BasicBlock):
        shortcut = projection(4, 6, 2, norm) if project else None
        made.append(block(4, 6 if project else 4, 2 if project else 1, downsample=shortcut, norm_layer=norm).double())
    ours, stock = made
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            randomise_norms(module)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def images(batch: int = 2, size: int = 40, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step(model: Callable[[Tensor], Tensor], x: Tensor, owner: nn.Module | None = None) -> dict[str, Tensor]:
    """One forward and backward of ``model``; the output, all gradients and buffers (of ``owner``) by name."""
    owner = owner or model  # type: ignore[assignment]
    owner.zero_grad(set_to_none=True)  # type: ignore[union-attr]
    x = x.detach().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    (out * weights).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x grad": x.grad}
    found |= {f"{n} grad": p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}  # type: ignore
    return found | {name: b.clone() for name, b in owner.named_buffers()}  # type: ignore[union-attr]


def assert_same(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        size = expected.abs().max().item() if expected.is_floating_point() and expected.numel() else 1.0
        atol = 1e-10 * max(size, 1e-3)
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_step(ours: nn.Module, stock: nn.Module, x: Tensor) -> None:
    assert_same(step(ours, x), step(stock, x))
