"""The fused convolution, run by emulation: prologues, epilogues and borders against float64, and errors that must be seen."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace

import pytest
import torch
from emulated import CUDA, HERE, Banded, Kernels, banded, build, image, name_of, vector
from torch import Tensor
from torch.nn.functional import conv2d

from resnet_fused.backends.aten import memory_order, pack_mask
from resnet_fused.testing import assert_as_accurate

MAIN = HERE / "conv_kernels.cpp"
SOURCE = "conv/implicit_gemm.cuh"
LAST = torch.channels_last
DTYPES = [torch.bfloat16, torch.float16]
TILES = [(64, 64), (128, 64), (128, 128)]  # in the order of conv_kernels.cpp


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("n", "h", "w", "c", "k", "stride", "size", "tile")]
    _fields_ += [("seed", ctypes.c_uint)]


@dataclass(frozen=True)
class Case:
    n: int
    h: int
    w: int
    c: int
    k: int
    size: int = 3
    stride: int = 1
    dtype: torch.dtype = torch.bfloat16
    prologue: str = ""  # or scale, relu
    epilogue: str = ""  # or stats, or some of scale, residual, relu
    tile: int = 0
    mean: float = 0.0

    def shape(self, seed: int) -> Shape:
        return Shape(self.n, self.h, self.w, self.c, self.k, self.stride, self.size, self.tile, seed)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv2d(x, weight, None, self.stride, self.size // 2)


def per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def activated(z: Tensor) -> Tensor:
    return torch.where(z <= 0, 0.0, z)


def check_conv(kernels: Kernels, case: Case, seed: int = 1) -> list[Tensor]:
    """Runs a case on random numbers; what it wrote."""
    torch.manual_seed(0)
    dtype = case.dtype
    x = image(dtype, (case.n, case.c, case.h, case.w), LAST, case.mean)
    weight = image(dtype, (case.k, case.c, case.size, case.size), LAST, case.mean)
    of_x = [vector(dtype, case.c), vector(dtype, case.c)] if case.prologue else [None, None]
    operand = x
    if case.prologue:
        z = per_channel(x.float(), *of_x)
        operand = (activated(z) if case.prologue == "relu" else z).to(dtype)
    raw = case.convolve(operand.double(), weight.double())
    steps = case.epilogue.split()
    of_out = [vector(dtype, case.k), vector(dtype, case.k)] if "scale" in steps else [None, None]
    residual = image(dtype, raw.shape, LAST) if "residual" in steps else None
    out = Banded(raw.numel(), dtype)
    mask = Banded(raw.numel() // 8, torch.uint8) if "relu" in steps else None
    rows, height = raw.numel() // case.k, TILES[case.tile][0]
    tiles = -(-rows // height)
    partials = Banded(tiles * 3 * case.k, torch.float32) if "stats" in steps else None
    kernels(
        "conv",
        dtype,
        case.shape(seed),
        *map(banded, (x, *of_x)),
        int(case.prologue == "relu"),
        *map(banded, (weight, *of_out, residual)),
        int("relu" in steps),
        out,
        mask,
        partials,
    )
    y = out.check().view(rows, case.k)
    expected = []
    for result in (case.convolve(operand, weight).float(), raw):
        if "scale" in steps:
            result = per_channel(result, *of_out)
        if residual is not None:
            result = result + residual.to(result.dtype)
        expected.append(activated(result) if "relu" in steps else result)
    stock, gold = (memory_order(t).view(rows, case.k) for t in expected)
    assert_as_accurate(y, stock.to(dtype), gold, name="output")
    written = [y.clone()]
    if mask is not None:
        assert torch.equal(mask.check(), pack_mask(~(y <= 0))), "mask"
        written.append(mask.check().clone())
    if partials is not None:
        check_moments(kernels, y, partials, height)
        written.append(partials.check().clone())
    return written


def check_moments(kernels: Kernels, y: Tensor, partials: Banded, height: int) -> None:
    """Of each tile, and merged, against y as it is stored."""
    tiles, (_, channels) = y.split(height), y.shape
    for tile, (count, *found) in zip(tiles, partials.check().view(len(tiles), 3, channels)):
        assert (count == len(tile)).all(), "rows of a tile"
        check_mean_and_square(tile, found, 1)
    mean, var = (Banded(channels, torch.float32) for _ in range(2))
    kernels("moments", y.dtype, partials, len(tiles), channels, mean, var)
    check_mean_and_square(y, [mean.check(), var.check()], len(y))


def check_mean_and_square(y: Tensor, found: list[Tensor], divisor: int) -> None:
    wide = y.double()
    squares = [(t - t.mean(0)).square().sum(0) / divisor for t in (y.float(), wide)]
    scale = wide.abs().max().item()
    assert_as_accurate(found[0], y.float().mean(0), wide.mean(0), scale=scale, name="mean")
    assert_as_accurate(found[1], *squares, ulps=8, name="sum of squares")


@pytest.mark.parametrize("n, h, w, c, k", [(1, 5, 7, 8, 8), (3, 7, 5, 24, 40), (1, 9, 3, 40, 72), (2, 3, 5, 72, 24)])
@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_shapes(kernels, dtype, size, stride, n, h, w, c, k):
    check_conv(kernels, Case(n, h, w, c, k, size, stride, dtype, prologue="relu", epilogue="stats"))


@pytest.mark.parametrize("epilogue", ["", "stats", "scale", "scale relu", "scale residual", "scale residual relu"])
@pytest.mark.parametrize("prologue", ["", "scale", "relu"], ids=name_of)
@pytest.mark.parametrize("size, dtype", zip((1, 3), DTYPES), ids=name_of)
def test_combinations(kernels, size, dtype, prologue, epilogue):
    check_conv(kernels, Case(1, 5, 5, 40, 24, size, 1, dtype, prologue, epilogue))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("tile", range(len(TILES)), ids=TILES.__getitem__)
def test_tiles(kernels, tile, size, dtype):
    case = Case(3, 7, 9, 24, 136, size, 1, dtype, "relu", tile=tile)
    check_conv(kernels, replace(case, epilogue="stats" if size == 1 else "scale residual relu"))


@pytest.mark.parametrize("size, epilogue", [(1, "stats"), (3, "residual relu")])
def test_the_order_of_blocks_and_threads_does_not_count(kernels, size, epilogue):
    case = Case(2, 7, 5, 40, 72, size, prologue="relu", epilogue=epilogue)
    first, *others = (check_conv(kernels, case, seed) for seed in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_statistics_far_from_zero(kernels, dtype):
    check_conv(kernels, Case(3, 7, 7, 24, 24, 1, dtype=dtype, epilogue="stats", mean=8.0))


@pytest.mark.parametrize("size", [1, 3])
def test_nan_and_inf_stay_where_they_reach(kernels, size):
    x, weight = image(torch.bfloat16, (2, 24, 5, 5), LAST), image(torch.bfloat16, (24, 24, size, size), LAST)
    x[0, 3, 1, 1], x[1, 5, 4, 4] = float("nan"), float("inf")
    scale, shift = vector(torch.bfloat16, 24, 0.5), vector(torch.bfloat16, 24)
    case = Case(2, 5, 5, 24, 24, size, prologue="relu", epilogue="relu")
    out, mask = Banded(x.numel(), x.dtype), Banded(x.numel() // 8, torch.uint8)
    given = (banded(t) for t in (x, scale, shift))
    kernels("conv", x.dtype, case.shape(1), *given, 1, banded(weight), None, None, None, 1, out, mask, None)
    expected = case.convolve(activated(per_channel(x.float(), scale, shift)), weight.float())
    found = out.check()
    expected = memory_order(activated(expected))
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(mask.check(), pack_mask(~(found <= 0)))


BOTH = "x_scale ? conv_kernel<T, R, true, Tile> : conv_kernel<T, R, false, Tile>"
BARRIER = "  __syncthreads();\n"
SEEN_IN = Case(1, 7, 5, 40, 40, prologue="relu", epilogue="stats", mean=1.0)
# A single step, whose stage is where slabs will be; statistics would bring another barrier.
SEEN_OF_SLABS = replace(SEEN_IN, size=1, c=24, epilogue="")
PLANTED = {
    "no barrier before a step": (BARRIER + "    if (step", "    if (step"),
    "no barrier before stages become slabs": (BARRIER + "\n  const int64_t warp_first", "  const int64_t warp_first"),
    "no barrier before moments are merged": ("lane);\n  " + BARRIER, "lane);\n"),
    "copies are not waited for": ("      wait<kConvStages - 2>();\n      loader", "      loader"),
    "copies are waited for too late": (
        "wait<kConvStages - 2>();\n      loader",
        "wait<kConvStages - 1>();\n      loader",
    ),
    "the wrong stage is filled": ("memory + free_stage *", "memory + (free_stage + 1) % kConvStages *"),
    "another tap's pixels": ("w + step.tap % R) * c", "w + (step.tap == 5 ? 1 : step.tap % R)) * c"),
    "another tap's filter": ("(step.tap * c + step.c)", "((step.tap == 8 ? 7 : step.tap) * c + step.c)"),
    "a border that is activated": ("      if (exists(i, step)) {", "      if (step.c + column < c) {"),
    "a border that is the next line": ("z < w", "z <= w"),
    "rows that do not exist are counted": ("        if (i * 8 + lane / 4 < left) square", "        square"),
    "statistics of what is not rounded": ("= rounded<T>(sums[i][j][e])", "= sums[i][j][e]"),
}


def test_errors_can_be_planted():
    text = (CUDA / SOURCE).read_text(encoding="utf-8")
    assert not [error for error, (right, _) in PLANTED.items() if text.count(right) != 1]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("error", PLANTED)
def test_an_error_is_seen(tmp_path, error):
    right, wrong = PLANTED[error]
    text, main = (CUDA / SOURCE).read_text(encoding="utf-8"), MAIN.read_text(encoding="utf-8")
    case = SEEN_OF_SLABS if "slabs" in error else SEEN_IN
    # Only the kernel that is run: compiling takes longer than running it.
    others = rf"\n +case .*(<int, {4 - case.size}>|ConvTile128).*"
    main = re.sub(others, "", main).replace(BOTH, "conv_kernel<T, R, true, Tile>")
    few = tmp_path / "few.cpp"
    few.write_text(main, encoding="utf-8")
    faulty = Kernels(build(tmp_path, {SOURCE: text.replace(right, wrong)}, few, case.dtype))
    with pytest.raises((AssertionError, RuntimeError)):
        check_conv(faulty, case)


@pytest.mark.parametrize("case", [SEEN_IN, SEEN_OF_SLABS], ids=["3x3", "1x1"])
def test_without_errors_none_is_seen(kernels, case):
    check_conv(kernels, case)
