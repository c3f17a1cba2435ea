"""Why a convolution in front of batch norm carries no bias: a ResNet is given one in every convolution, and that is measured.

The norm subtracts the batch's mean, so ``bn(conv(x) + bias) = bn(conv(x))`` in training: the loss does not depend on the bias,
its gradient is zero, and only weight decay moves it. The running mean takes the bias in and subtracts it in evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import fashion_mnist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import models, networks
from resnet_fused.arguments import Parser, one_of, positive
from resnet_fused.console import print_table

RATE, WEIGHT_DECAY = 0.1, 0.01
COSTS = ("resnet18", "resnet50", "resnet152")
BYTES = 3 * 4  # a parameter, its gradient and its momentum in fp32
ROWS = (
    "outputs in training",
    "gradients of the biases, to those of the weights",
    "running means: with − without − bias",
    "outputs in evaluation",
    "last loss",
    "biases, to their first value",
    "weight decay alone would leave",
)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def with_biases(model: nn.Module, seed: int) -> nn.Module:
    """A copy with a bias in every convolution, drawn from a normal distribution of deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    model = deepcopy(model)
    for conv in convolutions(model):
        conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=generator).to(conv.weight.dtype))
    return model


def difference(a: Tensor, b: Tensor) -> float:
    """``max |a − b| / max |b|``."""
    return float((a - b).abs().max() / b.abs().max())


def evaluated(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The outputs in evaluation and the running means, on a copy whose running statistics are those of ``x``."""
    model = deepcopy(model)
    for norm in norms(model):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        return model.eval()(x), [norm.running_mean for norm in norms(model)]


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and the loss in training; gradients are left in the parameters."""
    model.zero_grad()
    out = model.train()(x)
    loss = F.cross_entropy(out, labels)
    loss.backward()
    return out.detach(), loss.detach()


def measure(without: nn.Module, x: Tensor, labels: Tensor, steps: int, seed: int) -> list[float]:
    """The figures of ``ROWS``; all but the last two are zero, or zero up to rounding, where the bias is of no effect.

    Args:
        without: a network whose every convolution is followed by a batch norm, and none has a bias; it is trained.
        steps: of gradient descent with weight decay, all on these pictures.
    """
    biased = with_biases(without, seed)
    biases = [conv.bias.detach().clone() for conv in convolutions(biased)]
    out_biased, means_biased = evaluated(biased, x)
    out, means = evaluated(without, x)
    mean = max(difference(a - b, bias) for a, b, bias in zip(means_biased, means, biases))
    in_evaluation = difference(out_biased, out)

    pair = (biased, without)
    optimizers = [torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY) for model in pair]
    in_training = gradient = 0.0
    for step in range(steps):
        (out_biased, loss_biased), (out, loss) = (loss_of(model, x, labels) for model in pair)
        if step == 0:
            in_training = difference(out_biased, out)
            gradient = max(float(conv.bias.grad.norm() / conv.weight.grad.norm()) for conv in convolutions(biased))
        for optimizer in optimizers:
            optimizer.step()
    now = torch.cat([conv.bias.detach() for conv in convolutions(biased)])
    left = float(now.norm() / torch.cat(biases).norm())
    decayed = (1 - RATE * WEIGHT_DECAY) ** steps
    return [in_training, gradient, mean, in_evaluation, difference(loss_biased, loss), left, decayed]


def print_costs() -> None:
    rows = []
    for name in COSTS:
        with torch.device("meta"):
            model = models.BUILDERS[name]()
        channels = sum(conv.out_channels for conv in convolutions(model))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append((name, f"{channels:,}", f"{100 * channels / parameters:.2f} %", f"{BYTES * channels / 1e3:.0f} kB"))
    print_table(
        "What biases would cost",
        ["", "biases", "of the parameters", "with gradient and momentum, fp32"],
        rows,
        right=(1, 2, 3),
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=one_of("model", networks.BUILDERS), default="resnet18")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the four files of Fashion-MNIST")
    options = parser.parse_args(argv)
    try:
        split, _ = fashion_mnist.load(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    if options.batch < 2:
        parser.error("--batch: batch norm needs at least two pictures")

    images = (split.images[: options.batch].double() / 255 - fashion_mnist.MEAN) / fashion_mnist.DEVIATION
    images = images.expand(-1, 3, -1, -1)
    labels = split.labels[: options.batch]
    makers: dict[str, Callable[..., nn.Module]] = {
        "stock": lambda: networks.stock_model(options.model, num_classes=len(fashion_mnist.CLASSES)),
        "fused": lambda: models.BUILDERS[options.model](num_classes=len(fashion_mnist.CLASSES)),
    }
    columns = {}
    for name, make in makers.items():
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(options.seed)
            x = images.to(dtype, memory_format=torch.channels_last)
            columns[f"{name}, {str(dtype)[6:]}"] = measure(make().to(dtype), x, labels, options.steps, options.seed)
    print_table(
        f"{options.model} with a bias in every convolution against without, {options.batch} pictures, {options.steps} steps",
        ["", *columns],
        [
            (
                row,
                *(f"{figure:.5f}" if i >= len(ROWS) - 2 else f"{figure:.1e}" if figure else "0" for figure in figures),
            )
            for i, (row, figures) in enumerate(zip(ROWS, zip(*columns.values())))
        ],
        right=range(1, len(columns) + 1),
        caption=f"differences are of the largest element, relative; stock: {networks.stock_source()}",
    )
    print_costs()


if __name__ == "__main__":
    main()
