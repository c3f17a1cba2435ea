"""The predicted table of units: bytes counted by hand, the step's totals, and the table's own arithmetic."""

from __future__ import annotations

import csv
import dataclasses
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import predict_units  # noqa: E402
import unit_passes  # noqa: E402
from network_units import Block, Network, Unit, read_network  # noqa: E402
from predict_units import RATIOS, Setting, predict_rows  # noqa: E402
from unit_passes import PLANS, Pass, passes  # noqa: E402

from resnet_fused.networks import stock_model  # noqa: E402
from resnet_fused.plans import choice  # noqa: E402

SETTING = Setting("resnet50", "H200", "bf16", 256, 224)
# Batch 256 at 224², bf16, 4.3 TB/s, 790 TFLOP/s: the same roofline counted by hand, with every expanding 1×1 convolution under
# the covariance plan. GB and ms.
BY_HAND = {
    ("resnet50", "stock"): (121.3, 31.25),
    ("resnet50", "inductor"): (91.3, 24.28),
    ("resnet50", "ours"): (48.4, 14.45),
    ("resnet50", "ours_own_conv3x3"): (44.0, 12.99),
    ("resnet101", "stock"): (181.7, 48.83),
    ("resnet101", "inductor"): (136.9, 38.41),
    ("resnet101", "ours"): (73.4, 23.66),
    ("resnet101", "ours_own_conv3x3"): (66.9, 21.39),
    ("resnet18", "stock"): (27.0, 8.39),
    ("resnet18", "inductor"): (20.7, 6.91),
}


@functools.cache
def network_of(name: str) -> Network:
    with choice.covariance("always"):
        return read_network(name, 256, 224)


def roofline(found: list[Pass]) -> tuple[float, float]:
    """GB and ms."""
    moved = sum(p.bytes for p in found) / 1e9
    return moved, 1e3 * sum(max(predict_units.bound(p, SETTING).values()) for p in found)


def more_than_by_hand(network: Network, plan: str) -> float:
    """GB that the library moves and the count by hand does not.

    In front of cuDNN's 3×3, the activation is formed again in the backward and the gradient at the raw output is materialised.
    Where own 3×3 kernels do not take a stride, all of what they fuse by hand is a pass: five over the 3×3's input, two over its
    output.
    """
    moved = 0.0
    for conv1, conv2, _ in (block.path for block in network.blocks if not block.pooled):
        if plan == "ours":
            moved += 2 * conv1.y
        elif conv2.stride > 1:
            moved += 5 * conv1.y + 2 * conv2.y
    return moved / 1e9


def check_totals(name: str, plan: str) -> None:
    # By hand the coupling is multiplied in one part.
    with mock.patch.object(unit_passes, "feedback_flops", unit_passes.gram_flops):
        gigabytes, ms = roofline(list(passes(network_of(name), plan)))
    by_hand_gb, by_hand_ms = BY_HAND[name, plan]
    more = more_than_by_hand(network_of(name), plan) if plan.startswith("ours") else 0.0
    assert gigabytes - more == pytest.approx(by_hand_gb, rel=5e-3)
    # All of it is bound by memory.
    assert ms - more / SETTING.device.bandwidth * 1e12 == pytest.approx(by_hand_ms, rel=1e-2)


