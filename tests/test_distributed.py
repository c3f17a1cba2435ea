"""Synchronised batch norm on two and three processes, against one process of stock PyTorch with the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from distributed_cases import (
    CHANGES,
    HANG_S,
    SPLITS,
    changed_step,
    far_inputs,
    inputs,
    make,
    network,
    norm_input,
    norm_steps,
    penalty_step,
    pictures,
    rank_changed,
    rank_compiled,
    rank_eval,
    rank_far,
    rank_left_alone,
    rank_norm,
    rank_numbers,
    rank_penalty,
    rank_step,
    rank_train,
    rank_two_groups,
    step,
    stock_norm,
    together,
    train,
    whole_step,
)
from ranks import Ranks

from resnet_fused.testing import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks(3)
    yield started
    started.close()


def _run(ranks: Ranks, *args) -> tuple[dict[str, torch.Tensor], set[tuple[int, int]]]:
    answers = [answer for answer in ranks.run(rank_step, *args) if answer is not None]
    return together([found for found, _ in answers]), {counts for _, counts in answers}


def assert_equal(found: dict[str, torch.Tensor], gold: dict[str, torch.Tensor]) -> None:
    """To float64's rounding, of the largest gradient where sums cancel."""
    assert found.keys() == gold.keys()
    largest = max(t.abs().max().item() for name, t in gold.items() if name.endswith("grad"))
    for name, expected in gold.items():
        atol = 1e-12 * (largest if name.endswith("grad") else 1)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# Gathers and reductions of a step. A block's last norm and its shortcut's share theirs.
