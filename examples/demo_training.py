"""Train a ResNet-18 twice from the same seed on the same batches: stock blocks, then fused blocks.

Data: scikit-learn's ``digits``, 1,797 labelled pictures of handwritten digits, 8×8, enlarged to 32×32.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused import networks
from resnet_fused.console import print_table, progress_bar

TRAINING_NOISE = "rounding parts the curves within a few steps, as it does two runs of stock in different layouts"


@dataclass
class Run:
    """What one training gave."""

    losses: list[float]
    accuracy: float
    training_s: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels); images are ``float32 [N, 3, 32, 32]`` in 0 … 1."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()
    parts = train_test_split(images.numpy(), labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x, train_y.long(), test_x, test_y.long()


def train(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, batch: int, advance) -> Run:
    """SGD with momentum and a one-cycle learning rate; the order of the batches is fixed by a seed."""
    train_x, train_y, test_x, test_y = (
        part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part for part in data
    )
    steps = len(train_x) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=epochs * steps)
    order = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    begin = time.perf_counter()
    for _ in range(epochs):
        shuffled = torch.randperm(len(train_x), generator=order)
        for step in range(steps):
            chosen = shuffled[step * batch : (step + 1) * batch]
            x = train_x[chosen].contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), train_y[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            advance()
    training_s = time.perf_counter() - begin
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(test_x.split(64), test_y.split(64), strict=True)
        )
    return Run(losses, right / len(test_y), training_s)


def draw(runs: dict[str, Run], path: Path) -> None:
    """Both loss curves, in one picture."""
    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=False):
        axes.plot(run.losses, style, label=f"{name}: {100 * run.accuracy:.1f} % on the test set", linewidth=1.2)
    axes.set(
        xlabel="step",
        ylabel="training loss",
        yscale="log",
        title="ResNet-18 on handwritten digits, same seed, same batches",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()

    data = digits()
    torch.manual_seed(0)
    stock = networks.stock_model("resnet18", num_classes=10)
    fused = resnet_fused.resnet18(num_classes=10)
    fused.load_state_dict(stock.state_dict())
    models = {name: model.to(memory_format=torch.channels_last) for name, model in (("stock", stock), ("fused", fused))}
    runs: dict[str, Run] = {}
    with progress_bar() as progress:
        for name, model in models.items():
            task = progress.add_task(f"training, {name}", total=options.epochs * (len(data[0]) // options.batch))
            runs[name] = train(model, data, options.epochs, options.batch, lambda task=task: progress.advance(task))

    print_table(
        f"ResNet-18, {len(data[0])} training and {len(data[2])} test pictures of digits, {options.epochs} epochs",
        ["", "test accuracy", "first loss", "mean of last 20", "training time", "to stock"],
        [
            (
                name,
                f"{100 * run.accuracy:.2f} %",
                f"{run.losses[0]:.5f}",
                f"{sum(run.losses[-20:]) / len(run.losses[-20:]):.5f}",
                f"{run.training_s:.1f} s",
                f"{runs['stock'].training_s / run.training_s:.2f}×",
            )
            for name, run in runs.items()
        ],
        right=(1, 2, 3, 4, 5),
        caption=f"stock: {networks.stock_source()}; {TRAINING_NOISE}",
    )
    path = options.output / "loss_curves.png"
    draw(runs, path)
    print(f"loss curves: {path}")


if __name__ == "__main__":
    main()
