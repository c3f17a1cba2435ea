"""The emulation sees what a GPU would let pass; planted faults in the kernels are seen; sanitizers find nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import test_batch_norm as batch_norm
import torch
from emulated import CUDA, DTYPES, HERE, SANITIZED, Banded, Kernels, name_of

FP32 = torch.float32
MAIN = HERE / "warp_kernels.cpp"
NAMES = (
    "sums",
    "without_barrier",
    "barrier_in_a_branch",
    "mask_without_the_caller",
    "mask_with_lanes_that_do_not_call",
    "lane_outside_the_mask",
    "different_arrays",
    "beyond_shared_memory",
    "order_of_blocks",
)


def run(kernels: Kernels, name: str, blocks: int = 3, seed: int = 0) -> torch.Tensor:
    out = Banded(64, FP32)
    kernels("warp_kernel", FP32, NAMES.index(name), blocks, seed, out)
    return out.check()[:blocks]


def test_shuffles_votes_and_barriers(kernels):
    assert run(kernels, "sums").tolist() == [2016.0] * 3


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("barrier_in_a_branch", "a barrier that some threads of the block never reach"),
        ("mask_without_the_caller", "mask leaves out the caller"),
        ("mask_with_lanes_that_do_not_call", "waits for lanes that its mask names"),
        ("lane_outside_the_mask", "reads a lane outside its mask"),
        ("different_arrays", "different shared arrays"),
    ],
)
def test_what_would_hang_or_be_undefined_is_told(kernels, name, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        run(kernels, name)


def test_a_missing_barrier_shows(kernels):
    """The threads that have not run yet have left NaN."""
    assert any(run(kernels, "without_barrier", 1, seed).isnan() for seed in range(3))


def test_blocks_run_in_shuffled_order(kernels):
    assert len({run(kernels, "order_of_blocks", 8, seed)[0].item() for seed in range(8)}) > 1


LAST = torch.channels_last
PLANES = torch.contiguous_format


def stats(kernels: Kernels, layout: torch.memory_format = LAST) -> None:
    batch_norm.check_bn_stats(kernels, FP32, (2, 40, 4, 6), layout, mean=3.0)


def reduce(kernels: Kernels, layout: torch.memory_format = LAST) -> None:
    batch_norm.check_bn_backward_reduce(kernels, FP32, (2, 40, 5, 7), layout, "mask")


def act(kernels: Kernels) -> None:
    batch_norm.check_bn_act(kernels, torch.bfloat16, (2, 17, 3, 3), LAST)


def backward(kernels: Kernels) -> None:
    batch_norm.check_bn_backward(kernels, FP32, (2, 3, 5, 7), PLANES, "mask")


def frozen(kernels: Kernels) -> None:
    batch_norm.test_x_does_not_count_where_statistics_are_frozen(kernels)


def rounding(kernels: Kernels) -> None:
    batch_norm.test_the_mask_is_of_what_is_stored(kernels, torch.float16)


def steady(kernels: Kernels) -> None:
    batch_norm.test_both_forms_of_elementwise_kernels_agree(kernels, FP32, (2, 24, 31, 29), 4, 2)


def steady_sums(kernels: Kernels) -> None:
    batch_norm.test_both_forms_of_sums_agree(kernels, FP32, (1, 264, 11, 13), 1, 3)


def several_octets(kernels: Kernels) -> None:
    batch_norm.test_several_octets_and_a_tail_without_vectors(kernels, FP32, 0)


def splits(kernels: Kernels) -> None:
    batch_norm.test_many_splits_some_of_them_empty(kernels, FP32)


def long(kernels: Kernels) -> None:
    batch_norm.check_bn_act(kernels, FP32, (3, 265, 3, 5), LAST)


def stats_of_planes(kernels: Kernels) -> None:
    stats(kernels, PLANES)


def reduce_planes(kernels: Kernels) -> None:
    reduce(kernels, PLANES)


IN_TAIL = "return left < kOctet ? static_cast<int>(left) : kOctet;"
PLANE_TAIL = "return kWhole || left > kOctet ? kOctet : left;"
BITS = "passes_as_stored<T>(z)) << j"
TREE = "    const int half = (height + 1) / 2;\n    __syncthreads();"
OF_PLANES = "half = kThreads / 2; half > 0; half /= 2) {\n    __syncthreads();"
OF_JOIN = "half = kRows / 2; half > 0; half /= 2) {\n      __syncthreads();"
SUMS, ELEMENTS, DEVICE, PLAN = "channel_sums.cuh", "elementwise.cuh", "device.cuh", "launch_plan.h"
FAULTS = {
    "missing barrier": (SUMS, TREE, TREE.replace("    __syncthreads();", ""), stats),
    "missing second barrier": (SUMS, "height = half;\n  }\n  __syncthreads();\n", "height = half;\n  }\n", stats),
    "missing barrier of planes": (SUMS, OF_PLANES, OF_PLANES.replace("__syncthreads();", ""), stats_of_planes),
    "missing barrier of the join": (SUMS, OF_JOIN, OF_JOIN.replace("__syncthreads();", ""), splits),
    "last rows dropped": (SUMS, "begin + row, rows_at_once, end,", "begin + row, rows_at_once, end - rows_at_once,", stats),
    "a row too many": (SUMS, "begin + rows_of_split : rows", "begin + rows_of_split + 1 : rows", stats),
    "last row left out": (SUMS, "i < (height - half) * width", "i < (height - half) * width - lanes", stats),
    "channels beyond the last": (SUMS, " && tile + thread < e.channels", "", steady_sums),
    "tail of a plane": (SUMS, PLANE_TAIL, "return left < 0 ? 0 : kOctet;", reduce_planes),
    "bit of the wrong element": (SUMS, "mask[first / 8] >> skipped", "mask[first / 8]", reduce_planes),
    "bits of the second byte": (SUMS, "skipped + count > 8", "skipped + count > 16", reduce_planes),
    "merge forgets the means": (SUMS, "other.square + delta * delta * count * share", "other.square", stats),
    "squares about another mean": (SUMS, "squares = square - sum * distance", "squares = square", splits),
    "off by one in the tail": (ELEMENTS, IN_TAIL, IN_TAIL.replace("(left)", "(left) - 1"), act),
    "written past the end": (ELEMENTS, IN_TAIL, "return left < 0 ? 0 : kOctet;", act),
    "mask of what was not rounded": (ELEMENTS, BITS, "!(z <= 0)) << j", rounding),
    "a tie does not go to even": (DEVICE, "0x1p-25f", "0x0.ffffffp-25f", rounding),
    "bits in reverse": (ELEMENTS, BITS, BITS.replace("<< j", "<< (7 - j)"), act),
    "channel not carried on": (DEVICE, "      offset -= inner;\n      ++channel;", "      offset -= inner;", backward),
    "channel walks off": (DEVICE, "if (channel >= channels) channel -= channels;", "", act),
    "x counts where statistics are frozen": (ELEMENTS, "b == A(0) ? A(0) : x - mean", "x - mean", frozen),
    "stride of the grid": (ELEMENTS, "{gridDim.x} * blockDim.x", "{gridDim.x} * blockDim.x + 1", long),
    "number of an octet overflows": (ELEMENTS, "count - o * kOctet;", "count - static_cast<int8_t>(o) * kOctet;", long),
    "all threads at the first channels": (ELEMENTS, "first_octet() % (e.channels / kOctet) * kOctet", "0", steady),
    "an end left out": (ELEMENTS, "whole + first_octet(), octet", "whole + 1 + first_octet(), octet", several_octets),
    "batches overlap": (DEVICE, "i += kAtOnce * stride", "i += stride", several_octets),
}  # fmt: skip


DTYPE_OF = {act: torch.bfloat16, rounding: torch.float16}


def test_faults_can_be_planted():
    assert not [fault for fault, (name, right, *_) in FAULTS.items() if (CUDA / name).read_text().count(right) != 1]


@pytest.mark.one_in(14)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(tmp_path, fault):
    name, right, wrong, check = FAULTS[fault]
    text = (CUDA / name).read_text(encoding="utf-8")
    main = HERE / ("sums_kernels.cpp" if name == SUMS else "elementwise_kernels.cpp")
    dtype = DTYPE_OF.get(check, FP32)
    kernels = Kernels(emulated.build(tmp_path, {name: text.replace(right, wrong)}, main=main, only=dtype))
    with pytest.raises((AssertionError, RuntimeError)) as seen:
        check(kernels)
    assert "left out" not in str(seen.value)


def sanitizers() -> list[str]:
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            [emulated.compiler() or "false", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        found.append(path)
    return found


def sanitized(dtype: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "EMULATED_SANITIZED": dtype,
        "LD_PRELOAD": " ".join(sanitizers()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True)


@pytest.mark.skipif(bool(SANITIZED), reason="runs inside itself otherwise")
@pytest.mark.parametrize(
    "dtype, module, which",
    [
        ("bfloat16", "test_batch_norm.py", "(options or several or many)"),
        *(pytest.param(name_of(d), "test_batch_norm.py", "test", marks=pytest.mark.slow) for d in DTYPES),
        *(
            pytest.param(d, "test_covariance_algebra.py", "test", marks=pytest.mark.slow)
            for d in ("bfloat16", "float32")
        ),
    ],
)
def test_sanitizers_find_nothing(dtype, module, which):
    chosen = f"{dtype} and {which} and not planted"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", module, "-k", chosen]
    found = sanitized(dtype, "-m", "pytest", *options)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert " passed" in found.stdout


@pytest.mark.skipif(bool(SANITIZED), reason="runs inside itself otherwise")
def test_sanitizers_find_what_is_there(tmp_path):
    """A read beyond shared memory, which nothing else would notice."""
    program = (
        "import emulated, pathlib, test_emulation as t;"
        f"library = emulated.build(pathlib.Path({str(tmp_path)!r}), main=t.MAIN);"
        "t.run(emulated.Kernels(library), 'beyond_shared_memory')"
    )
    found = sanitized("float32", "-c", program)
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr, found.stderr[-3000:]
