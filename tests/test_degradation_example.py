"""examples/degradation.py and examples/bias_before_norm.py on tiny data, and the facts that they rest on."""

from __future__ import annotations

import csv
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused import BasicBlock, resnet18

pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import bias_before_norm
import degradation
from degradation import Network, PaddedIdentity, PlainBlock
from fashion_mnist import Split


def write_data(folder: Path, training: int) -> Path:
    folder.mkdir()
    for part, count in (("train", training), ("t10k", 50)):
        arrays = {
            "images-idx3": torch.randint(256, (count, 28, 28), dtype=torch.uint8),
            "labels-idx1": torch.randint(10, (count,), dtype=torch.uint8),
        }
        for kind, values in arrays.items():
            header = bytes((0, 0, 8, values.dim())) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "fashion", 520)


def split(count: int) -> Split:
    return Split(torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (count,)))


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (44, 0.66), (110, 1.73)])
def test_sizes_are_those_of_the_paper(depth: int, millions: float):
    """He et al., table 6, there with three channels at the input: 288 weights more."""
    network = Network(BasicBlock, depth)
    weights = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == depth
    parameters = sum(p.numel() for p in network.parameters()) + 288
    assert round(parameters / 1e6, 2) == millions


def test_plain_and_residual_start_from_the_same_weights():
    values = []
    for block in (PlainBlock, BasicBlock):
        torch.manual_seed(3)
        values.append(Network(block, 14, 4).state_dict())
    plain, residual = values
    assert list(plain) == list(residual)
    assert all(torch.equal(plain[key], residual[key]) for key in plain)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_depth_that_no_network_has(depth: int):
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2, as 8, 14, 20, got {depth}"):
        Network(BasicBlock, depth)


def stock_answers(block: BasicBlock, x: Tensor, dy: Tensor, *, residual: bool) -> list[Tensor]:
    y = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)(x)
    if residual:
        missing = y.shape[1] - x.shape[1]
        stride = block.conv1.stride[0]
        shortcut = torch.zeros_like(y)
        shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
        assert missing == 0 or float(shortcut[:, -missing:].detach().abs().max()) == 0
        y = y + shortcut
    return answers(F.relu(y), x, dy, block)


def answers(y: Tensor, x: Tensor, dy: Tensor, block: BasicBlock) -> list[Tensor]:
    parameters = list(block.parameters())
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy), block.bn1.running_mean, block.bn2.running_var]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_class", [PlainBlock, BasicBlock])
def test_blocks_equal_stock_modules(block_class: type[BasicBlock], stride: int):
    channels = 5 * stride
    block = block_class(5, channels, stride, PaddedIdentity(5) if stride == 2 else None).double()
    stock = deepcopy(block)
    x = torch.randn(3, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    y = block(x)
    dy = torch.randn_like(y)
    expected = stock_answers(stock, x, dy, residual=block_class is BasicBlock)
    for ours, theirs in zip(answers(y, x, dy, block), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_learning_rate():
    rates = [degradation.share_of_peak(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) > 0.97 and rates.index(max(rates)) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.001


def test_smoothed():
    losses = torch.rand(100).tolist()
    means = [sum(part) / len(part) for part in (losses[max(0, end - 2) : end] for end in range(1, 101))]
    assert degradation.smoothed(losses) == pytest.approx(means)


def test_probe():
    pictures = split(2 * degradation.PROBE)
    twice = Split(*(torch.cat([part[: degradation.PROBE]] * 2) for part in pictures))
    network = Network(BasicBlock, 8, 4)
    before = deepcopy(network.state_dict())
    found = degradation.probe(network, pictures)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert len(found.size) == len(found.agreement) == 7
    assert degradation.probe(network, twice).agreement == pytest.approx([1] * 7, abs=1e-4)
    assert all(abs(cosine) < 0.99 for cosine in found.agreement)
    with torch.no_grad():
        for conv in degradation.convolutions(network):
            conv.weight.mul_(8)
    scaled = degradation.probe(network, pictures)  # batch norm takes the scale out, but for its eps
    assert scaled.size == pytest.approx(found.size, rel=0.02)


def test_script(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "new" / "curves.png"
    arguments = ["--data", str(data), "--depths", "14", "8", "--width", "4", "--epochs", "2"]
    degradation.main([*arguments, "--processes", "1", "--output", str(picture)])
    shown = capsys.readouterr().out
    assert "16 steps of 64 pictures" in shown and "residual, 14 layers" in shown
    assert sorted(path.name for path in picture.parent.iterdir()) == ["curves.csv", "curves.png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with open(picture.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "plain-14", "residual-14", "plain-8", "residual-8"]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 17)]
    losses = {name: [float(row[name]) for row in rows] for name in list(rows[0])[1:]}
    assert all(1 < loss < 6 for column in losses.values() for loss in column)
    assert len({tuple(column) for column in losses.values()}) == 4


@pytest.mark.slow
def test_networks_trained_at_once_are_those_trained_alone(data: Path, tmp_path: Path):
    written = []
    for processes in ("1", "2"):
        picture = tmp_path / f"{processes}.png"
        arguments = ["--data", str(data), "--depths", "8", "14", "--width", "4", "--processes", processes]
        degradation.main([*arguments, "--output", str(picture)])
        written.append(picture.with_suffix(".csv").read_text())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "8", "15"], "expected 6n + 2 layers, as 8, 14, 20, got 15"),
        (["--depths", "8", "8"], "--depths: expected two different ones, got 8 twice"),
        (["--output", "curves.jpg"], "--output: expected a name that ends in .png, got curves.jpg"),
        (["--data", "nowhere"], "--data: nowhere: has no train-images-idx3-ubyte"),
        (["--data", "few"], "--data: expected at least 512 training pictures, got 500"),
    ],
)
def test_errors(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys):
    write_data(tmp_path / "few", 500)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        degradation.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "curves.csv"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), degradation.replacing(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    with degradation.replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"


def test_bias_before_a_frozen_norm_has_a_gradient():
    model = bias_before_norm.with_biases(resnet18(num_classes=10), 0).eval()
    F.cross_entropy(model(torch.randn(2, 3, 28, 28)), torch.tensor([1, 2])).backward()
    assert all(float(conv.bias.grad.norm()) > 0 for conv in bias_before_norm.convolutions(model))


def test_bias_before_norm(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Of no effect up to rounding in stock modules; of none at all, gradient included, where the unit is fused."""
    measured = []
    measure = bias_before_norm.measure
    monkeypatch.setattr(bias_before_norm, "measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    bias_before_norm.main(["--data", str(data), "--batch", "4", "--steps", "2"])
    shown = capsys.readouterr().out
    assert "resnet18 with a bias in every convolution against without, 4 pictures, 2 steps" in shown
    assert "26,560" in shown and "0.10 %" in shown

    stock64, stock32, *fused = measured
    assert max(stock64[:5]) < 1e-11 and max(stock32[:5]) < 5e-3
    for figures in fused:
        in_training, gradient, means, in_evaluation, loss, *_ = figures
        assert (in_training, gradient, loss) == (0, 0, 0)
        assert means < 1e-6 and in_evaluation < 5e-3
    for *_, left, decayed in measured:
        assert left == pytest.approx(decayed, rel=1e-5) and decayed == pytest.approx(0.999**2)


def test_bias_errors(data: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bias_before_norm.main(["--data", str(data), "--batch", "1"])
    assert "at least two pictures" in capsys.readouterr().err
