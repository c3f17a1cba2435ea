"""Which kernels are compiled for the budget, and how their launchers call them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

ARCHES = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation.

    ``types`` gives each argument its Triton type ("*bf16", "i32"); "i32:16" is a multiple of 16, and pointers are too. What is
    in ``constants`` is a constant: blocks, flags, and None for tensors that are not there; other flags are False.
    """

    kernel: str
    variant: str
    dtype: str
    arch: int
    module: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    config: tuple[int, ...]  # rows, columns and depth of the tile: what the table shows

    @property
    def name(self) -> str:
        blocks = "x".join(map(str, self.config[:3]))
        return f"{self.kernel}[{self.variant}] {self.dtype} sm_{self.arch} {blocks} w{self.warps} s{self.stages}"


def multiplies(kernel: str) -> bool:
    return kernel.startswith(("fprop", "dgrad", "wgrad", "gram", "flagged"))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as its launcher calls it.

    ``arguments``: "name:type" for each. Types: "T" dtype of the activations, "f" fp32, "d" fp64, "p" fp64 where activations are
    fp32, else fp32; "i" i32, and "i16" one that is a multiple of 16 (channels of a ResNet). "MK" are activations too, from sm_90
    on behind a descriptor of tiles ``[BLOCK_M, BLOCK_K]``, "1" being an axis of one, unless there is the flag after "!". After
    "?" the flags, any of which makes the tensor be there.
    ``variants``: flags that are set, or "FLAG=value". The first is checked by the default suite on sm_90, the last on others.
    ``fixed``, ``float32``, ``half``: flags of every variant, and of those of a dtype (``float32`` but for "tf32" products).
    ``exact``: a flag with which products that would be TF32 are three of them, "tf32x3"; "*": any variant.
    ``own_configs``: the module has a configuration for each size of an element; others are chosen by shape.
    """

    name: str
    module: str
    function: str
    arguments: str
    variants: tuple[str, ...]
    fixed: str = ""
    float32: str = ""
    half: str = ""
    exact: str = ""
    own_configs: bool = False  # the module's CONFIGS, whatever the shape

    def precision(self, variant: str, dtype: str) -> str:
        if dtype != "tf32":
            return "ieee"
        return "tf32x3" if self.exact == "*" or self.exact in variant.split() else "tf32"

    def case(self, variant: str, dtype: str, arch: int, config: Any) -> Case:
        short = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32")
        full = short == "fp32"
        words = {"T": "*" + short, "f": "*fp32", "d": "*fp64", "p": "*fp64" if full else "*fp32", "u8": "*u8"}
        words |= {"i": "i32", "i16": "i32:16"}
        constants: dict[str, Any] = {f"BLOCK_{axis}": getattr(config, f"block_{axis.lower()}") for axis in "MNK"}
        constants["BLOCK"] = 8 * 32 * config.warps  # of kernels that see no matrix: eight elements a thread
        extra = self.float32 if full else self.half
        if _has_tf32(self):
            constants["PRECISION"] = self.precision(variant, dtype)
            extra = "" if constants["PRECISION"] == "tf32" else extra
        for flag in f"{self.fixed} {extra} {variant}".split():
            name, _, value = flag.partition("=")
            constants[name] = int(value) if value else True
        types = {}
        for argument in self.arguments.split():
            name, _, rest = argument.partition(":")
            word, _, needs = rest.partition("?")
            word, _, pointer = word.partition("!")
            if needs and not any(constants.get(flag) for flag in needs.split("|")):
                constants[name] = None
            else:
                types[name] = words[word] if word in words else words["T"]
                if word not in words and arch >= 90 and not constants.get(pointer):
                    types[name] = f"tensordesc<{short}{[constants.get(f'BLOCK_{axis}', 1) for axis in word]}>"
        module = f"resnet_fused.backends.triton.{self.module}"
        blocks = (config.block_m, config.block_n, config.block_k)
        options = {"warps": config.warps, "stages": config.stages, "config": blocks}
        return Case(self.name, variant, dtype, arch, module, self.function, types, constants, **options)


_FPROP1X1 = (
    "x:MK x_scale:f?PENDING x_shift:f?PENDING w:NK y_scale:f?NORM x2:MK!STRIDED2?DUAL x2_scale:f?PENDING2 x2_shift:f?PENDING2 "
    "w2:NK?DUAL y2_scale:f?DUAL shift:f?NORM residual:MN?RESIDUAL y:MN mask:u8?MASK partials:f?STATS M:i K:i16 P:i Q:i C:i16 H:i "
    "W:i stride_h:i stride_w:i C2:i16 H2:i W2:i stride2_h:i stride2_w:i"
)
_FLAGGED = (
    "x:T x_scale:f?PENDING x_shift:f?PENDING w:T flagged:u8 partials:d M:i K:i16 P:i Q:i C:i16 H:i W:i stride_h:i stride_w:i "
    "chunks:i"
)
_DGRAD1X1 = (
    "dz:MK mask:u8?MASK mean_dz:f?CENTRED y:MK?GRAD y_mean:f?GRAD y_a:f?GRAD y_b:f?GRAD y_c:f?GRAD w:KN a:MK?FEEDBACK "
    "a_scale:f?FEEDBACK a_shift:f?FEEDBACK mean_a:f?CENTRED coupling:KN?FEEDBACK coupling_low:KN?LOW constant:f?CONSTANT "
    "residual:MN?RESIDUAL residual_mask:u8?RESIDUAL below:MN?BELOW below_mean:f?BELOW below_scale:f?BELOW below_shift:f?BELOW "
    "dx:MN partials:f?BELOW M:i K:i16 C:i16 P:i Q:i H:i W:i stride_h:i stride_w:i"
)
_WGRAD1X1 = (
    "dz:MN mask:u8?MASK y:MN?GRAD y_mean:f?GRAD y_a:f?GRAD y_b:f?GRAD y_c:f?GRAD a:MK a_scale:f?PENDING a_shift:f?PENDING "
    "centre:f?CENTRED partials:p a2:MK!STRIDED2?DUAL a2_scale:f?PENDING2 a2_shift:f?PENDING2 centre2:f?DUAL_CENTRED "
    "partials2:p?DUAL sums:d?MASK M:i K:i16 P:i Q:i chunks:i C:i16 H:i W:i stride_h:i stride_w:i C2:i16 H2:i W2:i stride2_h:i "
    "stride2_w:i"
)
_GRAM = (
    "x:MN scale:f?PENDING shift:f?PENDING partials:p sums:d centres:f?COMPENSATED M:i C:i16 P:i Q:i H:i W:i stride_h:i "
    "stride_w:i chunks:i"
)
_CONV3X3 = (
    "x:MK!PLAIN scale:f?PENDING shift:f?PENDING y:MK!PLAIN?GRAD mean:f?GRAD a:f?GRAD b:f?GRAD c:f?GRAD "
    "filters:{}!PLAIN out:MN!PLAIN partials:f?STATS|BELOW below:MN!PLAIN?BELOW below_mean:f?BELOW below_scale:f?BELOW "
    "below_shift:f?BELOW M:i H:i W:i C:i16 K:i16"
)
_WGRAD3X3 = (
    "dz:MN!PLAIN y:MN!PLAIN?GRAD y_mean:f?GRAD y_a:f?GRAD y_b:f?GRAD y_c:f?GRAD x:MK!PLAIN scale:f?PENDING shift:f?PENDING "
    "partials:f M:i H:i W:i C:i16 K:i16 ROWS:i16"
)
_BN_BACKWARD = "grad:T x:T mask:u8 mean:f scale:f shift:f"
_POOL = "grad:T index:u8 x:T mean:f N:i H:i W:i P:i Q:i C:i16"

REGISTRY = (
    Kernel(
        "fprop1x1", "gemm", "fprop_kernel", _FPROP1X1,
        ("PENDING X_RELU NORM RESIDUAL MASK RELU", "PENDING X_RELU NORM DUAL STRIDED2 MASK RELU", "PENDING X_RELU STATS", ""),
        exact="NORM",
    ),
    Kernel("flagged1x1", "flagged", "flagged_moments_kernel", _FLAGGED, ("PENDING X_RELU",), own_configs=True),
    Kernel(
        "dgrad1x1", "gemm", "dgrad_kernel", _DGRAD1X1,
        ("MASK FEEDBACK A_RELU BELOW BELOW_RELU", "GRAD BELOW BELOW_RELU", "GRAD RESIDUAL", ""),
        fixed="K_ALIGNED C_ALIGNED", float32="CENTRED", half="CONSTANT LOW", exact="FEEDBACK",
    ),
    Kernel(
        "wgrad1x1", "cross", "wgrad_kernel", _WGRAD1X1,
        ("MASK PENDING A_RELU DUAL STRIDED2", "MASK PENDING A_RELU", "GRAD PENDING A_RELU", ""),
        fixed="K_ALIGNED", float32="COMPENSATED CENTRED", exact="MASK",
    ),
    Kernel("gram", "cross", "gram_kernel", _GRAM, ("PENDING RELU",), float32="COMPENSATED", exact="*"),
    Kernel("fprop3x3", "conv3x3", "conv3x3_kernel", _CONV3X3.format("N1K"), ("PENDING RELU STATS", ""), float32="PLAIN"),
    Kernel(
        "dgrad3x3", "conv3x3", "conv3x3_kernel", _CONV3X3.format("K1N"), ("GRAD BELOW BELOW_RELU", ""), fixed="BACKWARD",
        float32="PLAIN",
    ),
    Kernel("wgrad3x3", "conv3x3", "wgrad3x3_kernel", _WGRAD3X3, ("GRAD PENDING RELU", ""), float32="PLAIN"),
    Kernel("bn_stats", "bn", "moments_kernel", "x:T partials:d M:i C:i16 steps:i", ("",), fixed="ALIGNED"),
    Kernel(
        "bn_act", "bn", "bn_act_kernel", "x:T scale:f shift:f residual:T out:T mask:u8 M:i C:i16",
        ("HAS_RESIDUAL RELU SAVE_MASK", "RELU"), fixed="ALIGNED",
    ),
    Kernel(
        "bn_backward_reduce", "bn", "bn_act_backward_reduce_kernel", _BN_BACKWARD + " activation:T partials:f M:i C:i16 steps:i",
        ("GATE=2 RELU WANT_ACTIVATION", "GATE=1 RELU"), fixed="ALIGNED",
    ),
    Kernel(
        "bn_backward", "bn", "bn_act_backward_kernel", _BN_BACKWARD + " a:f b:f c:f dx:T M:i C:i16",
        ("GATE=1", "GATE=2"), fixed="ALIGNED",
    ),
    Kernel("add_relu", "residual", "add_relu_kernel", "a:T b:T out:T mask:u8 count:i16", ("SAVE_MASK",)),
    Kernel(
        "pool", "pool", "bn_relu_maxpool_kernel", "x:T scale:f shift:f out:T index:u8 H:i W:i P:i Q:i C:i16", ("",),
        fixed="ALIGNED",
    ),
    Kernel("pool_backward", "pool", "bn_relu_maxpool_backward_kernel", _POOL + " a:f b:f c:f dx:T", ("",), fixed="ALIGNED"),
    Kernel(
        "pool_backward", "pool", "bn_relu_maxpool_backward_reduce_kernel", _POOL + " partials:f steps:i", ("REDUCE",),
        fixed="ALIGNED",
    ),
)  # fmt: skip


@functools.cache
def launches(dtype: str) -> dict[str, list[dict[str, int]]]:
    """The shapes that ResNet-18 and ResNet-50 launch each kernel with, at batch sizes 32 and 256, by kernel."""
    import torch

    from resnet_fused import models
    from resnet_fused.workloads import workloads

    found: dict[str, list[dict[str, int]]] = {}
    of = torch.float32 if dtype == "tf32" else torch.bfloat16 if dtype == "float16" else getattr(torch, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype == "tf32"):
        for name, batch, training in itertools.product(("resnet18", "resnet50"), (32, 256), (True, False)):
            with torch.device("meta"):
                network = models.BUILDERS[name]()
            for workload in workloads(network, batch, 224, of, training):
                found.setdefault(workload.kernel, []).append(dict(workload.shape))
    return found


def _has_tf32(kernel: Kernel) -> bool:
    return multiplies(kernel.name) and not kernel.own_configs


def chosen(kernel: Kernel, variant: str, dtype: str, arch: int) -> list[Any]:
    """The configurations that ResNets get on GPUs of this architecture: those of any launch of the kernel, but for what decides
    which there are to choose from, a coupling and how float32 is multiplied."""
    import torch

    from resnet_fused.backends.triton import configs, cost, devices, flagged

    if kernel.own_configs:
        return [flagged.CONFIGS[getattr(torch, dtype).itemsize]]
    gpus = [gpu for gpu in devices.DEVICES.values() if gpu.arch == arch]
    decided = ("FEEDBACK" in variant, kernel.precision(variant, dtype) if multiplies(kernel.name) else "ieee")
    shapes = [
        shape
        for shape in launches(dtype).get(kernel.name, [])
        if (bool(shape.get("feedback")), configs.precision_of(shape)) == decided
    ]
    of = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    cases = itertools.product(gpus, shapes)
    return list(dict.fromkeys(cost.ranked(kernel.name, shape, of, gpu)[0] for gpu, shape in cases))


def shipped() -> list[Case]:
    """Every variant of every kernel in every configuration; float16 compiles as bfloat16 does."""
    return [
        kernel.case(variant, dtype, arch, config)
        for kernel, arch in itertools.product(REGISTRY, ARCHES)
        for dtype in ("bfloat16", "float32", *(("tf32",) if _has_tf32(kernel) else ()))
        for variant in kernel.variants
        for config in chosen(kernel, variant, dtype, arch)
    ]


def default_suite(arch: int) -> list[Case]:
    """One configuration of every kernel and dtype: the fullest variant on sm_90, where float16 is looked at too."""
    full = 0 if arch == 90 else -1
    cases = []
    for kernel in REGISTRY:
        dtypes = {"bfloat16": full, "float32": full} | ({"tf32": full} if _has_tf32(kernel) else {})
        if arch == 90 and multiplies(kernel.name):
            dtypes["float16"] = -1
        for dtype, variant in dtypes.items():
            name = kernel.variants[variant]
            cases += [kernel.case(name, dtype, arch, config) for config in chosen(kernel, name, dtype, arch)[:1]]
    return cases
