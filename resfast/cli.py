"""The command line, `resfast train | predict | bench | …`: a function a command."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from resfast.training.config import DTYPES, EXPORTS, TrainConfig, UserError

INTERRUPTED = 130

EXAMPLES = {
    "": """examples:
  resfast train                          train on real handwritten digits, about a minute
  resfast predict runs/NAME              classify the images it never saw
  resfast export runs/NAME --out n.onnx  the trained network for other programs
  resfast gradflow                       why shortcuts matter, in a picture
  resfast bench                          compare speed with what people use instead
  resfast tune                           measure tiles, and whose kernels run, on this GPU
  resfast traffic                        bytes of memory a training step moves
  resfast info                           what is built and what runs here
  resfast check                          compare numerics with stock PyTorch""",
    "train": """examples:
  resfast train
  resfast train --optimizer sgd --lr 0.05 --l2 5e-4 --seed 1
  resfast train --data photos/ --model resnet34 --dtype bfloat16 --flip
  resfast train --data imagenet/ --stream on --workers 12 --model resnet50 --batch-size 256
  resfast train --resume runs/NAME --epochs 24
  torchrun --nproc-per-node 2 -m resfast.cli train --sync-bn --out runs/two
Ctrl-C saves a checkpoint first. Exit status: 0 done, 1 failed, 2 bad options, 130 stopped.""",
    "predict": """examples:
  resfast predict runs/NAME
  resfast predict runs/NAME seven.png --invert --top 5
  resfast predict runs/NAME/best.pt --json""",
    "export": """examples:
  resfast export runs/NAME --out net.onnx
  resfast export runs/NAME/best.pt --out net.pt2
