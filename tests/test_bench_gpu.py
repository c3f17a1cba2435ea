"""``benchmarks/gpu.py`` to its end without a GPU, what it does with time, failures and a second run; its tables and plots."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("rich", reason="the scripts' tables need rich")
pytest.importorskip("triton", reason="the roofline knows GPUs as Triton's cost model does")

import bench_units  # noqa: E402
import dry_run  # noqa: E402
import gpu  # noqa: E402
import gpu_steps  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
from gpu_steps import PARTS, Plan, Step, steps  # noqa: E402

from resnet_fused import result_file  # noqa: E402


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


# The whole


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    return tmp_path


def results() -> list[str]:
    return sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())


def test_everything_to_its_end_and_not_again(folder: Path, capsys: pytest.CaptureFixture):
    before = results()
    arguments = ["--dry-run", "--model", "resnet18", "--dtype", "bf16"]
    assert gpu.main(arguments) == 0
    shown = capsys.readouterr()
    assert "nothing below is a measurement" in shown.out and "Nothing is left." in shown.out
    assert "left out: tune" in shown.err
    record = read(folder / gpu.RECORD)
    assert {row["part"] for row in record} == set(PARTS) and {row["result"] for row in record} == {"passed"}
    networks = read(folder / gpu_steps.NETWORKS)
    assert {row["provider"] for row in networks if row["images_per_s"]} == {
        *report.PROVIDERS,
        "fused again",
        "fused again, 2",
    }
    assert {row["op"] for row in networks if row["peak_mib"]} == {"resnet18", "resnet18, kept for backward"}
    units = read(folder / gpu_steps.UNITS_FILE)
    assert {(row["op"], row["mode"]) for row in units} == {
        (f"resnet18 {name}", mode)
        for name in ("stem", *(f"layer{i}.0" for i in (1, 2, 3, 4)))
        for mode in ("train", "infer")
    }
    assert {row["op"] for row in read(folder / gpu_steps.KERNELS_FILE)} == {"copy", "matmul"}
    assert {path.name for path in folder.glob("*.png")} == {plot.THROUGHPUT, plot.ROOFLINE, plot.MEMORY}
    assert gpu.main(arguments) == 0
    assert "0 steps on" in capsys.readouterr().out and len(read(folder / gpu.RECORD)) == len(record)
    assert results() == before


@pytest.mark.slow
def test_every_network_and_dtype(folder: Path, capsys: pytest.CaptureFixture):
    assert gpu.main(["--dry-run", "--only", "units", "train", "infer", "--minutes", "60"]) == 0
    assert "Nothing is left." in capsys.readouterr().out
    rows = [row for row in read(folder / gpu_steps.NETWORKS) if row["images_per_s"]]
    assert len({(row["op"], row["mode"], row["dtype"]) for row in rows}) == 12


def test_without_a_gpu_it_says_how_to_try(capsys: pytest.CaptureFixture):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "--dry-run goes through everything" in capsys.readouterr().err


# The order


def on_a_gpu(tmp_path: Path, **asked) -> list[Step]:
    return steps(Plan("cuda", tmp_path, **asked), lambda reason: None)


def test_resnet50_in_bf16_comes_first(tmp_path: Path):
    found = [step for step in on_a_gpu(tmp_path) if step.part in ("train", "infer")]
    assert [step.name for step in found[:2]] == ["resnet50 train bf16", "resnet50 infer bf16"]
    whole = on_a_gpu(tmp_path)
    order = [step.part for step in whole if step.part not in ("train", "infer")]
    assert order == sorted(order, key=PARTS.index)
    assert len(set(whole)) == len(whole) and len({step.key for step in whole}) == len(whole)


def test_what_auto_takes_is_measured_before_what_it_is_measured_for(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_missing", dict)
    names = [step.name for step in on_a_gpu(tmp_path)]
    assert names.index("tune resnet50 train bf16") < names.index("blocks of resnet50, train bf16")
    assert names.index("tune resnet18 infer fp16") < names.index("resnet18 infer fp16")
    assert not any("tune resnet101" in name for name in names)
    only = on_a_gpu(tmp_path, parts=("infer",), models=("resnet101",), dtypes=("fp16",))
    assert [(step.part, step.name) for step in only[:2]] == [
        ("infer", "tune resnet101 infer fp16"),
        ("infer", "resnet101 infer fp16"),
    ]
    assert not any("tune" in step.name for step in on_a_gpu(tmp_path, tune=False))


# Time, failures, a second run


def fake(names: str, share: float = 1.0) -> list[Step]:
    return [Step("train", name, name, (), share=share) for name in names]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str]]:
    """What ran; and what a step comes to where it is not passed."""
    names: list[str] = []
    comes_to: dict[str, str] = {}

    def execute(step: Step, limit_s: float) -> str:
        names.append(step.name)
        clock[0] += 25.0
        return comes_to.get(step.name, gpu.PASSED)

    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "here", execute)
    return names, comes_to


def run(tmp_path: Path, todo: list[Step], minutes: float = 1.0) -> tuple[dict[str, list[str]], gpu.Record]:
    record = gpu.Record(tmp_path, "a device")
    found = gpu.run(todo, Plan("cpu", tmp_path, tiny=True), minutes, record)
    return {result: [step.name for step in of] for result, of in found.items()}, record


def test_no_step_begins_when_the_time_is_over(tmp_path: Path, ran):
    found, record = run(tmp_path, fake("abcde"))
    assert (found["passed"], found["left"]) == (["a", "b", "c"], ["d", "e"]) and ran[0] == ["a", "b", "c"]
    before = record.results()
    assert [step.name for step in fake("abcde") if not gpu.is_done(step, before)] == ["d", "e"]
    assert gpu.Record(tmp_path, "another device").results() == {}


def test_what_failed_is_run_again(tmp_path: Path, ran):
    ran[1]["b"] = gpu.FAILED
    found, record = run(tmp_path, fake("abc"), 10)
    assert found["FAILED"] == ["b"] and found["passed"] == ["a", "c"]
    assert [step.name for step in fake("abc") if not gpu.is_done(step, record.results())] == ["b"]


def test_what_the_limit_stopped_is_left_and_what_its_share_stopped_is_not(tmp_path: Path, ran):
    ran[1].update(a=gpu.STOPPED, b=gpu.STOPPED)
    todo = [*fake("a", 0.25), *fake("b")]
    found, record = run(tmp_path, todo)
    assert found["stopped"] == ["a"] and found["left"] == ["b"]
    assert [step.name for step in todo if not gpu.is_done(step, record.results())] == ["b"]


def test_how_to_go_on(capsys: pytest.CaptureFixture):
    options = gpu.parser().parse_args(["--model", "resnet18", "--minutes", "3", "--no-tune"])
    gpu.tell({"passed": [], "FAILED": [], "stopped": [], "left": fake("xy")}, options)
    shown = capsys.readouterr().out
    assert "2 steps are left: x, y" in shown
    assert "python benchmarks/gpu.py --only train --minutes 3 --no-tune --model resnet18\n" in shown


def test_a_process_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    started = tmp_path / "started"
    (tmp_path / "sleepy.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid) + ' ' + os.environ['RESNET_FUSED_BACKEND'])\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "wrong.py").write_text("raise SystemExit(1)\n")
    assert gpu.in_a_process(Step("train", "", "wrong", ()), 60) == gpu.FAILED
    assert gpu.in_a_process(Step("train", "", "sleepy", (str(started),), "aten"), 3) == gpu.STOPPED
    pid, backend = started.read_text().split()
    assert backend == "aten"
    for _ in range(100):  # a busy machine takes its time to end it
        if _is_gone(pid):
            return
        time.sleep(0.1)
    raise AssertionError("what the step started still runs")


def _is_gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # nobody may have collected it
    except (FileNotFoundError, ProcessLookupError):
        return True


# Blocks


TINY = ["--device", "cpu", "--batch", "2", "--image-size", "64", "--repeats", "1", "--dtype", "fp32", "--mode", "train"]


def test_a_wrong_block_gets_no_number(tmp_path: Path, monkeypatch, capsys):
    rows = tmp_path / "rows.csv"
    right = bench_units.contestant

    def wrong(name, source, case):
        made = right(name, source, case)
        if name == "fused" and case.label == "layer1.0":
            made[0].bn2.weight.data[3] *= 1.1
        return made

    arguments = [*TINY, "--network", "resnet18", "--results-file", str(rows)]
    with dry_run.stand_ins():
        monkeypatch.setattr(bench_units, "contestant", wrong)
        assert bench_units.main(arguments) == 1
        assert "resnet18 layer1.0, train, fp32: fused: WRONG ANSWER" in capsys.readouterr().err
        providers = {op: [row["provider"] for row in read(rows) if row["op"] == op] for op in ("resnet18 layer1.0",)}
        assert providers == {"resnet18 layer1.0": ["stock", "compile"]}
        monkeypatch.setattr(bench_units, "contestant", right)
        count = len(read(rows))
        assert bench_units.main([*arguments, "--resume"]) == 0
    assert [row["op"] for row in read(rows)[count:]] == [
        "resnet18 layer1.0"
    ] * 5  # what was right is not measured again


def test_each_block_once_and_its_roofline():
    found = bench_units.cases(["resnet50", "resnet101", "resnet18"], 256, 224, ["train", "infer"], "bf16")
    assert len(found) == 2 * (9 + 7) and {case.network for case in found} == {"resnet50", "resnet18"}
    bound = (4.32e12, 791e12)
    (case,) = (case for case in found if (case.label, case.mode, case.network) == ("layer1.1", "infer", "resnet50"))
    # 256 → 64 → 64 → 256 channels at 56²: the 3×3 is bound by its products, the others by memory.
    rows, narrow, wide = 256 * 56 * 56, 256 * 56 * 56 * 64 * 2, 256 * 56 * 56 * 256 * 2
    by_memory = 2 * (narrow + wide + 64 * 256 * 2) + wide  # and the residual
    expected = by_memory / bound[0] + 2 * rows * 9 * 64 * 64 / bound[1]
    assert bench_units.roofline_s(case, bound) == pytest.approx(expected)
    train = bench_units.Case(case.network, case.block, "train", "bf16")
    assert bench_units.roofline_s(train, bound) > 2 * bench_units.roofline_s(case, bound)
    assert bench_units.roofline_s(case, None) is None


# Tables and plots


def network_rows(device: str) -> list[dict[str, str]]:
    made = []
    for model, base in (("resnet50", 3000), ("resnet18", 9000)):
        for i, provider in enumerate((*report.PROVIDERS, "fused again")):
            row = {"op": model, "mode": "train", "dtype": "bf16", "shape": report.SHAPE, "device": device}
            made += [
                row | {"provider": provider, "images_per_s": str(base + 100 * i)},
                row | {"provider": provider, "peak_mib": str(20000 - 1000 * i)},
            ]
    return made


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A folder of files with made-up figures of a device that does not exist."""
    place = {"device": "Made-up GPU", "dtype": "bf16"}
    result_file.append_csv(str(tmp_path / gpu_steps.NETWORKS), network_rows(place["device"]))
    block = place | {"op": "resnet50 layer1.0", "mode": "train", "shape": "256x64x56x56", "tflop_per_s": "120"}
    blocks = [
        block | {"provider": name, "p50_ms": ms, "gb_per_s": gb, "fraction_of_roofline": "0.5"}
        for name, ms, gb in (("stock", "4", "2000"), ("compile", "3", "2100"), ("fused", "2", "1500"))
    ]
    result_file.append_csv(str(tmp_path / gpu_steps.UNITS_FILE), blocks)
    ceilings = [
        place | {"op": "copy", "dtype": "uint8", "gb_per_s": "3000"},
        place | {"op": "matmul", "tflop_per_s": "600"},
    ]
    result_file.append_csv(str(tmp_path / gpu_steps.KERNELS_FILE), ceilings)
    return tmp_path


