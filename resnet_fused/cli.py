"""``resnet-fused info | verify | bench | predict | tune``: reads the arguments and calls the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .arguments import Parser, device_name, image_size, one_of, positive
from .console import UsageError, require_rich, warn
from .networks import BUILDERS, DTYPES
from .providers import NAMES as PROVIDERS
from .version import __version__

TRITON_DTYPES = ("fp32", "bf16", "fp16")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="resnet-fused", description="Fused ResNets for PyTorch: look, verify, measure, classify.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{info,verify,bench,predict,tune}", parser_class=Parser)
    model, dtype = one_of("model", BUILDERS), one_of("dtype", tuple(DTYPES))

    info = commands.add_parser("info", help="versions, backends, device, settings")
    info.add_argument("--json", action="store_true", help="machine-readable")

    verify = commands.add_parser("verify", help="compare every network with stock PyTorch, against float64")
    verify.add_argument(
        "--model", type=model, nargs="+", default=list(BUILDERS), metavar="NAME", help="default: all ten"
    )
    verify.add_argument(
        "--dtype", "--dtypes", dest="dtype", type=dtype, nargs="+", default=["fp32", "bf16"], metavar="DTYPE"
    )
    verify.add_argument("--mode", choices=("eval", "train"), nargs="+", default=["eval", "train"])
    verify.add_argument("--batch", type=positive, default=4)
    verify.add_argument("--image-size", type=image_size, default=64)
    verify.add_argument("--device", type=device_name, default="cpu")

    bench = commands.add_parser("bench", help="measure stock, fused and torch.compile side by side")
    bench.add_argument("--model", type=model, default="resnet50", metavar="NAME")
    bench.add_argument("--batch", type=positive, nargs="+", default=[16])
    bench.add_argument("--image-size", type=image_size, default=224)
    bench.add_argument(
        "--dtype", type=dtype, nargs="+", default=["fp32"], metavar="DTYPE", help="fp64, fp32, bf16, fp16"
    )
    bench.add_argument("--mode", choices=("infer", "train"), default="infer")
    bench.add_argument("--device", type=device_name, default="cpu")
    bench.add_argument(
        "--images", metavar="DIR", help="a folder of pictures; default: scikit-image's photographs, else noise"
    )
    bench.add_argument("--results-file", metavar="CSV", help="rows are appended")
    bench.add_argument(
        "--providers",
        type=one_of("provider", PROVIDERS),
        nargs="+",
        default=["stock", "fused", "compile"],
        metavar="NAME",
        help=f"{', '.join(PROVIDERS)} (stock always runs: it is what the others are compared with; genstats: fused, "
        "without the covariance plan; +graph: as a CUDA graph; compile-max: mode max-autotune)",
    )
    bench.add_argument("--repeats", type=positive, default=11, help="samples per provider, interleaved")
    bench.add_argument(
        "--fused-times", type=positive, default=2, metavar="N", help="fused is timed N times: what differs is noise"
    )
    bench.add_argument("--noise", action="store_true", help="noise that is made on the device in place of pictures")
    bench.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes a process each")

    predict = commands.add_parser("predict", help="classify pictures")
    predict.add_argument("image", nargs="+", metavar="IMAGE")
    predict.add_argument("--model", type=model, default="resnet50", metavar="NAME")
    predict.add_argument(
        "--weights", metavar="FILE|NAME", help=".pth, .safetensors, or torchvision's DEFAULT, IMAGENET1K_V1, …"
    )
    predict.add_argument("--random", action="store_true", help="run an untrained network: its answers mean nothing")
    predict.add_argument("--top-k", type=positive, default=5)
    predict.add_argument("--labels", metavar="FILE", help="one label per line; default: torchvision's for ImageNet")
    predict.add_argument("--device", type=device_name, default="cpu")

    tune = commands.add_parser("tune", help="measure on this GPU what networks run, and keep the fastest")
    tune.add_argument("--model", type=model, nargs="+", default=["resnet50"], metavar="NAME")
    tune.add_argument("--batch", type=positive, default=256)
    tune.add_argument("--image-size", type=image_size, default=224)
    tune.add_argument(
        "--dtype",
        type=one_of("dtype", TRITON_DTYPES),
        nargs="+",
        default=["bf16"],
        metavar="DTYPE",
        help="fp32, bf16, fp16",
    )
    tune.add_argument("--mode", choices=("train", "infer"), default="train")
    tune.add_argument("--table", metavar="JSON", help="entries are added; default: the user's table, which is in use")
    tune.add_argument("--kernel", nargs="+", metavar="NAME", help="only these, such as fprop1x1 gram; default: all")
    tune.add_argument(
        "--only",
        choices=("kernels", "routes"),
        nargs="+",
        help="kernels: configurations of the Triton kernels; routes: which kernels run each chain, and whether any of ours; "
        "default: both, or with --kernel the kernels",
    )
    tune.add_argument(
        "--configs", type=positive, metavar="N", help="try the N that the cost model finds fastest; default: all"
    )
    return parser


def _check_environment() -> None:
    from . import backends

    try:
        backends.current()
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    _check_environment()
    if arguments.command == "info":
        from . import info

        return info.run(arguments.json)
    require_rich()
    if arguments.command == "verify":
        from . import verify

        return verify.run(
            arguments.model,
            arguments.dtype,
            arguments.mode,
            device=arguments.device,
            batch=arguments.batch,
            image_size=arguments.image_size,
        )
    if arguments.command == "bench":
        from . import bench

        return bench.run(
            arguments.model,
            arguments.batch,
            arguments.dtype,
            mode=arguments.mode,
            image_size=arguments.image_size,
            device=arguments.device,
            folder=arguments.images,
            results_file=arguments.results_file,
            chosen=arguments.providers,
            repeats=arguments.repeats,
            memory=not arguments.no_memory,
            noise=arguments.noise,
            fused_times=arguments.fused_times,
        )
    if arguments.command == "tune":
        from . import tune

        return tune.run(
            arguments.model,
            batch=arguments.batch,
            image_size=arguments.image_size,
            dtypes=arguments.dtype,
            mode=arguments.mode,
            table=arguments.table,
            kernels=arguments.kernel,
            most=arguments.configs,
            only=arguments.only,
        )
    from . import predict

    return predict.run(
        arguments.image,
        model=arguments.model,
        weights=arguments.weights,
        random=arguments.random,
        top_k=arguments.top_k,
        labels=arguments.labels,
        device=arguments.device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 all well, 1 something failed, 2 it was asked wrongly."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return _run(arguments)
    except UsageError as error:
        warn(str(error))
        return 2
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130
