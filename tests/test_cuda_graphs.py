"""Recording and replaying, with a recorder of the processor: a replay calls the function again and writes over its results."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from block_cases import narrow_network
from folded_cases import as_on_a_gpu
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import backends, cuda_graphs, inference, networks, optimize_for_inference, routes
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.cuda_graphs import WARM_UP, Graphs, captured


class Recorder:
    """``recorded`` and ``replayed`` count, over all of them."""

    device_type = "cpu"
    made: ClassVar[list[Recorder]] = []

    def __init__(self, device: torch.device) -> None:
        self.recorded = self.replayed = self.finished = 0
        self.inside = threading.Lock()
        Recorder.made.append(self)

    def warm_up(self, call: Callable[[], Any]) -> None:
        for _ in range(WARM_UP):
            call()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result = call()

        def replay() -> None:
            self.replayed += 1
            with torch.enable_grad():
                again = call()
            with torch.no_grad():
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)

        return replay, result

    @contextmanager
    def turn(self):
        assert self.inside.acquire(blocking=False), "two turns at once"
        try:
            yield
        finally:
            self.inside.release()

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(autouse=True)
def made() -> list[Recorder]:
    Recorder.made = []
    return Recorder.made


def count(what: str = "recorded") -> int:
    return sum(getattr(recorder, what) for recorder in Recorder.made)


def graphs(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    found = Graphs(function, recorder=Recorder, **options)
    return lambda *args, **kwargs: found(args, kwargs)


def double(x: Tensor, factor: float = 2) -> Tensor:
    return factor * x


def test_each_kind_of_arguments_is_recorded_once():
    call = graphs(double)
    x = torch.randn(2, 3, 4, 5)
    kinds = [
        ((x,), {}), ((x[:1],), {}), ((x.double(),), {}), ((x.contiguous(memory_format=torch.channels_last),), {}),
        ((x,), {"factor": 3}), ((x,), {"factor": 3.0}), ((x,), {"factor": True}), ((x, 3), {}),
    ]  # fmt: skip
    for repetition in range(3):
        for args, kwargs in kinds:
            args = (args[0] + repetition, *args[1:])
            found = call(*args, **kwargs)
            expected = double(*args, **kwargs)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert count() == len(kinds) and count("replayed") == 3 * len(kinds)


def test_results_are_copies_of_any_structure():
    def function(x: Tensor) -> Any:
        return {"a": x + 1, "b": (x * 2, None, "name"), "same": [x]}

    call = graphs(function)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    first = call(x)
    kept = copy.deepcopy(first)
    second = call(y)
    assert second["b"][1:] == (None, "name") and torch.equal(second["b"][0], y * 2)
    torch.testing.assert_close([first["a"], first["b"][0], first["same"][0]], [kept["a"], x * 2, x], rtol=0, atol=0)
    first["a"].zero_()
    assert torch.equal(call(y)["a"], y + 1)


def test_the_last_few_kinds_stay():
    call = graphs(double, most=2)
    sizes = [1, 2, 1, 3, 1, 2]  # 3 takes the place of 2, which was used before 1 was
    for size in sizes:
        call(torch.ones(size))
    assert count() == 4


@pytest.mark.parametrize(
    "make", [lambda x: x[:, ::2], lambda x: x.t(), lambda x: x[:1].expand(3, 4), lambda x: nn.Parameter(x)]
)
def test_inputs_of_any_strides(make):
    found = Graphs(double, recorder=Recorder)
    for _ in range(2):
        x = make(torch.randn(3, 4))
        assert torch.equal(found((x,), {}), double(x)) and not found((x,), {}).requires_grad
    (recorded,) = found._recorded.values()
    assert not recorded.inputs[0].requires_grad  # nor grows a history from call to call


class Watching(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "args",
    [
        (3.0,), (torch.ones(2).to_sparse(),), (torch.ones(2).as_subclass(Watching),), (torch.ones(2), object()),
        (torch.ones(2), torch.ones(2, device="meta")), (torch.ones(2, device="meta"),),
    ],
    ids=["no tensor", "sparse", "subclass", "object", "two devices", "another device"],
)  # fmt: skip
def test_arguments_that_run_without_a_graph(args):
    call = graphs(lambda *args: args[0])
    assert call(*args) is args[0] and not Recorder.made


def test_watchers_see_the_calls(monkeypatch):
    found = Graphs(lambda x: torch.mm(x, x), recorder=Recorder)
    x = torch.ones(2, 2)
    with FlopCounterMode(display=False) as flops:
        found((x,), {})
    assert flops.get_total_flops() == 16
    assert torch.equal(torch.func.vmap(lambda t: found((t,), {}))(x[None])[0], x @ x)
    traced = torch.fx.symbolic_trace(lambda t: found((t,), {}))
    assert torch.equal(traced(x), x @ x)
    monkeypatch.setattr(cuda_graphs, "is_recording", lambda: True)
    found((x,), {})
    assert not Recorder.made


def test_results_that_cannot_be_copied_run_without_a_graph():
    call = graphs(lambda x: SimpleNamespace(y=x + 1))
    x = torch.ones(2)
    first, second = call(x), call(x + 1)
    assert first.y[0] == 2 and second.y[0] == 3 and count() == 1 and count("replayed") == 0


def test_errors():
    allowed = [True]

    def function(x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError("expected a matrix")
        if not allowed[0] and count():
            raise RuntimeError("operation not permitted when stream is capturing")
        return x + 1

    found = Graphs(function, recorder=Recorder)
    with pytest.raises(ValueError, match="^expected a matrix$"):
        found((torch.ones(2),), {})
    assert count() == 0
    allowed[0] = False
    for _ in range(2):  # nothing is kept of the first
        with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph: operation not permitted"):
            Recorder.made and setattr(Recorder.made[0], "recorded", 0)
            found((torch.ones(2, 2),), {})
        assert not found._recorded
    allowed[0] = True
    assert torch.equal(found((torch.ones(2, 2),), {}), torch.full((2, 2), 2.0))


def test_memory_that_does_not_suffice_is_told_as_such(monkeypatch):
    def record(self: Recorder, call: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "record", record)
    with pytest.raises(torch.OutOfMemoryError):
        graphs(double)(torch.ones(2))


def test_graphs_go_when_the_state_changes():
    state = [1]
    call = graphs(double, state=lambda: list(state))
    for value in (1, 1, 2, 2):
        state[0] = value
        call(torch.ones(2))
        call(torch.ones(3))
    assert count() == 4 and count("finished") == 1


def test_inference_mode_and_back():
    call = graphs(double)
    x = torch.randn(3)
    with torch.inference_mode():
        assert torch.equal(call(x), 2 * x)
    for _ in range(2):
        assert torch.equal(call(x + 1), 2 * (x + 1))
    with torch.inference_mode():
        assert call(x.clone()).is_inference()
    assert count() == 1


def test_threads_take_turns():
    call = graphs(double)
    wrong = []

    def work(value: float) -> None:
        for i in range(20):
            if not torch.equal(call(torch.full((5,), value + i)), torch.full((5,), 2 * (value + i))):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(100.0 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and count() == 1 and count("replayed") == 80


# optimize_for_inference


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.flatten, self.fc = nn.Flatten(), nn.Linear(8, 3)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(inference, "Graphs", functools.partial(Graphs, recorder=Recorder))
    return Small().eval()


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.mark.parametrize("make", [Small, pytest.param(narrow_network, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network(model, make, dtype):
    model = make().eval()
    fast, plain = optimize_for_inference(model, dtype, cuda_graph=True), optimize_for_inference(model, dtype)
    for x in (X, X.flip(0), X[:1], X):
        assert torch.equal(fast(x), plain(x))
    assert count() == 2 and count("replayed") == 4
    plain(X)
    assert count() == 2


def test_on_a_processor_nothing_is_recorded():
    source = Small().eval()
    fast = optimize_for_inference(source, cuda_graph=True)
    assert torch.equal(fast(X), optimize_for_inference(source)(X)) and not fast._graphs._recorders


def test_under_torch_compile(model):
    fast = optimize_for_inference(model, cuda_graph=True)
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(X), optimize_for_inference(model)(X))
    assert not Recorder.made


def test_copies_and_pickles_record_their_own(model):
    fast = optimize_for_inference(model, cuda_graph=True)
    expected = fast(X)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert copied.cuda_graph and copied._graphs is None
        assert torch.equal(copied(X), expected)
    assert count() == 3


def changed(fast: inference.InferenceModel, how: str) -> None:
    other = Small().eval()
    if how == "load":
        fast.load_state_dict(optimize_for_inference(other).state_dict())
    elif how == "load a part":
        fast.network.layer2.load_state_dict(optimize_for_inference(other).network.layer2.state_dict())
    elif how == "half":
        fast.half().float()
    elif how == "half of a part":
        fast.network.layer1.half().float()
    elif how == "another classifier":
        fast.network.fc.weight = nn.Parameter(torch.randn(3, 8), requires_grad=False)
    elif how == "table":
        routes.reload()
    elif how == "backend":
        backends.set_backend("aten")


CHANGES = ["load", "load a part", "half", "half of a part", "another classifier", "table", "backend"]


@pytest.mark.parametrize("how", [*CHANGES, "nothing"])
def test_what_changes_a_network_drops_its_graphs(model, monkeypatch, how):
    as_on_a_gpu(monkeypatch, {"cudnn": AtenKernels()})
    monkeypatch.setattr(routes, "measured", lambda key: "passes")
    monkeypatch.setattr(backends, "_current", "auto")
    fast = optimize_for_inference(model, cuda_graph=True)
    fast(X), fast(X)
    changed(fast, how)
    expected = fast._run(X)
    assert torch.equal(fast(X), expected)
    assert count() == (1 if how == "nothing" else 2)
    fast.to(torch.float32)
    assert not fast._graphs._recorded


# Training steps


def test_a_training_step():
    model = Small()
    twin = copy.deepcopy(model)
    y = torch.tensor([0, 2])

    def step(of: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return networks.training_step(of, x, y, torch.float32)

    run = captured(functools.partial(step, model), model, X, y, recorder=Recorder)
    for _ in range(WARM_UP + 1):
        step(twin, X, y)
    for x in (X.flip(0), X.flip(3)):
        out, expected = run(x, y), step(twin, x, y)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        model.zero_grad(set_to_none=True)
    out = run(X, y)
    step(twin, X, y)
    assert run(X, y) is out
    step(twin, X, y)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(
        ValueError, match=r"input 0: expected \(2, 3, 32, 32\) torch.float32 on cpu, as recorded, got \(1,"
    ):
        run(X[:1], y)


def test_gradients_are_written_anew_and_put_back():
    layer = nn.Linear(3, 1)
    run = captured(lambda x: layer(x).sum().backward(), layer, torch.ones(2, 3), recorder=Recorder)
    recorded = layer.weight.grad
    assert torch.equal(recorded, torch.full((1, 3), 2.0))  # of one step
    layer.zero_grad(set_to_none=True)
    run(torch.full((2, 3), 5.0))
    assert layer.weight.grad is recorded


# The recorder itself


@pytest.mark.parametrize("fails", [False, True])
def test_what_it_asks_of_cuda(monkeypatch, fails):
    log: list[str] = []

    @contextmanager
    def entered(name: str):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    def recording(graph: Graph, pool: str, stream: Any, mode: str):
        assert (pool, stream, mode) == ("pool", side, "thread_local")
        return entered("graph")

    side, current = mock.Mock(name="side"), mock.Mock(name="current")
    side.wait_stream = lambda stream: log.append("side waits" if stream is current else "?")
    current.wait_stream = lambda stream: log.append("current waits" if stream is side else "?")
    patches = {
        "Stream": lambda device: side, "current_stream": lambda device=None: current, "CUDAGraph": Graph,
        "device": lambda device: entered("device"), "stream": lambda stream: entered("side" if stream is side else "?"),
        "graph": recording, "graph_pool_handle": lambda: "pool", "Event": mock.Mock(),
    }  # fmt: skip
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = cuda_graphs.Recorder(torch.device("cuda", 0))
    log.clear()
    recorder.warm_up(lambda: log.append("call"))
    calls = ["call"] * WARM_UP
    assert log == ["enter device", "side waits", "enter side", *calls, "leave side", "current waits", "leave device"]
    log.clear()
    replay, result = recorder.record(lambda: log.append("call") or "result")
    replay()
    assert result == "result"
    nested = ["enter device", "enter side", "enter graph", "call", "leave graph", "leave side", "leave device"]
    assert log == [*nested, "replay"]
    done = recorder._done
    with pytest.raises(KeyError) if fails else nullcontext(), recorder.turn():
        current.wait_event.assert_called_with(done)
        if fails:
            raise KeyError
    done.record.assert_called_with(current)
    recorder.finish()
    done.synchronize.assert_called_once()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    source = networks.double_copy(narrow_network()).float().cuda().eval()
    fast, plain = optimize_for_inference(source, cuda_graph=True), optimize_for_inference(source)
    for x in (X, X.flip(0), X[:1], X):
        torch.testing.assert_close(fast(x.cuda()), plain(x.cuda()))
    assert len(fast._graphs._recorded) == 2