def line(page: str, begin: str) -> list[str]:
    (found,) = (row for row in page.splitlines() if row.startswith(f"| {begin} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_tables_of_made_up_figures(measured: Path):
    page = report.full(measured)
    assert "Made-up GPU: batch 256 at 224²." in page
    rates = line(page, "resnet50, train, bf16")
    assert rates[1:] == ["3000", "3100", "3200", "3300", "3400", "3500", "3600", "0.92", "15.6%"]
    assert line(page, "resnet101, train, bf16")[1] == report.UNKNOWN
    assert line(page, "resnet18, bf16")[1:4] == ["20,000", "19,000", "18,000"]
    assert line(page, "resnet50 layer1.0, train, bf16")[2:] == ["4.000", "3.000", "2.000", "1.50", "50%"]
    assert line(page, "copy")[1] == "3,000 GB/s" and line(page, "matmul, fp16")[1] == report.UNKNOWN
    newer = network_rows("Made-up GPU")[0] | {"images_per_s": "3050"}
    result_file.append_csv(str(measured / gpu_steps.NETWORKS), [newer])
    assert line(report.short(measured), "resnet50, train, bf16")[1] == "3050"


def test_pages_are_written_and_checked(measured: Path, capsys: pytest.CaptureFixture):
    pages = measured / "pages"
    (pages / "benchmarks").mkdir(parents=True)
    for name in report.PAGES:
        (pages / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    options = ["--results", str(measured), "--pages", str(pages)]
    assert report.main([*options, "--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    text = (pages / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert line(text, "resnet50, train, bf16")[1] == "3000"
    (pages / "README.md").write_text("no markers")
    with pytest.raises(SystemExit):
        report.main(options)


def test_the_pages_of_this_repository_are_up_to_date(capsys: pytest.CaptureFixture):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_plots_of_made_up_figures(measured: Path, capsys: pytest.CaptureFixture):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots are drawn with matplotlib")
    made: list[Callable] = [
        lambda: plot.bars(pyplot, measured, "images_per_s", "images/s"),
        lambda: plot.roofline(pyplot, measured),
    ]
    rates, blocks = (figure() for figure in made)
    train = rates.axes[0]
    assert len(rates.axes) == 4 and sorted(bar.get_height() for bar in train.patches)[-1] == 9600
    assert rates.axes[1].texts[0].get_text() == "not measured yet"
    (scatter, *_), (ceiling,) = blocks.axes[0].collections, blocks.axes[0].lines
    assert scatter.get_offsets()[0].tolist() == [60, 120] and max(ceiling.get_ydata()) <= 600
    assert plot.main(["--results", str(measured)]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    assert "![" in report.full(measured)
    empty = measured / "empty"
    empty.mkdir()
    assert plot.draw(empty) == []
