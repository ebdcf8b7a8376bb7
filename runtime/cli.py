"""The command line: `python -m regraft VERB ...`. Errors name the argument and what is allowed, and exit with 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bench import CANDIDATES, bench_forward
from .bench_kernels import bench_kernels
from .doctor import doctor
from .errors import RegraftError, closest
from .loading import DTYPES, ArgumentError, has_weights, load_model
from .optimize import optimize
from .report import Report


def parser() -> argparse.ArgumentParser:
    """Every verb and option."""
    top = argparse.ArgumentParser(
        prog="python -m regraft", description="Rewrites a HuggingFace model onto fused kernels."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    for name, what, dry_run in (
        ("optimize", "optimize a model and print the report", False),
        ("report", "the report without weights: optimize --dry-run", True),
    ):
        found = verbs.add_parser(name, help=what)
        _model(found)
        found.add_argument("--dry-run", action="store_true", default=dry_run, help="no weights, on the meta device")
        found.add_argument("--passes", metavar="LIST", help="switch passes: --passes=-rope,+qkv")
        found.add_argument("--verify", default="fast", help="off, fast or full")
        found.add_argument("--strict", action="store_true", help="fail where less is found than the model should have")
        found.add_argument("--json", metavar="FILE", help="write the report as JSON; - is standard output")
        found.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
        found.set_defaults(run=_optimize)

    bench = verbs.add_parser("bench", help="measure").add_subparsers(dest="what", required=True, metavar="WHAT")
    forward = bench.add_parser("forward", help="a model's forward: eager, torch.compile and regraft")
    _model(forward)
    forward.add_argument("--batch", type=_numbers, default=[1], metavar="LIST", help="1,8")
    forward.add_argument("--length", type=_numbers, default=[128], metavar="LIST", help="128,2048")
    forward.add_argument(
        "--candidates", type=_names(CANDIDATES), default=["eager", "compile", "regraft"], metavar="LIST",
        help=f"of {', '.join(CANDIDATES)}",
    )  # fmt: skip
    _rounds(forward)
    forward.set_defaults(run=_forward)

    kernels = bench.add_parser("kernels", help="every kernel of every op against PyTorch")
    kernels.add_argument("ops", nargs="*", metavar="OP", help="all ops where none is named")
    _where(kernels)
    _rounds(kernels)
    kernels.set_defaults(run=_kernels)

    health = verbs.add_parser("doctor", help="versions, device, and a self-test of each kernel")
    _where(health)
    health.set_defaults(run=_doctor)
    return top


def _where(to: argparse.ArgumentParser) -> None:
    to.add_argument("--dtype", type=_one_of(DTYPES), metavar="NAME", help=", ".join(DTYPES))
    to.add_argument("--device", type=_device, default=None, help="cuda where there is one, else cpu")


def _model(to: argparse.ArgumentParser) -> None:
    to.add_argument("model", help="a folder with config.json and weights, or a config.json (random weights)")
    _where(to)
    to.add_argument("--layers", type=_number, metavar="N", help="use only N layers of each stack")


def _rounds(to: argparse.ArgumentParser) -> None:
    to.add_argument("--rounds", type=_number, default=5, metavar="N", help="interleaved rounds, of which the median")
    to.add_argument("--calls", type=_number, default=10, metavar="N", help="calls in each round")
    to.add_argument("--json", metavar="FILE", help="write the results as JSON; - is standard output")


# -- values of arguments -----------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _one_of(known: Any) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            hint = closest(text, list(known))
            raise argparse.ArgumentTypeError(f"{text!r} is not known{hint} Known: {', '.join(known)}")
        return text

    return parse


def _names(known: Any) -> Callable[[str], list[str]]:
    one = _one_of(known)
    return lambda text: [one(part) for part in text.split(",")]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; allowed are cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; allowed are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _device_of(args: argparse.Namespace) -> torch.device:
    if args.device is not None:
        chosen: torch.device = args.device
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)


# -- verbs -------------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace, device: torch.device) -> nn.Module:
    return load_model(args.model, dtype=DTYPES[args.dtype] if args.dtype else None, device=device, layers=args.layers)


def _optimize(args: argparse.Namespace) -> int:
    device = torch.device("meta") if args.dry_run else _device_of(args)
    model = _load(args, device)
    if not args.dry_run and not has_weights(args.model):
        print(f"{args.model}: no weights there, they are random", file=sys.stderr)
    made = optimize(
        model, dry_run=args.dry_run, passes=args.passes, verify=args.verify, strict=args.strict, verbose=False
    )
    report: Report = made if args.dry_run else made.report
    if args.json != "-":
        print(report)
    _write(args.json, report.to_json)
    _write(args.html, report.to_html)
    return 0


def _forward(args: argparse.Namespace) -> int:
    model = _load(args, _device_of(args))
    shapes = [(batch, length) for batch in args.batch for length in args.length]
    say = _say(args)
    bench = bench_forward(model, shapes, args.candidates, rounds=args.rounds, calls=args.calls, say=say)
    _write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    return 1 if any(r.candidate == "regraft" and r.problem for r in bench.results) else 0


def _kernels(args: argparse.Namespace) -> int:
    device = _device_of(args)
    dtype = _dtype_of(args, device)
    bench = bench_kernels(device, dtype, args.ops, rounds=args.rounds, calls=args.calls, say=_say(args))
    _write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    return 1 if any(r.problem.startswith("wrong") for r in bench.results) else 0


def _doctor(args: argparse.Namespace) -> int:
    device = _device_of(args)
    return 0 if doctor(device, _dtype_of(args, device), print) else 1


def _say(args: argparse.Namespace) -> Callable[[str], None]:
    """Where the table goes: standard output, unless the JSON does."""
    stream = sys.stderr if args.json == "-" else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def _write(target: str | None, text: Callable[[], str]) -> None:
    if target == "-":
        print(text())
    elif target is not None:
        try:
            Path(target).write_text(text() + "\n")
        except OSError as error:
            raise ArgumentError(f"cannot write {target!r}: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0, or 1 where something measured was wrong, or 2 for arguments that cannot be used."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (RegraftError, ValueError) as error:
        print(f"regraft {args.verb}: {error}", file=sys.stderr)
        return 2
    return status
