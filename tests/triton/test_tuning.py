"""The choice of configurations: the tuning table, and that nothing is chosen twice or by surprise."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from resnet_fused import tables
from resnet_fused.backends.triton import configs, cost, devices, tuning
from resnet_fused.backends.triton.configs import Config

H200 = devices.DEVICES["H200"]
CUDA = torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32
EXPAND = {"m": 256 * 56 * 56, "c": 64, "k": 256}
KERNELS = pytest.mark.parametrize("kernel", configs.KERNELS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An H200 that runs nothing, and a user's table that is not there yet; returns its path."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(devices, "describe", lambda device: H200)
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path / "tables" / "mine.json"))
    monkeypatch.setattr(tables, "_warned", set())
    tuning.reload()
    yield tmp_path / "tables" / "mine.json"
    tuning.reload()


# The choice


@KERNELS
def test_the_interpreter_gets_small_blocks(kernel):
    config = tuning.choose(kernel, EXPAND, FP32, torch.device("cpu"))
    assert max(config.block_m, config.block_n, config.block_k) <= 32


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="kernel: expected one of fprop1x1, .*, got 'fprop5x5'"):
        tuning.choose("fprop5x5", EXPAND, BF16, torch.device("cpu"))
    with pytest.raises(ValueError, match="got 'fprop5x5'"):
        configs.candidates("fprop5x5", BF16, 90)


def test_a_choice_is_made_once(gpu, monkeypatch):
    calls = []
    ranked = cost.ranked
    monkeypatch.setattr(cost, "ranked", lambda *arguments: calls.append(arguments) or ranked(*arguments))
    first = tuning.choose("fprop1x1", EXPAND, BF16, CUDA)
    assert first == ranked("fprop1x1", EXPAND, BF16, H200)[0]
    assert tuning.choose("fprop1x1", dict(reversed(EXPAND.items())), BF16, CUDA) is first
    assert len(calls) == 1
    tuning.choose("fprop1x1", EXPAND, torch.float16, CUDA)
    tuning.choose("fprop1x1", EXPAND | {"residual": 1}, BF16, CUDA)
    assert len(calls) == 3
    assert not gpu.exists()


def test_a_choice_does_not_change_in_a_process(gpu):
    """Nor where determinism is asked for: a table written meanwhile counts from ``reload`` on."""
    before = tuning.choose("fprop1x1", EXPAND, BF16, CUDA)
    other = cost.ranked("fprop1x1", EXPAND, BF16, H200)[-1]
    assert other != before
    tuning.write(gpu, {tuning.entry_key("fprop1x1", EXPAND, BF16, H200): tuning.Entry(other, 1.0)})
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose("fprop1x1", EXPAND, BF16, CUDA) == before
        smaller = EXPAND | {"m": EXPAND["m"] - 1}  # another choice, of the same table
        assert tuning.choose("fprop1x1", smaller, BF16, CUDA) == before
        tuning.reload()
        assert tuning.choose("fprop1x1", EXPAND, BF16, CUDA) == other
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_current_device_stands_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert tuning._where(torch.device("cuda")) == torch.device("cuda", 3)
    assert tuning._where(torch.device("cuda", 1)) == torch.device("cuda", 1)


# The table


ENTRY = tuning.Entry(Config(64, 128, 32, 4, 3), 12.5)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "table.json"
    table = {"one": ENTRY, "two": dataclasses.replace(ENTRY, us=1.0)}
    tuning.write(path, table)
    assert tuning.read(path) == table
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_the_shipped_table_is_valid():
    table = tuning.parse(tuning.SHIPPED_TABLE.read_text(encoding="utf-8"))
    assert all(entry.us > 0 for entry in table.values())


def test_a_table_decides_before_the_model(gpu, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tuning, "SHIPPED_TABLE", shipped)
    keys = [tuning.entry_key(kernel, EXPAND, BF16, H200) for kernel in ("fprop1x1", "dgrad1x1")]
    tuning.write(shipped, dict.fromkeys(keys, ENTRY))
    mine = Config(128, 32, 32, 4, 2)
    tuning.write(gpu, {keys[1]: tuning.Entry(mine, 3.0)})
    tuning.reload()
    assert tuning.choose("fprop1x1", EXPAND, BF16, CUDA) == ENTRY.config
    assert tuning.choose("dgrad1x1", EXPAND, BF16, CUDA) == mine
    model = cost.ranked("wgrad1x1", EXPAND, BF16, H200)[0]
    assert tuning.choose("wgrad1x1", EXPAND, BF16, CUDA) == model


def test_a_key_tells_apart_what_matters():
    def key(kernel="fprop1x1", dtype=BF16, device=H200, **shape):
        return tuning.entry_key(kernel, EXPAND | shape, dtype, device)

    others = [
        key("dgrad1x1"), key(dtype=torch.float16), key(device=devices.DEVICES["B200"]), key(c=65), key(k=255), key(h=56, w=56),
        key(stride=2), key(residual=1), key(residual=1, stats=1), key(m=4 * EXPAND["m"]), key("fprop3x3"),
        key(c2=64), key(c2=65), key(tf32=1), key(tf32x3=1),
        key(device=dataclasses.replace(H200, sms=66)),
    ]  # fmt: skip
    assert len({key(), *others}) == len(others) + 1
    assert key(stride=1, residual=0) == key()
    assert key(m=2**19 + 1) == key(m=2**20) != key(m=2**19)


def test_a_key_depends_on_the_version_of_triton(monkeypatch):
    before = tuning.entry_key("gram", EXPAND, BF16, H200)
    monkeypatch.setattr(tuning.triton, "__version__", "9.8.7")
    assert " triton9.8 " in tuning.entry_key("gram", EXPAND, BF16, H200) != before


def written(entries: object, **other: object) -> str:
    return json.dumps({"kind": tables.KIND, "format": 1, "entries": entries, "routes": {}} | other)


WRONG_TABLES = {
    "cut off": '{"kind": "resnet_fused.tuning", "for',
    "another kind": written({}, kind="cookies"),
    "another format": written({}, format=2),
    "a list": "[]",
    "a number": "3",
    "nested": "[" * 100_000,
    "no entries": json.dumps({"kind": tables.KIND, "format": 1}),
    "entries of a list": written([1]),
    "no power of two": written({"k": {"config": [48, 64, 32, 4, 3], "us": 1}}),
    "text": written({"k": {"config": ["64", 64, 32, 4, 3], "us": 1}}),
    "too short": written({"k": {"config": [64, 64, 32], "us": 1}}),
    "no time": written({"k": {"config": [64, 64, 32, 4, 3], "us": 0}}),
    "not text at all": b"\xff\xfe\x00\x9f",
}


@pytest.mark.parametrize("content", WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_ignored_with_one_warning(gpu, content):
    gpu.parent.mkdir()
    gpu.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match="the tuning table .*mine.json is ignored: ") as warned:
        first = tuning.choose("fprop1x1", EXPAND, BF16, CUDA)
        tuning.reload()
        tuning.choose("dgrad1x1", EXPAND, BF16, CUDA)
    assert len(warned) == 1
    assert first == cost.ranked("fprop1x1", EXPAND, BF16, H200)[0]


def test_a_missing_table_is_no_matter(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.choose("fprop1x1", EXPAND, BF16, CUDA)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_table(tmp_path, monkeypatch, step):
    path = tmp_path / "table.json"
    tuning.write(path, {"old": ENTRY})

    def crash(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="full"):
        tuning.write(path, {"new": ENTRY})
    assert list(tuning.read(path)) == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("platform", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "/caches", "/caches/resnet_fused/tuning.json"),
        ("linux", "XDG_CACHE_HOME", "", "~/.cache/resnet_fused/tuning.json"),
        ("darwin", "XDG_CACHE_HOME", "", "~/Library/Caches/resnet_fused/tuning.json"),
        ("linux", tables.ENVIRONMENT_VARIABLE, "/mine.json", "/mine.json"),
    ],
)
def test_where_the_users_table_is(monkeypatch, platform, variable, value, expected):
    monkeypatch.delenv(tables.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tables.sys, "platform", platform)
    monkeypatch.setenv(variable, value)
    assert tuning.user_table() == Path(expected).expanduser()


# Measuring


def time_of(config: Config) -> float:
    return 100.0 - config.block_m / 4 - config.stages


def test_tune_keeps_the_fastest_that_is_right_and_writes_it(gpu):
    tuning.write(gpu, {"kept": ENTRY})
    timed, lines = [], []

    def run(config):
        timed.append(config)
        return time_of(config)

    def check(config):
        return config.stages != 4  # the fastest of all are wrong

    best = tuning.tune("fprop1x1", EXPAND, BF16, H200, run, check, report=lines.append)
    assert best.config.block_m == 128 and best.config.stages == 3
    assert all(config.stages != 4 for config in timed) and any("wrong" in line for line in lines)
    assert tuning.read(gpu) == {"kept": ENTRY, tuning.entry_key("fprop1x1", EXPAND, BF16, H200): best}
    tuning.reload()
    assert tuning.choose("fprop1x1", EXPAND, BF16, CUDA) == best.config


def test_tune_leaves_out_what_cannot_be_launched(gpu):
    def run(config):
        if config.block_m == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return time_of(config) if config.warps == 4 else float("nan")

    lines: list[str] = []
    best = tuning.tune("fprop1x1", EXPAND, BF16, H200, run, lambda config: True, report=lines.append)
    assert (best.config.block_m, best.config.warps) == (64, 4)
    assert any("shared memory" in line for line in lines) and any("took nan" in line for line in lines)


def test_tune_fails_where_nothing_is_right(gpu):
    with pytest.raises(RuntimeError, match="no configuration of gram works for .* on H200"):
        tuning.tune("gram", EXPAND, BF16, H200, time_of, lambda config: False)
    assert not gpu.exists()


def test_tune_hides_no_error_of_the_device(gpu):
    def run(config):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.tune("gram", EXPAND, BF16, H200, run, lambda config: True)


def test_tune_tries_what_it_is_told_to(gpu, tmp_path):
    only = Config(64, 64, 64, 4, 2)
    path = tmp_path / "elsewhere.json"
    best = tuning.tune("gram", EXPAND, BF16, H200, time_of, lambda config: True, configs=[only], path=path)
    assert best.config == only and not gpu.exists() and list(tuning.read(path).values()) == [best]