_COLLECTIVES = {
    "conv": (1, 1),
    "conv-1x1-no-relu": (1, 1),
    "conv-residual": (1, 1),
    "conv-bias": (1, 1),
    "bn": (1, 1),
    "bn-add": (1, 1),
    "stem": (1, 1),
    "pre-activation": (2, 2),
    "basic": (2, 2),
    "basic-projection": (2, 2),
    "basic-other-shortcut": (3, 3),
    "bottleneck": (3, 3),
    "bottleneck-projection": (3, 3),
    "bottleneck-grouped": (3, 3),
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("covariance", ["always", "never"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", _COLLECTIVES)
def test_equals_one_process(ranks: Ranks, case: str, split: str, covariance: str, backend: str) -> None:
    found, counts = _run(ranks, case, split, torch.float64, backend, covariance, "ours", False)
    gold = whole_step(case, torch.float64)
    assert_equal(found, gold)
    assert counts == {_COLLECTIVES[case]}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", ["uneven", "empty"])
@pytest.mark.parametrize("case", ["bottleneck", "bottleneck-projection", "basic-projection", "stem", "bn-add"])
def test_as_accurate_as_one_process(ranks: Ranks, case: str, split: str, dtype: torch.dtype, backend: str) -> None:
    found, _ = _run(ranks, case, split, dtype, backend, "auto", "ours", False)
    stock, gold = whole_step(case, dtype), whole_step(case, torch.float64)
    size = inputs(case, torch.float64)[1].abs().max().item()
    for name, expected in gold.items():
        if not expected.is_floating_point():
            assert torch.equal(found[name], expected)
            continue
        scale = size if name.endswith("grad") else 0
        assert_as_accurate(found[name], stock[name], expected, ulps=4, name=name, scale=scale)


@pytest.mark.parametrize("case", ["bottleneck-projection", "basic", "stem", "bn"])
def test_pytorchs_converter_is_noticed(ranks: Ranks, case: str, backend: str) -> None:
    """Its modules refuse tensors of a processor; the fused path takes them, and "bn" keeps its ReLU."""
    found, counts = _run(ranks, case, "uneven", torch.float64, backend, "auto", "torch", False)
    assert_equal(found, whole_step(case, torch.float64))
    assert counts == {_COLLECTIVES[case]}


@pytest.mark.parametrize("case", ["bottleneck-projection", "stem"])
def test_autocast(ranks: Ranks, case: str) -> None:
    found, _ = _run(ranks, case, "uneven", torch.float32, "auto", "auto", "ours", True)
    gold = whole_step(case, torch.float64)
    xs, grad = inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stock = step(make(case, torch.float32, ours=False), xs, grad.bfloat16())
    size = grad.abs().max().item()
    for name, expected in gold.items():
        if expected.is_floating_point():
            scale = size if name.endswith("grad") else 0
            assert_as_accurate(found[name], stock[name], expected, ulps=4, name=name, scale=scale)


@pytest.mark.parametrize("covariance", ["always", "never"])
def test_each_rank_has_the_gradients_of_its_own_images(ranks: Ranks, covariance: str, backend: str) -> None:
    """What a rank returns before DDP averages: the gradients of everybody's loss through its own use of the parameters."""
    case = "conv-1x1-no-relu"
    answers = ranks.run(rank_step, case, "uneven", torch.float64, backend, covariance, "ours", False)
    module, ((x,), grad) = make(case, torch.float64, ours=False), inputs(case, torch.float64)
    own = [[p.detach().clone().requires_grad_() for p in module.parameters()] for _ in SPLITS["uneven"]]
    parts = zip(x.detach().split(SPLITS["uneven"]), own, strict=True)
    y = torch.cat([torch.nn.functional.conv2d(part, weight) for part, (weight, _, _) in parts])
    normal = torch.nn.functional.batch_norm(y, None, None, training=True, eps=module.bn.eps)
    for part, (_, scale, bias), dout in zip(
        normal.split(SPLITS["uneven"]), own, grad.split(SPLITS["uneven"]), strict=True
    ):
        (part * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).backward(dout, retain_graph=True)
    names = [f"{name} grad" for name, _ in module.named_parameters()]
    for (found, _), parameters in zip(answers, own, strict=True):
        assert_equal({name: found[name] for name in names}, dict(zip(names, (p.grad for p in parameters), strict=True)))


_NORMS = {"plain": {}, "cumulative": {"momentum": None}, "no affine": {"affine": False}, "untracked": {}}


@pytest.mark.parametrize("split", ["uneven", "empty"])
@pytest.mark.parametrize("options", _NORMS)
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_a_norm_that_stands_alone(ranks: Ranks, dimensions: int, options: str, split: str) -> None:
    kwargs = {"track_running_stats": False} if options == "untracked" else _NORMS[options]
    found = together(ranks.run(rank_norm, dimensions, split, kwargs))
    assert_equal(found, norm_steps(stock_norm(dimensions, **kwargs), *norm_input(dimensions)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_far_above_the_deviation(ranks: Ranks, dtype: torch.dtype, backend: str) -> None:
    found = together(ranks.run(rank_far, dtype, backend))
    module = make("conv-1x1-no-relu", torch.float64, ours=False)
    x, grad = far_inputs(dtype)
    gold = step(copy.deepcopy(module), [x.double()], grad.double())
    stock = step(module.to(dtype), [x], grad)
    for name, expected in gold.items():
        if expected.is_floating_point():
            assert_as_accurate(found[name], stock[name], expected, ulps=4, name=name)


@pytest.mark.parametrize("case", ["bottleneck-projection", "bn"])
def test_gradients_of_gradients(ranks: Ranks, case: str) -> None:
    found = together(ranks.run(rank_penalty, case))
    (x,), grad = inputs(case, torch.float64)
    gold = penalty_step(make(case, torch.float64, ours=False), x, grad)
    # No gradient depends on the bias of the last norms: stock PyTorch has zeros for it, plain formulas have nothing.
    assert all(not gold.pop(name).any() for name in gold.keys() - found.keys())
    assert_equal(found, gold)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_blocks(ranks: Ranks, change: str) -> None:
    found = together(ranks.run(rank_changed, change, "bottleneck"))
    gold = changed_step(change, "bottleneck")
    if change == "checkpoint":  # stock's norms see the batch once more, with as many updates
        found, gold = ({n: t for n, t in side.items() if n.endswith("grad")} for side in (found, gold))
    assert_equal(found, gold)


def test_norms_of_two_groups(ranks: Ranks) -> None:
    """Each keeps to its own: with images of another rank 2 the first two ranks agree about the later norms alone."""
    first, second, third = ranks.run(rank_two_groups)
    for name in first:
        if "running" in name:
            assert torch.equal(first[name], second[name])
            assert torch.equal(first[name], third[name]) == name.startswith("bn1"), name


def test_evaluation_sends_nothing_and_a_lost_group_is_an_error(ranks: Ranks) -> None:
    assert ranks.run(rank_eval) == [(0, 0, True)] * 3


@pytest.mark.parametrize("named_group", [True, False])
@pytest.mark.parametrize("converter", ["ours", "torch"])
def test_compiles_to_one_graph(ranks: Ranks, converter: str, named_group: bool) -> None:
    for compiled, eager, chains in [r for r in ranks.run(rank_compiled, converter, named_group) if r is not None]:
        assert chains == [1]
        assert_equal(compiled, eager)


def test_training_under_ddp(ranks: Ranks) -> None:
    answers = ranks.run(rank_train, "ours")
    stock = network(ours=False)
    gold = train(stock, *pictures())
    for i, expected in enumerate(gold):
        torch.testing.assert_close(
            torch.stack([losses[i] for losses, _ in answers]).mean(), expected, rtol=1e-9, atol=0
        )
    for _, state in answers:
        for name, expected in stock.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_sends_statistics_only(ranks: Ranks) -> None:
    # Norms of 5, 5 and 20 channels, and of 20 behind the shortcut; the last two tell the means of their inputs too. Three
    # gathers carry a count each.
    expected = 2 * (5 + 5 + 20 + 20) + (5 + 35) + 3 + 2 * (5 + 5 + 20 + 20)
    for batch in (1, 4):
        assert ranks.run(rank_numbers, batch) == [expected] * 3


@pytest.mark.parametrize(("fate", "direction"), [("dies", "forward"), ("dies", "backward"), ("hangs", "forward")])
def test_a_lost_rank_is_an_error_for_the_others(fate: str, direction: str) -> None:
    """At once where it dies, after the group's time-out where it hangs."""
    timeout_s = 4.0
    pair = Ranks(2, timeout_s)
    try:
        pair.begin(rank_left_alone, fate, direction)
        done, waited_s = pair.answer(0)
        assert done, waited_s
        assert waited_s < timeout_s + 4 < HANG_S
    finally:
        pair.close()
