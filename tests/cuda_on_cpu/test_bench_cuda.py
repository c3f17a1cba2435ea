"""``benchmarks/check_cuda.py`` and ``benchmarks/bench_cuda.py`` to their end on the emulated backend, with tiny sizes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_operators import EmulatedConvolutions, EmulatedCuda

from resnet_fused.backends.aten import memory_order
from resnet_fused.result_file import COLUMNS

pytest.importorskip("rich", reason="the scripts' tables need rich")
FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--batch", "1", "--image-size", "16", "--width", "8", "--repeats", "1", "--backend", EmulatedConvolutions.name]


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # they import one another
    return importlib.import_module(request.param)


check_cuda = pytest.mark.parametrize("script", ["check_cuda"], indirect=True)
bench_cuda = pytest.mark.parametrize("script", ["bench_cuda"], indirect=True)


class Planted:
    """Operators of which ``name`` gives ``value`` in one place of its first result."""

    def __init__(self, ops: Any, name: str, value: float) -> None:
        self._ops, self._name, self._value = ops, name, value

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._ops, name)
        if name != self._name:
            return operator

        def wrong(*arguments: object) -> Any:
            found = operator(*arguments)
            first = found[0]
            (memory_order(first) if first.dim() == 4 else first)[-1] = self._value
            return found

        return wrong


@pytest.fixture
def planted(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose pooling's sums are wrong in the last channel."""
    monkeypatch.setattr(cuda, "ops", Planted(cuda.ops, "bn_relu_maxpool_backward_reduce", 0.7))


