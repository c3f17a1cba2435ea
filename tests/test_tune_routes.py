"""``resnet-fused tune --only routes`` on a GPU that is not there: what is measured, what wins, what is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from block_cases import narrow_network
from torch import Tensor

import resnet_fused
from resnet_fused import backends, cli, clock, models, routes, tables, tune, tune_routes
from resnet_fused.backends import recast, routed
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.operands import Conv
from resnet_fused.backends.triton import devices
from resnet_fused.plans.spec import Chain, Shortcut, Tail, Unit
from resnet_fused.routes import STOCK, Route

CPU, FP32 = torch.device("cpu"), torch.float32


class Named(AtenKernels):
    """A provider of formulas."""

    def __init__(self, name: str) -> None:
        self.name = name


class Wrong(AtenKernels):
    def wgrad(self, dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        found = super().wgrad(dy, x, weight, conv)
        return torch.cat([found[:-1], 3 * found[-1:]])


class MadeUpClock:
    """Times that fall from call to call: what is prepared last is the fastest."""

    def __init__(self, device: torch.device) -> None:
        self._prepared = 0

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        self._prepared += 1
        us = 1000.0 / self._prepared
        return lambda: us


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, AtenKernels]]:
    """A GPU that is the processor, with three providers of formulas."""
    found = {name: Named(name) for name in (routed.CUDNN, routed.TRITON)}
    found |= {routed.CUBLAS: recast.MatrixProducts(), routed.SPACE_TO_DEPTH: recast.SpaceToDepth()}
    monkeypatch.setattr(backends, "providers", lambda: found)
    monkeypatch.setattr(devices, "describe", lambda device: devices.DEVICES["H200"])
    monkeypatch.setattr(tune_routes, "_is_own_3x3", lambda x, weight, conv: conv.stride == (1, 1))
    monkeypatch.setattr(tune_routes, "SAMPLES", 1)
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path / "mine.json"))
    backends._routed.cache_clear()
    routes.reload()
    yield found
    backends._routed.cache_clear()
    routes.reload()


def bottleneck(c: int = 16, k: int = 4) -> Chain:
    def unit(out: int, inner: int, size: int, relu: bool) -> Unit:
        weight = torch.empty(out, inner, size, size, device="meta")
        vectors = (torch.empty(out, device="meta") for _ in range(2))
        return Unit(weight, None, *vectors, None, None, Conv(padding=(size // 2,) * 2), True, relu, 1e-5)

    units = unit(k, c, 1, True), unit(k, k, 3, True), unit(c, k, 1, False)
    return Chain(units, Shortcut.IDENTITY, Tail.RELU)


X = torch.empty(2, 16, 6, 6, device="meta").contiguous(memory_format=torch.channels_last)
CASE = tune_routes.Case(bottleneck(), X, None, True)
CONVS = "4x16x1x1/1", "4x4x3x3/1", "16x4x1x1/1"


def made_up(
    us: Callable[[dict[str, str], bool], float], stock: float, asked: list[str]
) -> Callable[..., Mapping[str, float]]:
    def time(candidates: Sequence[Route]) -> Mapping[str, float]:
        asked.extend(route.choice for route in candidates)
        return {
            r.choice: stock if r.backend == STOCK else us(routed.parse(r.backend), r.covariance) for r in candidates
        }

    return time


def test_the_search_finds_the_best_of_each_convolution(there):
    wanted = dict(zip(CONVS, (routed.CUDNN, routed.TRITON, routed.CUDNN), strict=True))
    asked: list[str] = []

    def us(found: dict[str, str], covariance: bool) -> float:
        return 10 + sum(found[conv] != wanted[conv] for conv in CONVS) + covariance

    times = tune_routes.search(CASE.chain, X, made_up(us, 12.0, asked))
    best = min(times, key=times.__getitem__)
    assert routes.route_of(best) == Route(routed.name_of(wanted), False) and times[best] == 10
    assert times[STOCK] == 12.0 and len(asked) == len(set(asked)) <= 10


def test_stock_wins_where_it_is_faster(there):
    times = tune_routes.search(CASE.chain, X, made_up(lambda found, covariance: 10.0, 9.0, []))
    assert min(times, key=times.__getitem__) == STOCK


def test_covariance_is_measured_only_with_the_products_that_it_needs(there, monkeypatch):
    asked: list[str] = []
    del there[routed.TRITON]
    assert tune_routes.options(CASE.chain.units[0], X) == [routed.CUBLAS, routed.CUDNN]
    tune_routes.search(CASE.chain, X, made_up(lambda found, covariance: 1.0, 2.0, asked))
    assert asked[0] == STOCK and not any(routes.route_of(choice).covariance for choice in asked[1:])


def test_nothing_of_ours_works(there):
    times = tune_routes.search(CASE.chain, X, lambda found: {r.choice: 5.0 for r in found if r.backend == STOCK})
    assert times == {STOCK: 5.0}


def test_a_stem_is_tried_as_space_to_depth(there):
    weight = torch.empty(8, 3, 7, 7, device="meta")
    unit = Unit(weight, None, weight, weight, None, None, Conv((2, 2), (3, 3)), True, False, 1e-5)
    assert tune_routes.options(unit, torch.empty(2, 3, 32, 32, device="meta")) == [routed.SPACE_TO_DEPTH, routed.CUDNN]
    assert tune_routes.options(unit, torch.empty(2, 3, 31, 32, device="meta")) == [routed.CUDNN]


def test_a_route_is_written_for_its_shape_and_for_any(there, tmp_path):
    left_out: list[str] = []
    path = tmp_path / "other.json"
    entry = tune_routes.tune_case(CASE, FP32, CPU, MadeUpClock(CPU), path, left_out.append)
    assert not left_out and entry.choice not in entry.others and STOCK in entry.others
    table = routes.read(path)
    assert list(table.values()) == [entry, entry]
    keys = [routes.chain_key(CASE.chain, shape, FP32, CPU, True) for shape in (X.shape, ())]
    assert table.keys() == set(keys)


def test_a_wrong_provider_is_left_out(there, tmp_path):
    there[routed.TRITON] = Wrong()
    left_out: list[str] = []
    entry = tune_routes.tune_case(CASE, FP32, CPU, MadeUpClock(CPU), tmp_path / "t.json", left_out.append)
    # The expanding convolution has no wgrad of its own under the covariance plan.
    assert not any(f"{conv}={routed.TRITON}" in name for conv in CONVS[:2] for name in [entry.choice, *entry.others])
    assert left_out and all("gradient" in line and "error" in line for line in left_out)


def test_what_does_not_fit_into_memory_is_left_out(there, tmp_path, monkeypatch):
    def out_of_memory(self, *arguments: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 EiB")

    monkeypatch.setattr(Wrong, "wgrad", out_of_memory)
    there[routed.TRITON] = Wrong()
    left_out: list[str] = []
    tune_routes.tune_case(CASE, FP32, CPU, MadeUpClock(CPU), tmp_path / "t.json", left_out.append)
    assert any("OutOfMemoryError: tried to allocate 3 EiB" in line for line in left_out)
    monkeypatch.setattr(Wrong, "wgrad", lambda self, *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune_routes.tune_case(CASE, FP32, CPU, MadeUpClock(CPU), tmp_path / "t.json", left_out.append)


@pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
def test_the_command(there, training, monkeypatch, tmp_path, capsys):
    pytest.importorskip("rich", reason="the command's table needs rich")
    monkeypatch.setattr(tune, "gpu_to_measure", lambda: CPU)
    monkeypatch.setattr(clock, "Clock", MadeUpClock)
    monkeypatch.setattr(tune_routes, "CHECKED_BATCH", 2)
    network = resnet_fused.fuse(narrow_network())
    monkeypatch.setitem(models.BUILDERS, "resnet50", lambda: copy.deepcopy(network))
    monkeypatch.setattr(tune_routes, "ADD_RELU_SHAPE", (8, 4, 4))
    pytest.importorskip("triton", reason="the command names Triton's kernels")
    mode = ["--mode", "train" if training else "infer", "--dtype", "fp32", "--batch", "2", "--image-size", "64"]
    assert cli.main(["tune", "--only", "routes", *mode]) == 0
    table, shown = routes.read(tmp_path / "mine.json"), capsys.readouterr().out
    found = {key.split(" [")[1].split("]")[0] for key in table if "[" in key}
    assert len(found) == 6
    assert {key.split()[0] for key in table} == ({"train"} if training else {"forward", "folded"})
    assert f"routes written to {tmp_path / 'mine.json'}" in shown and "faster" in shown
    assert any(
        routed.SPACE_TO_DEPTH in entry.choice or routed.SPACE_TO_DEPTH in str(entry.others) for entry in table.values()
    )
