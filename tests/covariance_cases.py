"""Inputs that are hard for statistics told from a covariance, and the errors of ours and of stock against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import functional
from resnet_fused.backends.kernels import Kernels
from resnet_fused.backends.operands import Conv
from resnet_fused.testing import max_error

MEANS = (0.0, 1.0, 10.0, 60.0, 1000.0)
DELTAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
GAMMAS = ("zero", "denormal", "negative")


@dataclass(frozen=True)
class Case:
    """A 1×1 convolution with batch norm, ``C`` to ``K`` channels, ``M = N·H·W`` rows.

    Attributes:
        mean: of each input channel over its deviation.
        delta: below 1 the channels are a shared signal plus ``delta`` times noise, and the rows of W sum to zero.
        gradient_mean: the upstream gradient is that times a mean of each channel, plus noise.
        gamma: what some of the norm's weights are: "zero", "denormal" or "negative".
        residual: with it a ReLU follows, each channel clearly open or shut, so that both sides have one mask.
    """

    mean: float = 0.0
    delta: float = 1.0
    gradient_mean: float = 0.0
    gamma: str = ""
    residual: bool = False
    rows: tuple[int, int, int] = (4, 24, 24)
    channels: tuple[int, int] = (32, 128)

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        (n, h, w), (c, k) = self.rows, self.channels
        x = noise(n, c, h, w)
        weight = noise(k, c, 1, 1) / c**0.5
        if self.delta < 1:
            x = noise(n, 1, h, w) + self.delta * x
            weight = weight - weight.mean(1, keepdim=True)
        x = x + self.mean * noise(1, c, 1, 1).sign()
        gamma = 0.5 + torch.rand(k, generator=generator, dtype=torch.float64)
        if self.gamma:
            gamma[::3] = {"zero": 0.0, "denormal": 1e-40, "negative": -0.7}[self.gamma]
        grad = noise(n, k, h, w) + self.gradient_mean * noise(1, k, 1, 1)
        made = {"x": x, "weight": weight, "grad": grad}
        if self.residual:
            made["residual"] = noise(n, k, h, w).clamp(-2, 2) + 12 * noise(1, k, 1, 1).sign()
        made = {name: t.to(dtype).contiguous(memory_format=torch.channels_last) for name, t in made.items()}
        vector = torch.float64 if dtype == torch.float64 else torch.float32
        return made | {"gamma": gamma.to(vector), "beta": (0.3 * noise(k)).to(vector)}


def results(case: Case, tensors: dict[str, Tensor], ours: bool) -> dict[str, Tensor]:
    """Output, running statistics of this batch, and every gradient."""
    leaves = {name: t.clone(memory_format=torch.preserve_format).requires_grad_() for name, t in tensors.items()}
    grad = leaves.pop("grad").detach()
    x, weight, gamma, beta = (leaves[name] for name in ("x", "weight", "gamma", "beta"))
    residual = leaves.get("residual")
    mean, var = torch.zeros_like(gamma).detach(), torch.ones_like(gamma).detach()
    if ours:
        options = {"training": True, "momentum": 1.0, "relu": case.residual, "residual": residual}
        out = functional.conv_bn_relu(x, weight, gamma, beta, mean, var, **options)
    else:
        out = F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta, True, 1.0)
        out = out if residual is None else F.relu(out + residual)
    out.backward(grad)
    return {"out": out.detach(), "mean": mean, "var": var} | {f"d{name}": t.grad for name, t in leaves.items()}


def three(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], ...]:
    """Ours, stock and float64, of the same (rounded) values."""
    tensors = case.tensors(dtype, seed)
    exact = {name: t.double() for name, t in tensors.items()}
    return results(case, tensors, True), results(case, tensors, False), results(case, exact, False)


def relative_error(t: Tensor, exact: Tensor) -> float:
    """Norm-wise; against the largest possible, where the exact result is zero."""
    size = exact.norm().item()
    return (t.double() - exact).norm().item() / (size if size > 0 else 1.0)


def sweep() -> dict[tuple[str, str], Case]:
    """Every point, by the name of its sweep and its place in it."""
    points: dict[tuple[str, str], Case] = {}
    for mean in MEANS:
        points["mean/σ", f"{mean:g}"] = Case(mean=mean)
    for delta in DELTAS:
        points["correlation δ", f"{delta:g}"] = Case(delta=delta)
    points["gradient", "10·mean + noise"] = Case(gradient_mean=10)
    points["gradient", "10·mean + noise, mean/σ = 10"] = Case(gradient_mean=10, mean=10)
    for gamma in GAMMAS:
        points["γ", gamma] = Case(gamma=gamma)
    points["residual", "ReLU"] = Case(residual=True)
    points["residual", "ReLU, all at once"] = Case(
        mean=10, delta=1e-2, gradient_mean=10, gamma="negative", residual=True
    )
    return points


def check_input_gradient(dtype: torch.dtype, delta: float, draws: int) -> None:
    """Of correlated channels, over few rows, where a rounding of the coupling shows most: the error's median over some draws,
    as stock's own is a few roundings, at most twice that."""
    case, shares = Case(delta=delta, rows=(1, 9, 8), channels=(16, 64)), []
    for seed in range(draws):
        ours, stock, exact = three(case, dtype, seed)
        shares.append(max_error(ours["dx"], exact["dx"]) / max_error(stock["dx"], exact["dx"]))
    assert torch.tensor(shares).median() <= 2, shares


def check_constant(kernels: Kernels, dtype: torch.dtype, strided: bool) -> None:
    """``dgrad_bn_act`` in half precision: a large mean of A leaves nothing of itself in dA."""
    c, k, conv = 16, 24, Conv((2, 2) if strided else (1, 1))
    a = (30 + torch.randn(2, c, 9, 9)).to(dtype).contiguous(memory_format=torch.channels_last)
    rows_of_a = a[:, :, :: conv.stride[0], :: conv.stride[1]].permute(0, 2, 3, 1)
    grad = torch.randn(2, k, *rows_of_a.shape[1:3]).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, coupling = (0.1 * torch.randn(k, c)).to(dtype), 0.1 * torch.randn(c, c)
    mean_a, mean_dz = rows_of_a.double().mean((0, 1, 2)), grad.double().mean((0, 2, 3))
    acc = torch.zeros_like(a) if strided else None
    feedback = kernels.feedback_of(a, mean_a.float(), coupling, weight, mean_dz.float())
    found = kernels.dgrad_bn_act(grad, None, weight, conv, feedback, acc)
    found = found[:, :, :: conv.stride[0], :: conv.stride[1]].permute(0, 2, 3, 1)
    exact = (grad.permute(0, 2, 3, 1).double() - mean_dz) @ weight.double()
    exact += (rows_of_a.double() - mean_a) @ coupling.double()
    size = rows_of_a.double().abs() @ coupling.double().abs()
    assert ((found - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 2.0**-19 * size).all()
