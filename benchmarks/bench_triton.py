"""The Triton kernels one launch at a time, on the shapes of a network, beside stock PyTorch and the roofline.

On a GPU each launch is compared with float64, then timed in turns with stock PyTorch's calls for the same work, where there
are any. Without a GPU the cost model predicts what a GPU of the name ``--gpu`` would take; nothing is measured, and no rows
are written. The roofline counts what cannot be avoided: each operand read once, each result written once, each product formed
once.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends, info, models, networks, tune
from resnet_fused.arguments import Parser, image_size, one_of, positive
from resnet_fused.backends.aten import rows
from resnet_fused.backends.operands import Conv, Pending, PendingGrad
from resnet_fused.console import UsageError, print_table, progress_bar, warn
from resnet_fused.result_file import append_csv, key_of, measured

FAMILIES = {
    "gemm": ("fprop1x1", "dgrad1x1", "wgrad1x1", "gram"),
    "conv3x3": ("fprop3x3", "dgrad3x3", "wgrad3x3"),
    "bn": ("bn_stats", "bn_act", "bn_backward_reduce", "bn_backward", "add_relu", "pool", "pool_backward"),
}


# Stock PyTorch's calls, with what is pending formed by calls of its own


def activation(y: Any, residual: Tensor | None = None) -> Tensor:
    """``relu(scale·y + shift [+ residual])`` by an inference batch norm; a tensor is there already."""
    if not isinstance(y, Pending):
        return y
    z = F.batch_norm(y.y, torch.zeros_like(y.shift), torch.ones_like(y.shift), y.scale, y.shift, False, 0.0, 0.0)
    z = z if residual is None else z.add_(residual)
    return z.relu_() if y.relu else z


def gradient(dy: Any) -> Tensor:
    """The second pass of a batch norm's backward; a tensor is there already."""
    if not isinstance(dy, PendingGrad):
        return dy
    count = torch.full((1,), dy.dz.numel() // len(dy.a), dtype=torch.int32, device=dy.dz.device)
    return torch.batch_norm_backward_elemt(dy.dz, dy.y, dy.mean, torch.ones_like(dy.a), dy.a, dy.c, dy.b, count)


def convolution(x: Any, weight: Tensor, conv: Conv) -> Tensor:
    return F.conv2d(activation(x), weight, None, conv.stride, conv.padding)


def convolution_backward(dy: Any, x: Any, weight: Tensor, conv: Conv, which: int) -> Tensor:
    wanted = [i == which for i in range(3)]
    arguments = (
        activation(x),
        weight.to(x.dtype),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
    )
    return torch.ops.aten.convolution_backward(gradient(dy), *arguments, wanted)[which]


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.batch_norm_stats(y, 1e-5)


def covariance(a: Any, conv: Conv) -> Tensor:
    matrix = rows(activation(a), conv.stride)
    return matrix.t() @ matrix


def dgrad(dy: Any, x: Tensor, weight: Tensor, conv: Conv, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    dx = convolution_backward(dy, x, weight, conv, 0)
    return dx if residual is None else dx.add_(residual)


def wgrad(dy: Any, x: Any, weight: Tensor, conv: Conv) -> Tensor:
    a = activation(x)
    return convolution_backward(dy, a, weight, conv, 1)


def normalised(products: Sequence[Any], shift: Tensor, residual: Tensor | None, relu: bool, save: bool) -> Tensor:
    first, *others = (convolution(p.a, p.weight, p.conv) for p in products)
    z = activation(Pending(first, products[0].scale, shift, False), residual)
    for y, product in zip(others, products[1:], strict=True):
        z.add_(activation(Pending(y, product.scale, torch.zeros_like(shift), False)))
    return z.relu_() if relu else z


def backward_reduce(grad: Tensor, x: Tensor, mask: Any, mean: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dz = torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.batch_norm_backward_reduce(dz, x, mean, torch.ones_like(mean), scale, True, True, True)


STOCK: dict[str, Callable[..., Any]] = {
    "fprop": convolution,
    "fprop_stats": lambda x, weight, conv: moments(convolution(x, weight, conv)),
    "dgrad": dgrad,
    "wgrad": wgrad,
    "gram": covariance,
    "fprop_bn_act": normalised,
    "bn_stats": moments,
    "bn_act": lambda x, scale, shift, residual, relu, save: activation(Pending(x, scale, shift, relu), residual),
    "bn_act_": lambda x, scale, shift, residual, relu: activation(Pending(x, scale, shift, relu), residual),
    "bn_act_backward_reduce": backward_reduce,
    "bn_act_backward": lambda grad, x, mask, mean, scale, shift, relu, abc, inplace: gradient(
        PendingGrad(grad, x, mean, *abc)
    ),
    "add_relu": lambda a, b, save: (a + b).relu_(),
    "bn_relu_maxpool": lambda x, scale, shift: F.max_pool2d(activation(Pending(x, scale, shift, True)), 3, 2, 1),
}


# Figures


def figures(workload: Any, seconds: float, gpu: Any) -> dict[str, str]:
    """GB/s and TFLOP/s of what cannot be avoided, and the share of the roofline; no TFLOP/s where nothing is multiplied."""
    return {
        "gb_per_s": f"{workload.traffic_bytes / seconds / 1e9:.4g}",
        "tflop_per_s": f"{workload.flops / seconds / 1e12:.4g}" if workload.flops else "",
        "fraction_of_roofline": f"{workload.roofline_seconds(gpu) / seconds:.3g}",
    }


def print_predicted(counts: dict[Any, int], gpu: Any) -> None:
    """What the cost model says; where it counts less than cannot be avoided, the roofline."""
    from resnet_fused.backends.triton import cost

    lines, total, bound = [], 0.0, 0.0
    for workload, count in counts.items():
        question = workload.kernel, workload.shape, workload.dtype
        config = cost.ranked(*question, gpu)[0]
        roofline = workload.roofline_seconds(gpu)
        seconds = max(cost.predict(*question, config, gpu).seconds, roofline)
        total, bound = total + count * seconds, bound + count * roofline
        found = figures(workload, seconds, gpu)
        times = f"{seconds * 1e6:.1f}", f"{roofline * 1e6:.1f}"
        configuration = tune.describe_config(config)
        label = workload.kernel, workload.method, tune.describe_shape(workload), str(count), configuration
        lines.append([*label, *times, *found.values(), "predicted"])
    header = [
        "kernel",
        "method",
        "shape",
        "times",
        "configuration",
        "µs",
        "roofline µs",
        "GB/s",
        "TFLOP/s",
        "of roofline",
    ]
    print_table(
        f"PREDICTED by the cost model for an {gpu.name}: nothing was measured",
        [*header, ""],
        lines,
        right=(3, 5, 6, 7, 8, 9),
        caption=f"all of them, each as often as it occurs: predicted {total * 1e3:.2f} ms, roofline {bound * 1e3:.2f} ms",
    )


def measure(workload: Any, device: torch.device, clock: Any, repeats: int) -> tuple[dict[str, list[float]], Any]:
    """Microseconds of each provider, sampled in turns, and the accuracy; no samples for a wrong answer."""
    from resnet_fused.backends.triton.trial import Trial

    trial = Trial(workload, device)
    accuracy = trial.accuracy()
    if not accuracy.is_right:
        return {}, accuracy
    providers = {"triton": clock.prepare(trial.call)}
    stock = STOCK.get(workload.method)
    if stock is not None:
        providers["stock"] = clock.prepare(lambda: stock(*trial.arguments.values()))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, sample in providers.items():
            samples[name].append(sample())
    return samples, accuracy


def fixed_columns(workload: Any, mode: str, gpu: Any) -> dict[str, Any]:
    return {
        "op": f"{workload.kernel} {workload.method}",
        "mode": mode,
        "shape": tune.describe_shape(workload),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "layout": "channels_last",
        "device": gpu.name,
    }


def csv_rows(
    workload: Any, samples: dict[str, list[float]], accuracy: Any, mode: str, gpu: Any
) -> list[dict[str, Any]]:
    """With the columns of ``result_file.COLUMNS``, a row for each provider."""
    fixed = fixed_columns(workload, mode, gpu) | info.provenance("triton")
    made = []
    for name, us in samples.items():
        low, middle, high = (
            torch.tensor(us, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        )
        times = {"p50_ms": f"{middle / 1e3:.5f}", "p20_ms": f"{low / 1e3:.5f}", "p80_ms": f"{high / 1e3:.5f}"}
        made.append(fixed | {"provider": name} | times | figures(workload, middle * 1e-6, gpu))
    if made:
        made[0]["error_vs_fp64"] = f"{accuracy.ours:.2e}"
    if "stock" in samples:
        ratio = float(made[1]["p50_ms"]) / float(made[0]["p50_ms"])
        made[0]["ratio_to_stock"] = f"{ratio:.3f}"
    return made


def run_measured(counts: Iterable[Any], mode: str, repeats: int, results_file: str | None, resume: bool = False) -> int:
    """Check and time every launch; rows are appended as they come. 1 when an answer was wrong.

    ``resume``: what the results file has of this device is left out.
    """
    from resnet_fused.backends.triton import devices
    from resnet_fused.clock import Clock

    device = tune.gpu_to_measure()
    gpu, clock = devices.describe(device), Clock(device)
    made: list[dict[str, Any]] = []
    done = measured(results_file, gpu.name) if resume else set()
    wrong, todo = 0, [workload for workload in counts if key_of(fixed_columns(workload, mode, gpu)) not in done]
    with progress_bar() as progress:
        task = progress.add_task("launches", total=len(todo))
        for workload in todo:
            progress.update(task, description=f"{workload.kernel} {tune.describe_shape(workload)}")
            samples, accuracy = measure(workload, device, clock, repeats)
            if not samples:
                wrong += 1
                warn(f"{workload.kernel} {tune.describe_shape(workload)}: WRONG ANSWER, error {accuracy.ours:.1e}")
            found = csv_rows(workload, samples, accuracy, mode, gpu)
            made += found
            if results_file:
                append_csv(results_file, found)
            progress.advance(task)
    columns = ("op", "provider", "shape", "p50_ms", "gb_per_s", "tflop_per_s", "fraction_of_roofline", "ratio_to_stock")
    rows_shown = [[row.get(column, "") for column in columns] for row in made]
    print_table(f"Triton kernels on {gpu.name}", columns, rows_shown, right=(3, 4, 5, 6, 7))
    return 1 if wrong else 0


def interpreted() -> torch.device:
    """The processor.

    Raises:
        UsageError: kernels do not run on it.
    """
    if "triton" not in backends.available_backends():
        raise UsageError(f"--check: {backends.unavailable_backends()['triton']}")
    return torch.device("cpu")


def run_checks(counts: Iterable[Any], device: torch.device) -> int:
    """Compare every launch with float64, without its time; 1 when an answer was wrong."""
    from resnet_fused.backends.triton.trial import Trial

    todo, wrong = list(counts), 0
    with progress_bar() as progress:
        task = progress.add_task("launches", total=len(todo))
        for workload in todo:
            told = f"{workload.kernel} {tune.describe_shape(workload)} {str(workload.dtype).removeprefix('torch.')}"
            progress.update(task, description=told)
            accuracy = Trial(workload, device).accuracy()
            if not accuracy.is_right:
                wrong += 1
                warn(f"{told}: WRONG ANSWER, error {accuracy.ours:.1e}, stock's {accuracy.stock:.1e}")
            progress.advance(task)
    print(f"{len(todo) - wrong} of {len(todo)} launches of Triton kernels are as accurate as stock on {device}")
    return 1 if wrong or not todo else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--model", type=one_of("model", networks.BUILDERS), default="resnet50", metavar="NAME")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--image-size", type=image_size, default=224)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--repeats", type=positive, default=21)
    parser.add_argument(
        "--gpu", default="H200", help="whose times are predicted where there is no GPU: A100, H100, H200, B200"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with float64 only; also where Triton's interpreter runs"
    )
    parser.add_argument("--results-file", metavar="CSV", help="measured rows are appended")
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has of this device")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed: pip install resnet_fused[triton]")
    from resnet_fused.backends.triton import devices
    from resnet_fused.workloads import workloads

    if options.gpu not in devices.DEVICES:
        parser.error(f"--gpu: expected one of {', '.join(devices.DEVICES)}, got {options.gpu!r}")
    with torch.device("meta"):
        network = models.BUILDERS[options.model]()
    dtype = networks.DTYPES[options.dtype]
    counts = workloads(network, options.batch, options.image_size, dtype, options.mode == "train")
    kernels = [kernel for family in options.family for kernel in FAMILIES[family]]
    counts = {workload: count for workload, count in counts.items() if workload.kernel in kernels}
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.check):
        print_predicted(counts, devices.DEVICES[options.gpu])
        return 0
    try:
        if options.check:
            return run_checks(counts, tune.gpu_to_measure() if on_gpu else interpreted())
        return run_measured(counts, options.mode, options.repeats, options.results_file, options.resume)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
