"""The processor kernels around batch norm against stock PyTorch, per ResNet-50 shape, with their memory throughput.

Every pair is compared with float64 before it is timed. GB/s counts what the kernel has to move (the Traffic line of
``resnet_fused/backends/kernels.py``), for stock too: bytes that stock moves beyond that show as a lower figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends, bench, info, networks
from resnet_fused.console import print_table, progress_bar
from resnet_fused.result_file import append_csv

SHAPES = ((16, 64, 56, 56), (16, 256, 56, 56), (16, 512, 28, 28), (16, 1024, 14, 14), (16, 2048, 7, 7))
EPS = 1e-5


@dataclass(frozen=True)
class Pair:
    """One operation: ours and stock's way to it, the float64 answer, and the tensors of x's size that it moves."""

    op: str
    ours: Callable[[], Tensor]
    stock: Callable[[], Tensor]
    gold: Tensor
    tensors_moved: int


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


def pairs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Pair]:
    """The operations on one shape."""
    kernels = backends.get("cpu")
    x, grad, residual = (_random(shape, dtype, seed) for seed in range(3))
    channels = shape[1]
    weight, bias = torch.linspace(0.5, 1.5, channels), torch.linspace(-0.2, 0.2, channels)
    mean, var = kernels.bn_stats(x)
    rstd = (var + EPS).rsqrt()
    scale = weight * rstd
    shift = bias - scale * mean
    m = x.numel() // channels
    _, mask = kernels.bn_act(x, scale, shift, residual, True, True)

    def stock_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
        return F.relu(y if residual is None else y + residual)

    def ours_backward() -> Tensor:
        # dx = scale·(dz − Σdz/M − x̂·Σ(dz·x̂)/M), written as a·dz + b·(x − mean) + c
        sum_dz, sum_dz_centred, _ = kernels.bn_act_backward_reduce(grad, x, mask, mean, scale, shift, True, False)
        b = -scale * rstd * rstd * sum_dz_centred / m
        return kernels.bn_act_backward(grad, x, mask, mean, scale, shift, True, (scale, b, -scale * sum_dz / m))

    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    out = stock_forward(leaves[0], leaves[1], weight, bias)
    exact = [t.detach().double().requires_grad_() for t in (x, residual)]
    gold = stock_forward(exact[0], exact[1], weight.double(), bias.double())
    # Both sides pass the gradient where ours passed it: a ReLU within one rounding of its kink is no error.
    open_bits = torch.ops.resnet_fused.mask_grad(torch.ones_like(grad), mask).double()
    normalised = F.batch_norm(exact[0], None, None, weight.double(), bias.double(), True, 0.0, EPS)
    (gold_dx,) = torch.autograd.grad(normalised, exact[0], grad.double() * open_bits)

    def ours_forward(residual: Tensor | None) -> Callable[[], Tensor]:
        def call() -> Tensor:
            mean, var = kernels.bn_stats(x)
            scale = weight * (var + EPS).rsqrt()
            return kernels.bn_act(x, scale, bias - scale * mean, residual, True, True)[0]

        return call

    return [
        Pair(
            "bn_stats",
            lambda: kernels.bn_stats(x)[1],
            lambda: torch.var_mean(x, (0, 2, 3), correction=0)[0],
            x.double().var((0, 2, 3), correction=0),
            1,
        ),
        Pair(
            "bn_stats+bn_act",
            ours_forward(None),
            lambda: stock_forward(x, None, weight, bias),
            stock_forward(x.double(), None, weight.double(), bias.double()),
            3,
        ),
        Pair(
            "bn_stats+bn_add_act",
            ours_forward(residual),
            lambda: stock_forward(x, residual, weight, bias),
            gold.detach(),
            4,
        ),
        Pair(
            "bn_add_act backward",
            ours_backward,
            lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0],
            gold_dx,
            5,
        ),
    ]


def _rows(pair: Pair, shape: tuple[int, ...], dtype: str, repeats: int) -> list[dict[str, object]]:
    calls = {"stock": pair.stock, "cpu": pair.ours}
    with torch.no_grad():
        errors = {name: networks.relative_error(call(), pair.gold) for name, call in calls.items()}
    eps = torch.finfo(networks.DTYPES[dtype]).eps
    # Stock's mask may differ from ours at the kink, which makes its error in a backward larger, never smaller.
    if errors["cpu"] > 2 * errors["stock"] + 2 * eps:
        print(f"{pair.op} {shape} {dtype}: WRONG ANSWER, error {errors['cpu']:.1e}", file=sys.stderr)
        return []
    nothing = torch.empty(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        bench.timed_ms(lambda _, call=call: call(), nothing, 3)
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(bench.timed_ms(lambda _, call=call: call(), nothing, 3))
    moved = (
        pair.tensors_moved
        * pair.gold.new_empty(shape, device="meta").numel()
        * torch.empty((), dtype=networks.DTYPES[dtype]).element_size()
    )
    found = info.versions()
    made: list[dict[str, object]] = []
    for name in calls:
        p20, p50, p80 = (
            torch.tensor(samples[name], dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        )
        made.append(
            {
                "op": pair.op,
                "mode": "train",
                "provider": name,
                "shape": "x".join(map(str, shape)),
                "dtype": dtype,
                "layout": "channels_last",
                "p50_ms": f"{p50:.4f}",
                "p20_ms": f"{p20:.4f}",
                "p80_ms": f"{p80:.4f}",
                "gb_per_s": f"{moved / p50 / 1e6:.2f}",
                "device": info.processor(),
                "versions": f"resnet_fused {found['resnet_fused']}; torch {found['torch']}",
                "commit": found["commit"],
                "error_vs_fp64": f"{errors[name]:.2e}",
                "threads": torch.get_num_threads(),
            }
        )
    made[1]["ratio_to_stock"] = f"{float(str(made[0]['p50_ms'])) / float(str(made[1]['p50_ms'])):.3f}"
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--results-file")
    options = parser.parse_args()
    if "cpu" not in backends.available_backends():
        print(f"the processor kernels are not there: {backends.unavailable_backends()['cpu']}", file=sys.stderr)
        return 1
    made: list[dict[str, object]] = []
    expected = 0
    with progress_bar() as progress:
        task = progress.add_task("kernels", total=len(options.dtype) * len(SHAPES))
        for dtype in options.dtype:
            for _, *rest in SHAPES:
                shape = (options.batch, *rest)
                for pair in pairs(shape, networks.DTYPES[dtype]):
                    expected += 2
                    made += _rows(pair, shape, dtype, options.repeats)
                progress.advance(task)
    columns = (
        "op",
        "provider",
        "shape",
        "dtype",
        "p50_ms",
        "p20_ms",
        "p80_ms",
        "gb_per_s",
        "ratio_to_stock",
        "error_vs_fp64",
    )
    print_table(
        f"kernels on {info.processor()}, {torch.get_num_threads()} threads",
        columns,
        [[row.get(column, "") for column in columns] for row in made],
        right=(4, 5, 6, 7, 8, 9),
    )
    if options.results_file:
        append_csv(options.results_file, made)
    return 0 if len(made) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
