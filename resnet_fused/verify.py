"""``resnet-fused verify``: is this package as accurate as stock PyTorch on this machine?

Every tensor (the output; in training also the gradient of each parameter and the running statistics) is compared with a
float64 run of stock PyTorch, once for this package and once for stock PyTorch in the same dtype:

    error(ours) ≤ slack · error(stock) + floor,    error(t) = ‖t − t64‖ / ‖t64‖

A training step multiplies roundings by whatever they happen to meet, so one error of stock is a single draw. It is
drawn several times: in both memory layouts, and in training on slightly different pictures with a float64 run for each;
the largest counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import backends, networks
from .console import print_table, progress_bar
from .inference import optimize_for_inference

SLACK = 2.0
FLOOR_ULPS = 4.0
NEGLIGIBLE = 1e-3  # a tensor this much smaller than its fellows is measured against them
DRAWS = 3
NUM_CLASSES = 10
_FORMATS = (torch.contiguous_format, torch.channels_last)
_NAMES = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Comparison:
    """The worst tensor of one kind ("output", "gradient", "statistics") in one case."""

    model: str
    mode: str
    dtype: str
    kind: str
    tensor: str
    ours: float
    stock: float
    limit: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.ours <= self.limit


def _layouts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.contiguous(), x.contiguous(memory_format=torch.channels_last)


def _scale(gold: dict[str, Tensor]) -> float:
    return NEGLIGIBLE * float(torch.stack([exact.double().square().sum() for exact in gold.values()]).mean().sqrt())


def _errors(found: dict[str, Tensor], gold: dict[str, Tensor]) -> dict[str, float]:
    return {name: networks.relative_error(found[name], exact, _scale(gold)) for name, exact in gold.items()}


def _worst(
    case: tuple[str, str, str],
    kind: str,
    ours: dict[str, Tensor],
    stocks: Sequence[dict[str, float]],
    gold: dict[str, Tensor],
    floor: float,
) -> Comparison:
    """The tensor of which ours comes closest to its limit, or furthest beyond it."""
    if ours.keys() != gold.keys():
        odd = sorted(ours.keys() ^ gold.keys())
        return Comparison(*case, kind, odd[0], 0.0, 0.0, 0.0, f"only one side has {', '.join(odd[:3])}")
    worst: Comparison | None = None
    scale = _scale(gold)
    for name, exact in gold.items():
        stock = max(side[name] for side in stocks)
        error = networks.relative_error(ours[name], exact, scale)
        found = Comparison(*case, kind, name, error, stock, SLACK * stock + floor)
        if worst is None or found.ours * worst.limit > worst.ours * found.limit or (not found.passed and worst.passed):
            worst = found
    assert worst is not None
    return worst


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _eval_case(case: tuple[str, str, str], source: nn.Module, x: Tensor, dtype: torch.dtype) -> Iterator[Comparison]:
    x, floor = x.to(dtype), FLOOR_ULPS * torch.finfo(dtype).eps
    stock = copy.deepcopy(source).to(dtype).eval()
    ours = networks.copy_of(case[0], source.state_dict(), NUM_CLASSES, fused=True).to(x.device).eval()
    with torch.inference_mode():
        stocks = [networks.in_layout(stock, m)(view) for m, view in zip(_FORMATS, _layouts(x), strict=True)]

        # Folding rounds the folded weights once, so its gold keeps the weights unrounded.
        exact = networks.double_copy(source).eval()(x.double())
        found = {"logits": optimize_for_inference(copy.deepcopy(ours), dtype)(x)}
        errors = [_errors({"logits": out}, {"logits": exact}) for out in stocks]
        yield _worst(case, "optimized", found, errors, {"logits": exact}, floor)

        # The plain modules hold the same rounded weights on every side: their rounding is no part of the comparison.
        exact = networks.double_copy(stock)(x.double())
        ours = ours.to(dtype)
        found = {f"logits, {name} input": ours(view) for name, view in zip(_NAMES, _layouts(x), strict=True)}
        gold = dict.fromkeys(found, exact)
        yield _worst(case, "output", found, [_errors(dict.fromkeys(found, out), gold) for out in stocks], gold, floor)


def _train_case(
    case: tuple[str, str, str], source: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype
) -> Iterator[Comparison]:
    """One training step; parameters are float32 (float64 for fp64), autocast does the rest, as users run it."""
    source = copy.deepcopy(source).to(torch.float64 if dtype == torch.float64 else torch.float32).train()
    networks.hold_clear_of_kinks(source)
    x = x.to(next(source.parameters()).dtype)

    def results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        out = networks.training_step(model, x, target, dtype)
        return {"output": {"logits": out}, "gradient": _gradients(model), "statistics": _statistics(model)}

    gold = results(networks.double_copy(source), x.double(), torch.float64)
    step = results(copy.deepcopy(source), x, dtype)
    stocks = [{kind: _errors(step[kind], gold[kind]) for kind in gold}]
    for _ in range(DRAWS - 1):
        nearby = (x + 0.01 * torch.randn_like(x)).contiguous(memory_format=torch.channels_last)
        exact = results(networks.double_copy(source), nearby.double(), torch.float64)
        step = results(networks.in_layout(copy.deepcopy(source), torch.channels_last), nearby, dtype)
        stocks.append({kind: _errors(step[kind], exact[kind]) for kind in gold})
    ours = networks.copy_of(case[0], source.state_dict(), NUM_CLASSES, fused=True).to(x.device, x.dtype).train()
    found = results(ours, x, dtype)
    floor = FLOOR_ULPS * torch.finfo(dtype).eps
    for kind in gold:
        yield _worst(case, kind, found[kind], [side[kind] for side in stocks], gold[kind], floor)


def compare(
    model: str, mode: str, dtype: str, *, device: str = "cpu", batch: int = 4, image_size: int = 64
) -> list[Comparison]:
    """All comparisons of one network, mode ("eval" or "train") and dtype; an exception becomes a failed comparison."""
    torch.manual_seed(0)
    source = networks.stock_model(model, NUM_CLASSES).to(device)
    x = torch.randn(batch, 3, image_size, image_size).to(device)
    target = (torch.arange(batch) % NUM_CLASSES).to(device)
    networks.calibrate(source, x)
    case = (model, mode, dtype)
    try:
        if mode == "eval":
            return list(_eval_case(case, source, x, networks.DTYPES[dtype]))
        return list(_train_case(case, source, x, target, networks.DTYPES[dtype]))
    except Exception as error:  # whatever goes wrong is a row of the report, and the other rows still count
        return [Comparison(*case, "run", "", 0.0, 0.0, 0.0, f"{type(error).__name__}: {str(error).splitlines()[0]}")]


def _rows(comparisons: list[Comparison]) -> Iterator[tuple[list[str], str | None]]:
    for c in comparisons:
        numbers = ["", "", ""] if c.problem else [f"{c.ours:.2e}", f"{c.stock:.2e}", f"{c.limit:.2e}"]
        verdict = "ok" if c.passed else "FAILED"
        yield [c.model, c.mode, c.dtype, c.kind, *numbers, verdict, c.problem or c.tensor], None if c.passed else "red"


def run(
    models: Sequence[str],
    dtypes: Sequence[str],
    modes: Sequence[str] = ("eval", "train"),
    *,
    device: str = "cpu",
    batch: int = 4,
    image_size: int = 64,
) -> int:
    """Compare, print the table; 0 when everything passed, else 1."""
    cases = [(model, mode, dtype) for model in models for mode in modes for dtype in dtypes]
    comparisons: list[Comparison] = []
    with progress_bar() as progress:
        task = progress.add_task("verify", total=len(cases))
        for model, mode, dtype in cases:
            progress.update(task, description=f"{model} {mode} {dtype}")
            comparisons += compare(model, mode, dtype, device=device, batch=batch, image_size=image_size)
            progress.advance(task)
    rows = list(_rows(comparisons))
    print_table(
        f"relative error against float64, backend {backends.choose(torch.device(device))} on {device}",
        ["model", "mode", "dtype", "what", "ours", "stock", "limit", "", "worst tensor"],
        [row for row, _ in rows],
        right=(4, 5, 6),
        styles=[style for _, style in rows],
        caption=f"stock: {networks.stock_source()}; limit: {SLACK:g} x stock + {FLOOR_ULPS:g} ulps",
    )
    failed = sum(not c.passed for c in comparisons)
    print(
        f"{len(comparisons) - failed} of {len(comparisons)} comparisons passed"
        + (f", {failed} FAILED" if failed else "")
    )
    return 1 if failed else 0
