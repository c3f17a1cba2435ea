"""Synchronised batch norm on two and three processes, against one process of stock PyTorch with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed_cases import SPLITS, inputs, rank_step, together, whole_step
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


@pytest.mark.parametrize("covariance", ["always", "never"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", _COLLECTIVES)
def test_equals_one_process(ranks: Ranks, case: str, split: str, covariance: str, backend: str) -> None:
    found, counts = _run(ranks, case, split, torch.float64, backend, covariance, "ours", False)
    gold = whole_step(case, torch.float64)
    assert_equal(found, gold)
    assert counts == {_COLLECTIVES[case]}


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
