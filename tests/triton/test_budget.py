"""Machine code for three architectures: no stack, no spills, tensor cores at work, registers as pinned in ``budget.csv``.

One configuration of every kernel here; ``python tests/triton/resources.py`` compiles all shipped ones and writes ``budget.csv``.
"""

import dataclasses
import os

import pytest
import registry
import resources
import triton
from registry import Case
from resources import Resources
from triton import language as tl

pytestmark = pytest.mark.skipif(resources.cuobjdump() is None, reason="no cuobjdump, in Triton or on the path")


@triton.jit
def small_kernel(x, y, C, HAS_Y: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile times its transpose; with y, plus y."""
    at = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, BLOCK_N)[None, :]
    tile = tl.load(x + at)
    out = tl.dot(tile, tl.trans(tile), input_precision="ieee")
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    if HAS_Y:
        out += tl.load(y + at)
    tl.store(x + at, out.to(x.dtype.element_ty))


@triton.jit
def plain_kernel(x, BLOCK_M: tl.constexpr):
    at = tl.arange(0, BLOCK_M)
    tl.store(x + at, tl.load(x + at) + 1.0)


def __getattr__(name: str):
    if name == "crashing_kernel":  # looked up by the process that compiles
        os.abort()
    raise AttributeError(name)


def small_case(function: str = "small_kernel", arch: int = 90, block_m: int = 64, warps: int = 4, **constants) -> Case:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": 64}
    types = {"x": "*bf16", "C": "i32:16"}
    constants = blocks | {"y": None} | constants
    return Case("gram", "", "bfloat16", arch, "test_budget", function, types, constants, warps, 1, (block_m, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("arch", registry.ARCHES)
def test_kernels_keep_within_their_budget(arch):
    cases = registry.default_suite(arch)
    budget = resources.read_budget()
    wrong = []
    for case, found in zip(cases, resources.measure(cases)):
        pinned = None if found.failure else budget.get(resources.key(resources.row(case, found)))
        wrong += [f"{case.name}: {complaint}" for complaint in resources.complaints(case, found, pinned)]
    assert cases and not wrong, "\n".join(["", *wrong])


def test_what_the_compiler_says_is_read():
    """Of a small kernel, and of planted faults: spills, no tensor cores, a compiler that fails and one that crashes."""
    cases = [
        small_case(),
        small_case(block_m=256),
        small_case("plain_kernel"),
        small_case(y="there", HAS_Y=True),
        small_case("crashing_kernel"),
        small_case(arch=80),
        small_case(arch=100),
    ]
    good, spilling, plain, failing, crashing, ampere, blackwell = found = resources.measure(cases)
    told = [" ".join(resources.complaints(case, result)) for case, result in zip(cases, found)]
    assert not told[0] and good.mma > 0 and good.hmma == 0 and good.ldg128 > 0 and good.stg128 > 0
    assert good.registers > 32 and good.shared >= 64 * 64 * 2 and good.ctas_per_sm > 1
    assert spilling.spills > 0 and spilling.stack > 0 and "bytes of stack" in told[1] and "spills" in told[1]
    assert plain.mma == 0 and told[2] == "no HGMMA no 16-byte loads no 16-byte stores"
    assert failing.failure and told[3] == failing.failure
    assert "the compiler crashed (-6)" in crashing.failure == told[4]
    assert not told[5] and ampere.mma == ampere.hmma > 0
    assert not told[6] and blackwell.mma > 0 and blackwell.hmma == 0


FINE = Resources(registers=128, shared=64 * 1024, ctas_per_sm=2, mma=8, ldg128=4, stg128=4)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"shared": 228 * 1024, "ctas_per_sm": 0}, "does not fit"),
        ({"mma": 0}, "no HGMMA"),
        ({"ldg128": 0}, "no 16-byte loads"),
        ({"stg128": 0}, "no 16-byte stores"),
        ({"registers": 129}, "129 registers, 128 in budget.csv"),
        ({"failure": "PTXASError"}, "PTXASError"),
    ],
    ids=str,
)
def test_faults_are_told(fault, complaint):
    case = small_case()
    pinned = resources.row(case, FINE)
    told = resources.complaints(case, dataclasses.replace(FINE, **fault), pinned)
    assert told == [] if complaint is None else len(told) == 1 and complaint in told[0]


def test_registers_are_pinned_for_one_version_of_triton():
    case = small_case()
    pinned = resources.row(case, FINE) | {"triton": "1.0"}
    assert resources.complaints(case, dataclasses.replace(FINE, registers=200), pinned) == []


def test_float32_products_need_no_tensor_cores():
    case = dataclasses.replace(small_case(), dtype="float32")
    assert resources.complaints(case, dataclasses.replace(FINE, mma=0)) == []


def test_every_kernel_that_is_tuned_is_registered():
    from resnet_fused.backends.triton import configs

    assert {kernel.name for kernel in registry.REGISTRY if not kernel.own_configs} == set(configs.KERNELS)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("arch", registry.ARCHES)
def test_registers_are_pinned(arch):
    budget = resources.read_budget()
    cases = [case for case in registry.shipped() if case.arch == arch]
    missing = [case.name for case in cases if resources.key(resources.row(case, FINE)) not in budget]
    assert not missing, "run python tests/triton/resources.py:\n" + "\n".join(missing)