Both take pixels, float32 in [0, 1], and give logits; .safetensors holds the weights alone. Class
names, mean, standard deviation and image shape are in the metadata.""",
    "gradflow": """examples:
  resfast gradflow
  resfast gradflow --depths 20,56 --data photos/ --out flow.svg""",
    "bench": """examples:
  resfast bench
  resfast bench --model resnet50 --train --batch 8 --peers all --floor --save out.json
  resfast bench --batch 16 --peers eager-nhwc,openvino --plot out.png
  resfast bench --report bench/results/*/*.json --plot speed.svg
Peers that cannot run here are listed with the reason. Above 1×, resfast is faster.""",
    "tune": """examples:
  resfast tune --model resnet50 --batch 256 --train --dtype bfloat16
Results go to ~/.cache/resfast and are used from then on; training also measures what is new.""",
    "traffic": """examples:
  resfast traffic --model resnet50 --batch 256 --step c0 --convolutions own
Counted on any machine with Triton, with or without a GPU.""",
    "info": "examples:\n  resfast info\n  resfast info --json",
    "check": """examples:
  resfast check --quick
  resfast check --dtype bfloat16 --out report.json
  resfast check --device cuda""",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, no abbreviated options, examples kept as written."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    warnings.formatwarning = _one_line_warning
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 2
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print(f"resfast {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if arguments.debug:
            raise
        print(f"resfast {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if arguments.debug:
            raise
        kind = type(error).__name__
        text = " ".join(str(error).split())
        print(f"resfast {arguments.command}: {kind}: {text} (--debug shows where)", file=sys.stderr)
        return 1


def build_parser() -> Parser:
    import resfast

    parser = Parser(
        prog="resfast",
        description="Fused Conv+BN+ReLU+residual for ResNets in PyTorch.",
        epilog=EXAMPLES[""],
    )
    parser.add_argument("--version", action="version", version=f"resfast {resfast.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = _command(commands, "train", "train a ResNet and compare its speed with eager", _train)
    _add_training_options(train)

    predict = _command(commands, "predict", "classify images with a trained checkpoint", _predict)
    predict.add_argument("source", type=Path, metavar="RUN", help="run folder or checkpoint file")
    predict.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="default: the held-out test images"
    )
    predict.add_argument("--data", help="where the run's data is now, if it has moved")
    predict.add_argument("--device", default="auto", help="as in train (default: auto)")
    predict.add_argument(
        "--invert", action="store_true", help="dark ink on light paper (digits are light on dark)"
    )
    predict.add_argument("--show", type=_count, default=5, help="test images to list (default: 5)")
    predict.add_argument("--top", type=_positive, default=1, help="classes to name (default: 1)")
    predict.add_argument("--json", action="store_true", help="machine-readable output")

    export = _command(
        commands, "export", "write a trained network for use without resfast", _export
    )
    export.add_argument("source", type=Path, metavar="RUN", help="run folder or checkpoint file")
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".pt2 (torch.export), .onnx or .safetensors",
    )
    export.add_argument("--format", choices=EXPORTS, help="default: by the suffix of FILE")

    gradflow = _command(
        commands, "gradflow", "how shortcuts carry gradients, in a picture", _gradflow
    )
    gradflow.add_argument(
        "--depths", type=_numbers, default=(8, 20, 56, 110), help="6·n + 2 (default: 8,20,56,110)"
    )
    gradflow.add_argument("--data", default="digits", help="as in train (default: digits)")
    gradflow.add_argument("--seed", type=_count, default=0, help="default: 0")
    gradflow.add_argument(
        "--out", type=Path, default=Path("gradflow.png"), help="default: gradflow.png"
    )

    bench = _command(commands, "bench", "race a model against what people use instead", _bench)
    _add_bench_options(bench)

    tune = _command(commands, "tune", "measure tiles, and whose kernels run, on this GPU", _tune)
    _add_work_options(tune)
    _add_step_option(tune, action="append", shown="the one in force")

    traffic = _command(commands, "traffic", "bytes of memory a training step moves", _traffic)
    traffic.add_argument("--model", default="resnet50", help="default: resnet50")
    traffic.add_argument("--batch", type=_positive, default=256, help="default: 256")
    traffic.add_argument("--image", type=_positive, default=224, help="default: 224")
    traffic.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    traffic.add_argument("--infer", action="store_true", help="forward in eval mode instead")
    _add_step_option(traffic, shown="the one in force")
    traffic.add_argument(
        "--convolutions", choices=("auto", "own", "library"), help="default: the choice in force"
    )

    info = _command(commands, "info", "what is built, what runs here, and why not", _info)
    info.add_argument("--json", action="store_true", help="machine-readable output")

    check = _command(commands, "check", "compare numerics with stock PyTorch in fp64", _check)
    check.add_argument("--quick", action="store_true", help="fewer shapes and seeds")
    check.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="precision to check, may be repeated (default: all)",
    )
    check.add_argument(
        "--device", default="cpu", help="cpu, cuda, cuda:N, or auto: a GPU if any (default: cpu)"
    )
    check.add_argument("--out", type=Path, help="also write the report here, as JSON")
    return parser


def _add_work_options(parser: Parser) -> None:
    parser.add_argument("--model", default="resnet18", help="see resfast info (default: resnet18)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--train", action="store_true", help="forward, loss and backward of a batch")
    kind.add_argument("--infer", action="store_true", help="forward in eval mode (default)")
    parser.add_argument("--batch", type=_positive, default=1, help="images a step, default: 1")
    parser.add_argument(
        "--image", type=_positive, default=224, help="side in pixels (default: 224)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="auto", help="as in train (default: auto)")


def _add_step_option(parser: Parser, shown: str, **options: Any) -> None:
    from resfast.backends.fusion import STEPS

    parser.add_argument(
        "--step", choices=STEPS, help=f"how far norms are fused (default: {shown})", **options
    )


def _add_bench_options(parser: Parser) -> None:
    _add_work_options(parser)
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--peers", default="default", help="all, default, or names with commas (default: default)"
    )
    parser.add_argument(
        "--budget", type=_seconds, default=10.0, help="timing per peer, in seconds (default: 10)"
    )
    parser.add_argument(
        "--floor", action="store_true", help="also measure the machine's limits: the roofline"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the record as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: table and picture of saved records, as in README",
    )


def _command(commands: Any, name: str, text: str, run: Any) -> Parser:
    parser: Parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXAMPLES[name]
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )
    parser.set_defaults(run=run)
    return parser


def add_config_options(parser: Parser, without: Sequence[str] = ()) -> None:
    """One option per field of TrainConfig; only those given end up in the namespace."""
    kinds = {"int": int, "float": float, "str": str}
    for option in dataclasses.fields(TrainConfig):
        if option.name in without:
            continue
        shown = option.metadata.get("shown", option.default)
        flag = "--" + option.name.replace("_", "-")
        text = option.metadata["help"].replace("%", "%%")
        kind = str(option.type).removesuffix(" | None")
        if kind == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        parser.add_argument(
            flag,
            type=kinds[kind],
            default=argparse.SUPPRESS,
            choices=option.metadata.get("choices"),
            metavar=None if "choices" in option.metadata else option.name.upper(),
            help=f"{text} (default: {shown})",
        )


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that are on the command line."""
    names = [option.name for option in dataclasses.fields(TrainConfig)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _add_training_options(parser: Parser) -> None:
    add_config_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/MODEL-DATA-TIME)"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with this run folder")
    parser.add_argument(
        "--no-compare", action="store_true", help="skip the comparison with the unfused twin"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the curves as TensorBoard's event files, into DIR/tensorboard",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def _train(arguments: argparse.Namespace) -> int:
    from resfast.training.config import OptionError
    from resfast.training.run import train

    if arguments.out is not None and arguments.resume is not None:
        raise OptionError(
            "--out and --resume exclude each other: a resumed run stays in its folder"
        )
    return train(
        given_options(arguments),
        out=arguments.out,
        resume=arguments.resume,
        comparison=not arguments.no_compare,
        quiet=arguments.quiet,
        tensorboard=arguments.tensorboard,
    )


def _predict(arguments: argparse.Namespace) -> int:
    from resfast.training.predict import predict

    return predict(
        arguments.source,
        arguments.images,
        data=arguments.data,
        device=arguments.device,
        invert=arguments.invert,
        as_json=arguments.json,
        show=arguments.show,
        top=arguments.top,
    )


def _export(arguments: argparse.Namespace) -> int:
    from resfast.training.export import export

    return export(arguments.source, arguments.out, arguments.format)


def _gradflow(arguments: argparse.Namespace) -> int:
    from resfast.training.gradflow import gradflow

    return gradflow(arguments.depths, arguments.data, arguments.seed, arguments.out)


def _work(arguments: argparse.Namespace) -> Any:
    from resfast.benchmark.work import Work
    from resfast.models import list_models
    from resfast.training.config import check_model, resolve_device

    check_model(arguments.model, list_models())
    return Work(
        arguments.model,
        arguments.batch,
        arguments.train,
        arguments.image,
        arguments.dtype,
        str(resolve_device(arguments.device)),
    )


def _tune(arguments: argparse.Namespace) -> int:
    from resfast.backends.fusion import current_fusion
    from resfast.benchmark.tune import tune

    return tune(_work(arguments), arguments.step or [current_fusion().step])


def _traffic(arguments: argparse.Namespace) -> int:
    import resfast
    from resfast.diagnostics import numerics, traffic
    from resfast.models import list_models
    from resfast.training.config import check_model

    check_model(arguments.model, list_models())
    shape = (arguments.batch, 3, arguments.image, arguments.image)
    with resfast.fusion(arguments.step, arguments.convolutions):
        count = traffic.inference_traffic if arguments.infer else traffic.training_traffic
        ledger = count(
            resfast.create_model(arguments.model), shape, numerics.DTYPES[arguments.dtype]
        )
        print(traffic.summary(ledger, arguments.batch))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from resfast.benchmark import command

    if arguments.report is not None:
        return command.draw(arguments.report, arguments.plot)
    work = _work(arguments)
    return command.bench(
        work,
        arguments.peers,
        budget=arguments.budget,
        roofline=arguments.floor,
        threads=arguments.threads,
        save=arguments.save,
        plot=arguments.plot,
    )


def _info(arguments: argparse.Namespace) -> int:
    from resfast.info import info

    return info(as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    from resfast.diagnostics import numerics
    from resfast.training.config import resolve_device

    status: int = numerics.main(
        quick=arguments.quick,
        dtypes=arguments.dtype or list(DTYPES),
        out=arguments.out,
        device=str(resolve_device(arguments.device)),
    )
    return status


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    return f"resfast: warning: {' '.join(str(message).split())}\n"


def as_process() -> NoReturn:
    """``main`` as a process of its own, or as one of torchrun's."""
    try:
        status: Any = main()
    except SystemExit as leaving:
        status = leaving.code
    if "TORCHELASTIC_RUN_ID" in os.environ and isinstance(status, int):
        # Gloo's threads may abort a process that ends in the ordinary way, and torchrun would then
        # take any other status for a crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    as_process()