@pytest.mark.parametrize(("name", "plan"), BY_HAND, ids=[f"{name}-{plan}" for name, plan in BY_HAND])
def test_totals_agree_with_the_count_by_hand(name, plan):
    check_totals(name, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_any_forgotten_pass_is_noticed(plan, monkeypatch):
    complete = PLANS[plan]
    for forgotten in {p.label for block in network_of("resnet50").blocks for p in complete(block)}:

        def forgetful(block: Block, forgotten: str = forgotten) -> Iterator[Pass]:
            return (p for p in complete(block) if p.label != forgotten)

        monkeypatch.setitem(unit_passes.PLANS, plan, forgetful)
        with pytest.raises(AssertionError):
            check_totals("resnet50", plan)


def test_bytes_of_a_projection_block_by_hand():
    """layer1.0 at batch 1: 64 → 64 → 64 → 256 channels on 56², the projection 64 → 256."""
    network = read_network("resnet50", 1, 224)
    narrow, wide = 56 * 56 * 64 * 2, 56 * 56 * 256 * 2
    small, large = 64 * 64 * 2, 64 * 256 * 2  # filters
    bits = wide / 16
    found = {plan: [p for p in passes(network, plan) if p.unit.name.startswith("layer1.0")] for plan in PLANS}

    def moved(plan: str, unit: str) -> float:
        return sum(p.bytes for p in found[plan] if p.unit.name == f"layer1.0.{unit}")

    products = 3 * (narrow + wide) + 4 * large  # fprop, dgrad, wgrad with its gradient in float32
    assert moved("stock", "conv3") == products + (1 + 2 + 3 + 2) * wide + (3 + 2 + 3) * wide
    assert moved("inductor", "conv3") == products + (1 + 3) * wide + (5 + 3) * wide
    assert moved("inductor", "downsample.0") == products + 1 * wide + (1 + 2) * wide
    gram, fprop = narrow, narrow + large + narrow + large + wide + bits  # both products in one kernel
    wgrad, dgrad = wide + bits + narrow + 2 * large, wide + bits + large + 2 * narrow
    wgrad += narrow + 2 * large  # of both products, in one kernel
    assert moved("ours", "conv3") == moved("ours_own_conv3x3", "conv3") == gram + fprop + wgrad + dgrad
    assert moved("ours", "downsample.0") == gram + dgrad + narrow  # its dgrad adds to conv1's
    own_conv1 = 2 * narrow + small + (2 * narrow + narrow + 2 * small) + (2 * narrow + small + narrow)
    assert moved("ours_own_conv3x3", "conv1") == own_conv1


def test_flops_of_the_network():
    units = network_of("resnet50").units
    assert sum(u.flops for u in units) / 256 == pytest.approx(2 * 4.087e9, rel=1e-3)  # 4.09 GMAC an image
    trained = sum(p.flops for p in passes(network_of("resnet50"), "inductor"))
    assert trained == pytest.approx(
        3 * sum(u.flops for u in units) - units[0].flops, rel=1e-3
    )  # the image needs no dgrad


@pytest.mark.parametrize("name", ["resnet18", "resnet101", "resnext50_32x4d"])
def test_every_convolution_occurs_once(name):
    with torch.device("meta"):
        model = stock_model(name)
    convolutions = {label: m for label, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    network = read_network(name, 2, 64)
    assert sorted(u.name for u in network.units) == sorted(convolutions)
    for u in network.units:
        assert u.weight == 2 * convolutions[u.name].weight.numel()
    for plan in PLANS:
        assert {p.unit for p in passes(network, plan)} == {*network.units, network.head}
    rows = predict_rows(dataclasses.replace(SETTING, network=name, batch=2, image_size=64))
    assert sum(row["occurrences"] for row in rows) == len(convolutions) + 1


def test_every_plan_convolves_forward_and_backward():
    """Each convolution's three products, each at least once in flop; the stem's two."""
    for plan in PLANS:
        for name in ("resnet18", "resnet50"):
            network = network_of(name)
            of: dict[Unit, float] = dict.fromkeys(network.units, 0.0)
            for p in passes(network, plan):
                if p.unit in of:
                    of[p.unit] += p.flops
            for block in network.blocks:
                enough = sum((2 if block.pooled else 3) * u.flops for u in block.units)
                assert sum(of[u] for u in block.units) >= enough


def test_rows_and_totals():
    rows = predict_rows(SETTING)
    for row in rows:
        assert row[RATIOS[0]] == row["predicted_us_ours"] / row["predicted_us_inductor"]
        assert row[RATIOS[1]] == row["predicted_us_ours_own_conv3x3"] / row["predicted_us_inductor"]
        for plan in ("ours", "ours_own_conv3x3"):
            assert row[f"predicted_us_{plan}_bound"] <= row[f"predicted_us_{plan}"]
    step, network = predict_units.by_stage(rows)["training step"], SETTING.read()
    for plan, column in (("inductor", "predicted_us_inductor"), ("ours", "predicted_us_ours_bound")):
        gigabytes, ms = roofline(passes(network, plan))
        assert (step[f"predicted_gb_{plan}"], step[column] / 1e3) == pytest.approx((gigabytes, ms))
    assert step[RATIOS[0]] == step["predicted_us_ours"] / step["predicted_us_inductor"]


def test_the_script_writes_a_table_and_a_page_that_say_predicted(tmp_path):
    table, page = tmp_path / "units.csv", tmp_path / "page.md"
    arguments = ["--network", "resnet18", "--batch", "8", "--image-size", "64", "--gpu", "A100", "--dtype", "fp16"]
    paths = ["--results-file", str(table), "--markdown", str(page)]
    # A module that cannot be imported stands for an installation without Triton.
    code = f"import sys; sys.modules['triton'] = None; sys.path.insert(0, {str(BENCHMARKS)!r}); "
    code += "import predict_units; predict_units.main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "predicted: resnet18, training step, batch 8, 64×64, fp16, A100" in done.stdout
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["resnet18"] * len(rows)
    assert sum(int(row["occurrences"]) for row in rows) == 21
    for row in rows:
        quotient = float(row["predicted_us_ours"]) / float(row["predicted_us_inductor"])
        assert float(row[RATIOS[0]]) == pytest.approx(quotient, rel=1e-2)
        assert row["unit"] in page.read_text(encoding="utf-8")
    assert "**predicted**; none was measured" in page.read_text(encoding="utf-8")
