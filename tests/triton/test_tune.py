"""``resnet-fused tune`` on a GPU that is not there: configurations of an H200, run by the interpreter, with times made up."""

from __future__ import annotations

import csv
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_workloads import NETWORKS

from resnet_fused import cli, clock, models, networks, tables, tune
from resnet_fused.backends.triton import configs, cost, devices, trial, tuning
from resnet_fused.result_file import COLUMNS
from resnet_fused.workloads import workloads

pytest.importorskip("rich", reason="the command's table needs rich")
BF16 = torch.bfloat16
H200 = devices.DEVICES["H200"]
CPU = torch.device("cpu")


class MadeUpClock:
    """Times that fall from call to call: the last configuration that is measured is the fastest."""

    prepared = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        MadeUpClock.prepared += 1
        us = 1000.0 / MadeUpClock.prepared
        return lambda: us


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An H200 with two configurations a kernel, and two small networks; returns the user's table, which is not there yet."""
    ranked, describe = cost.ranked, devices.describe
    monkeypatch.setattr(cost, "ranked", lambda *question: ranked(*question)[:2])
    monkeypatch.setattr(devices, "describe", lambda device: H200 if device == CPU else describe(device))
    monkeypatch.setattr(clock, "Clock", MadeUpClock)
    monkeypatch.setattr(tune, "gpu_to_measure", lambda: CPU)
    monkeypatch.setattr(tune, "SAMPLES", 1)
    for name, network in (("resnet18", "basic"), ("resnet50", "bottleneck")):
        monkeypatch.setitem(models.BUILDERS, name, NETWORKS[network])
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
    return tmp_path / "mine.json"


SMALL = ["tune", "--only", "kernels", "--batch", "2", "--image-size", "32"]


@pytest.mark.slow
def test_an_entry_of_every_kernel(machine: Path, capsys: pytest.CaptureFixture):
    assert cli.main([*SMALL, "--model", "resnet50", "resnet18"]) == 0
    table, shown = tuning.read(machine), capsys.readouterr().out
    assert {key.split()[2] for key in table} == set(configs.KERNELS)
    assert f"{len(table)} entries written to {machine}" in shown
    assert f"{len(table)} of {len(table)} entries on H200" in shown
    for name in ("configuration", "predicted µs", "of roofline"):
        assert name in shown


def test_what_was_measured_is_what_is_launched(machine: Path, monkeypatch: pytest.MonkeyPatch):
    """The second configuration, which the clock finds faster, in the place of the first, which the cost model chooses."""
    assert cli.main([*SMALL, "--mode", "infer"]) == 0
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(devices, "describe", lambda device: H200)
    tuning.reload()
    for workload in workloads(NETWORKS["bottleneck"](), 2, 32, BF16, False):
        _, second = cost.ranked(workload.kernel, workload.shape, BF16, H200)
        assert tuning.choose(workload.kernel, workload.shape, BF16, torch.device("cuda", 0)) == second
    tuning.reload()