@pytest.mark.slow
@check_cuda
def test_check(script: ModuleType, cuda: EmulatedCuda, capsys):
    arguments = ["--small", "--backend", cuda.name, "--dtype", "bf16", "--operator"]
    assert script.main([*arguments, "bn_act", "add_relu", "pool", "norm", "fold", "conv_stats 1×1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing below says anything about a GPU" in shown
    (line,) = (line.split() for line in shown.splitlines() if line.startswith(" bf16 on cpu"))
    assert int(line[3]) > 50 and line[4] == "none"
    assert script.main([*arguments, "bn_axt"]) == 1
    assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.slow
@check_cuda
def test_check_everything(script: ModuleType, cuda: EmulatedCuda):
    assert script.main(["--small", "--backend", cuda.name]) == 0


@check_cuda
def test_check_finds_a_wrong_result(script: ModuleType, planted: None, capsys):
    chosen = ["--dtype", "fp32", "fp16", "--operator", "pool, reduce"]
    assert script.main(["--small", "--backend", EmulatedCuda.name, *chosen]) == 1
    told = capsys.readouterr().err
    assert "WRONG: pool, reduce (2, 17, 5, 3) contiguous, fp32, on cpu: result 0: error" in told and "fp16" in told


@check_cuda
def test_ends_of_a_huge_tensor(script: ModuleType, cuda: EmulatedCuda, monkeypatch):
    monkeypatch.setattr(script, "HUGE", (5, 8, 3, 4))
    monkeypatch.setattr(script, "HUGE_IMAGES", (0, 4))
    assert script.check_huge(cuda, torch.device("cpu")) == []
    monkeypatch.setattr(cuda, "ops", Planted(cuda.ops, "add_relu", 0.7))
    assert script.check_huge(cuda, torch.device("cpu")) == ["add_relu of (5, 8, 3, 4), bf16: image 4 is wrong"]


@check_cuda
def test_what_a_check_tells_apart(script: ModuleType):
    case, exact = SimpleNamespace(rows=1), [torch.ones(2, 3, 4, 5, dtype=torch.float64)]
    right, bits = [exact[0].float()], [torch.tensor([1, 3], dtype=torch.uint8)]
    assert script.problem(case, right, right, exact) == ""
    assert "memory layout" in script.problem(
        case, [right[0].contiguous(memory_format=torch.channels_last)], right, exact
    )
    assert "error" in script.problem(case, [right[0] * 1.001], right, exact)
    assert "not finite" in script.problem(case, [right[0] * float("nan")], right, exact)
    assert "1 expected" in script.problem(case, [], right, exact)
    assert "other bits" in script.problem(case, [bits[0] + 1], bits, bits)
    assert script.same_bits(right, right) and not script.same_bits(right, [right[0].nextafter(right[0] + 1)])


def shorten(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem and the first blocks of two stages."""
    whole = script.network
    monkeypatch.setattr(script, "network", lambda *of: whole(*of)[:5] + whole(*of)[11:15])


@bench_cuda
def test_bench(script: ModuleType, cuda_convolutions: EmulatedConvolutions, tmp_path: Path, monkeypatch, capsys):
    shorten(script, monkeypatch)
    rows = tmp_path / "rows.csv"
    assert script.main([*TINY, "--family", "pool", "fold", "conv", "--results-file", str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "nothing below says anything about a GPU" in shown and "No rows are written" in shown
    assert not rows.exists()
    for line in ("pool, backward", "fold_batch_norms", "conv_stats 3×3, stride 2, pending input"):
        assert f" {line} " in shown
    assert shown.index("all calls") < shown.index("summary")


@pytest.mark.slow
@bench_cuda
def test_bench_everything(script: ModuleType, cuda_convolutions: EmulatedConvolutions):
    assert script.main(TINY) == 0


@bench_cuda
def test_a_wrong_answer_is_not_timed(script: ModuleType, planted: None, capsys):
    assert script.main([*TINY, "--backend", EmulatedCuda.name, "--family", "pool"]) == 1
    shown = capsys.readouterr()
    assert "pool, reduce 1x8x8x8 bf16: WRONG ANSWER, not timed: result 0: error" in shown.err
    assert " pool, backward " in shown.out and " pool, reduce " not in shown.out


@bench_cuda
def test_rows_and_shares(script: ModuleType, monkeypatch):
    case = script.Case("pass", lambda: None, (), moved=3_000_000, flops=10**9)
    samples = {"cuda": [2.0, 1.0, 3.0], "cuda again": [2.1] * 3, "copy": [1.5] * 3}
    contest = script.Contest("passes", "1x1x1x1", case, 1e-3, samples)
    assert contest.ratio == 0.75 and contest.noise == pytest.approx(0.05)
    ours, _, copied = script.csv_rows(contest, "bf16", "a GPU", (1e9, 1e12))
    assert set(ours) <= set(COLUMNS)
    assert (ours["p50_ms"], ours["p20_ms"], ours["gb_per_s"], ours["tflop_per_s"]) == (
        "2.00000",
        "1.40000",
        "1.5",
        "0.5",
    )
    assert float(ours["fraction_of_roofline"]) == pytest.approx(
        3e-3 / 2e-3
    )  # of memory, beside which products are 1 ms
    assert copied["provider"] == "copy" and "ratio_to_stock" not in ours
    formulas = {"cuda": [2.0], "cuda, eager": [4.0], "formulas": [6.0], "formulas, eager": [20.0]}
    made = script.csv_rows(script.Contest("algebra", "8x8", case, 0.0, formulas), "bf16", "a GPU", None)
    assert [row.get("ratio_to_stock") for row in made] == ["3.000", "5.000", None, None]
    assert all("fraction_of_roofline" not in row for row in made)


@bench_cuda
def test_a_narrow_network(script: ModuleType):
    layers, narrow = script.network(64, 224), script.network(8, 32)
    assert len(layers) == len(narrow) == 53
    assert (layers[0], layers[-1]) == ((7, 2, 3, 64, 224), (1, 1, 512, 2048, 7))
    assert (narrow[0], narrow[-1]) == ((7, 2, 3, 8, 32), (1, 1, 64, 256, 1))


@pytest.mark.parametrize("script", ["check_cuda", "bench_cuda"], indirect=True)
@pytest.mark.parametrize(
    "name, told", [(None, "need an NVIDIA GPU"), ("nix", "no such backend"), ("aten", "does not consist of")]
)
def test_where_they_cannot_run(script: ModuleType, name: str | None, told: str, capsys):
    if name is None and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(SystemExit) as ended:
        script.main([] if name is None else ["--backend", name])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and told in shown and shown.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_a_dry_run_takes_the_emulated_operators(
    script: ModuleType, cuda_convolutions: EmulatedConvolutions, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(script.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert script.main(["--dry-run", "--only", "correctness", "kernels", "--model", "resnet18"]) == 0
    shown = capsys.readouterr().out
    assert "correctness: operators of the CUDA extension" in shown and "kernels: CUDA kernels, fold" in shown
