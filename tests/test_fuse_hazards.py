"""``fuse`` on forwards that a careless conversion would change; what cannot be proven is left with a reason."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from fuse_cases import assert_same, randomised, step, torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resnet_fused.convert import fuse


class Hazard(nn.Module):
    reason: str | None = None
    trains = True  # whether stock's own backward survives the in-place operation

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.calls = 0


class DiscardedInPlaceReLU(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        self.relu(y)
        return y


class InPlaceReLUOfInput(Hazard):
    def forward(self, x):
        shortcut = x * 1
        y = self.bn2(self.conv(self.relu(shortcut)))
        y += shortcut
        return F.relu(y)


class ResidualChangedInPlace(Hazard):
    reason = "no ReLU follows"

    def forward(self, x):
        y = x * 1
        z = self.bn(y * 2)
        y += z
        return torch.relu(y) + z


class MainPathAddedIntoResidual(Hazard):
    trains = False

    def forward(self, x):
        x = x * 1
        y = x
        y += self.bn(self.conv(x))
        return self.relu(y) + self.bn2(x)


class UsedAfterInPlaceAdd(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = y
        y += x
        return F.relu(y) * z


class InputChangedBetween(Hazard):
    trains = False

    def forward(self, x):
        x = x * 1
        y = self.bn(x)
        x.mul_(2)
        return self.relu(y) + x


class ConvWithTwoUsers(Hazard):
    reason = "the output of conv is used elsewhere too"

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class CalledTwice(Hazard):
    reason = "called more than once"

    def forward(self, x):
        return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))


class NoGrad(Hazard):
    reason = "context manager"

    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn2(self.conv2(y)))


class Autocast(Hazard):
    reason = "context manager"

    def forward(self, x):
        with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
            y = self.bn(self.conv(x))
        return F.relu(y.to(x.dtype))


class RandomBranch(Hazard):
    reason = "random"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if random.random() < 0.5 else y


class WritesAttribute(Hazard):
    reason = "changes attributes (calls)"

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn(self.conv(x)))


class Checkpointed(Hazard):
    reason = "checkpointing"

    def forward(self, x):
        return checkpoint(lambda z: F.relu(self.bn(self.conv(z))), x, use_reentrant=False)


class TrainingBranch(Hazard):
    reason = "differs between train and eval"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if self.training else y


class DataDependent(Hazard):
    reason = "cannot be traced"

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if y.sum() > 0 else y


class ScaledAdd(Hazard):
    def forward(self, x):
        return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


class SameOperandTwice(Hazard):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)


class CircularPadding(Hazard):
    reason = "not the output of a plain Conv2d"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.bn(self.conv(x))


HAZARDS = list(Hazard.__subclasses__())


@pytest.mark.parametrize("cls", HAZARDS)
def test_hazards(cls: type[Hazard]) -> None:
    torch.manual_seed(0)
    stock = randomised(cls()).double()
    attributes = dict(stock.__dict__)
    ours = fuse(copy.deepcopy(stock))
    report = ours.fusion_report
    assert cls.reason is None or any(cls.reason in reason for _, reason in report.left), str(report)
    assert {k: v for k, v in ours.__dict__.items() if isinstance(v, (int, bool))} == {
        k: v for k, v in attributes.items() if isinstance(v, (int, bool))
    }
    results = []
    for model in (ours, stock):
        random.seed(0)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if cls.trains:
            results.append([tensor for tensors in step(model, x) for tensor in tensors])
        else:
            with torch.no_grad():
                results.append([model.train()(x.clone()), model.eval()(x.clone()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours.calls == stock.calls


def test_an_input_that_stock_changes_in_place_is_changed() -> None:
    class Block(Hazard):
        def forward(self, x):
            x += self.bn(self.conv(x))
            return F.relu(x)

    stock = Block().eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(1, 4, 8, 8)
    changed, expected = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(ours(changed), stock(expected))
    torch.testing.assert_close(changed, expected)


def test_an_in_place_add_keeps_its_dtype_under_autocast() -> None:
    stock = torchvision.models.resnet.BasicBlock(8, 8).eval()
    ours = fuse(copy.deepcopy(stock))
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, result = stock(x), ours(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_a_module_shared_by_two_parents() -> None:
    class Block(Hazard):
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()
            self.b.conv = self.a.conv

        def forward(self, x):
            return self.b(self.a(x))

    stock = randomised(Pair()).double()
    ours = fuse(copy.deepcopy(stock))
    assert ours.a.conv is ours.b.conv
    assert len(ours.fusion_report.fused) == 2
    assert_same(ours, stock, torch.randn(2, 4, 8, 8, dtype=torch.float64))