def test_only_what_the_cost_model_finds_fastest(machine: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli.main([*SMALL, "--mode", "infer", "--kernel", "bn_act", "--configs", "1"]) == 0
    assert {entry.config.warps for entry in tuning.read(machine).values()} == {4}


def test_kernels_and_table_by_name(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    other = tmp_path / "other.json"
    kept = {"an entry that was there": tuning.Entry(cost.Config(64, 64, 32, 4, 2), 1.0)}
    tuning.write(other, kept)
    assert cli.main([*SMALL, "--mode", "infer", "--kernel", "pool", "bn_act", "--table", str(other)]) == 0
    table = tuning.read(other)
    assert {key.split()[2] for key in table.keys() - kept.keys()} == {"pool", "bn_act"} and kept.keys() < table.keys()
    assert not machine.exists()
    for arguments, said in (
        (["--kernel", "fprop5x5"], "--kernel: unknown kernel 'fprop5x5', expected one of fprop1x1"),
        (["--kernel", "add_relu"], "--kernel: these networks launch no add_relu"),
        (["--table", str(tmp_path)], "is a folder"),
        (["--batch", "1"], "training needs more than one value per channel"),
    ):
        assert cli.main([*SMALL, *arguments]) == 2
        assert said in capsys.readouterr().err


def spoil(monkeypatch: pytest.MonkeyPatch, kernel: str, is_spoilt: Callable[[cost.Config], bool]) -> None:
    """Results of ``kernel`` are wrong in one element, with some configurations."""
    original = trial.Trial._answers

    def answers(self, kernels, arguments, config=None):
        found = original(self, kernels, arguments, config)
        if config is not None and self.workload.kernel == kernel and is_spoilt(config):
            found[0][(-1,) * found[0].dim()] += 1
        return found

    monkeypatch.setattr(trial.Trial, "_answers", answers)


def test_a_wrong_configuration_is_not_in_the_table(machine: Path, monkeypatch, capsys):
    arguments = [*SMALL, "--mode", "infer", "--kernel", "bn_act"]
    assert cli.main(arguments) == 0
    assert {entry.config.warps for entry in tuning.read(machine).values()} == {8}
    capsys.readouterr()
    spoil(monkeypatch, "bn_act", lambda config: config.warps == 8)
    assert cli.main(arguments) == 0
    assert {entry.config.warps for entry in tuning.read(machine).values()} == {4}
    assert "bn_act Config(block_m=32, block_n=64, block_k=1, warps=8, stages=1): wrong" in capsys.readouterr().err


def test_no_configuration_is_right(machine: Path, monkeypatch, capsys):
    spoil(monkeypatch, "pool", lambda config: True)
    assert cli.main([*SMALL, "--mode", "infer", "--kernel", "pool", "bn_act"]) == 1
    assert {key.split()[2] for key in tuning.read(machine)} == {"bn_act"}
    assert "no configuration of pool works" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done(machine: Path, monkeypatch, capsys):
    prepare = MadeUpClock.prepare
    calls = []

    def interrupted(self, call):
        calls.append(call)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return prepare(self, call)

    monkeypatch.setattr(MadeUpClock, "prepare", interrupted)
    assert cli.main([*SMALL, "--mode", "infer"]) == 130
    assert len(tuning.read(machine)) == 3
    assert "3 of " in capsys.readouterr().out


def test_workloads_of_one_entry_are_measured_together():
    counts = workloads(NETWORKS["basic"](), 2, 32, BF16, True)
    found = tune.groups(counts.items(), H200, None)
    assert sum(len(group.members) for group in found) == len(counts) > len(found)
    (residuals,) = tune.groups(counts.items(), H200, ["pool_backward"])
    assert [w.method for w in residuals.members] == [
        "bn_relu_maxpool_backward_reduce",
        "bn_relu_maxpool_backward",
    ]
    assert residuals.mean(lambda w: 1.0 if "reduce" in w.method else 4.0) == 2.5


# The same with the benchmark of single launches


@pytest.fixture
def bench_triton(monkeypatch: pytest.MonkeyPatch):
    """The script, with stand-ins for PyTorch's batch norm calls that only a GPU has."""

    def reduce(dz, x, mean, rstd, weight, *_):
        sums = dz.sum((0, 2, 3)), (dz * (x - mean.view(1, -1, 1, 1))).sum((0, 2, 3))
        return *sums, sums[1] * rstd, sums[0]

    def elemt(dz, x, mean, rstd, weight, sum_dz, sum_dz_centred, count):
        shares = (v.view(1, -1, 1, 1) for v in (mean, rstd, weight, sum_dz / count, sum_dz_centred / count))
        mean, rstd, weight, one, two = shares
        return ((dz - one - (x - mean) * rstd**2 * two) * weight * rstd).to(x.dtype)

    monkeypatch.setattr(torch, "batch_norm_stats", lambda y, eps: torch.var_mean(y.float(), (0, 2, 3))[::-1])
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", elemt)
    path = Path(__file__).parents[2] / "benchmarks" / "bench_triton.py"
    spec = importlib.util.spec_from_file_location("bench_triton", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_measured_rows(machine: Path, bench_triton, tmp_path: Path, capsys, monkeypatch):
    counts = list(workloads(NETWORKS["bottleneck"](), 2, 32, BF16, True))[:12]
    rows = tmp_path / "rows.csv"
    assert bench_triton.run_measured(counts, "train", 2, str(rows)) == 0
    made = list(csv.DictReader(rows.open()))
    assert tuple(made[0]) == COLUMNS
    assert [row["provider"] for row in made] == ["triton", "stock"] * len(counts)
    assert all(float(row[name]) > 0 for row in made for name in ("p50_ms", "fraction_of_roofline"))
    assert "Triton kernels on H200" in capsys.readouterr().out
    right = trial.Trial._answers

    def answers(self, kernels, *arguments):
        found = right(self, kernels, *arguments)
        if kernels is self._kernels and self.workload == counts[0]:
            found[0][(-1,) * found[0].dim()] += 1
        return found

    monkeypatch.setattr(trial.Trial, "_answers", answers)
    rows.unlink()
    assert bench_triton.run_measured(counts[:2], "train", 2, str(rows)) == 1
    assert "WRONG ANSWER" in capsys.readouterr().err
    assert len(list(csv.DictReader(rows.open()))) == 2


def test_stock_does_the_same_work(bench_triton):
    """Up to rounding, and to a ReLU's mask and sums of other moments, which cost the same."""
    exact = ("fprop", "dgrad", "wgrad", "bn_act", "bn_act_", "fprop_bn_act", "bn_relu_maxpool")
    seen = set()
    for make, training in itertools.product(NETWORKS.values(), (True, False)):
        for workload in workloads(make(), 2, 32, torch.float32, training):
            if workload.method not in bench_triton.STOCK or workload.method in seen:
                continue
            one = trial.Trial(workload, CPU)
            found = bench_triton.STOCK[workload.method](*one.arguments.values())
            if workload.method in exact and not workload.arguments.get("residual_mask"):
                gold = one._gold_and_stock()[0][0]
                assert networks.relative_error(found, gold) < 1e-5, (workload.method, workload.shape)
            seen.add(workload.method)
    assert seen >= {*exact, "fprop_stats", "bn_stats", "bn_act_backward_reduce"}
