"""The command line: `python -m regraft VERB ...`. Errors name the argument and what is allowed, and exit with 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import arguments, bench_cli
from .ablate import read_ablation
from .doctor import doctor
from .errors import RegraftError
from .loading import ArgumentError, has_weights
from .optimize import optimize
from .profile import table_of
from .profile_model import profile_model
from .report import Report
from .tune import tune


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
        arguments.model(found)
        found.add_argument("--dry-run", action="store_true", default=dry_run, help="no weights, on the meta device")
        found.add_argument("--passes", metavar="LIST", help="switch passes: --passes=-rope,+qkv")
        found.add_argument("--verify", default="fast", help="off, fast or full")
        found.add_argument("--strict", action="store_true", help="fail where less is found than the model should have")
        found.add_argument("--json", metavar="FILE", help="write the report as JSON; - is standard output")
        found.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
        found.add_argument("--ablation", metavar="FILE", help="show this JSON of `bench ablate` in the report")
        found.set_defaults(run=_optimize)

    bench_cli.add(verbs)

    tune = verbs.add_parser("tune", help="measure which kernels and configurations suit a model best, and keep them")
    arguments.model(tune)
    tune.add_argument("--batch", type=arguments.numbers, default=[1], metavar="LIST", help="1,8")
    tune.add_argument("--length", type=arguments.numbers, default=[512], metavar="LIST", help="128,2048")
    tune.add_argument("--limit", type=arguments.number, default=60, metavar="S", help="seconds for a kernel and size")
    tune.set_defaults(run=_tune)

    timed = verbs.add_parser("profile", help="what bounds a model's forward, kernel by kernel")
    arguments.model(timed)
    timed.add_argument("--batch", type=arguments.number, default=1, metavar="N")
    timed.add_argument("--length", type=arguments.number, default=512, metavar="N")
    timed.add_argument("--trace", metavar="FILE", help="write the trace, for ui.perfetto.dev")
    timed.add_argument("--json", metavar="FILE", help="write the table as JSON; - is standard output")
    timed.set_defaults(run=_profile)

    health = verbs.add_parser("doctor", help="versions, device, and a self-test of each kernel")
    arguments.where(health)
    health.set_defaults(run=_doctor)
    return top


# -- verbs -------------------------------------------------------------------------------------------------------------


def _optimize(args: argparse.Namespace) -> int:
    device = torch.device("meta") if args.dry_run else arguments.device_of(args)
    model = arguments.load(args, device)
    if not args.dry_run and not has_weights(args.model):
        print(f"{args.model}: no weights there, they are random", file=sys.stderr)
    made = optimize(
        model, dry_run=args.dry_run, passes=args.passes, verify=args.verify, strict=args.strict, verbose=False
    )
    report: Report = made if args.dry_run else made.report
    if args.ablation:
        report.record.ablation = read_ablation(args.ablation, bench_cli.name_of(args.model))
    if args.json != "-":
        print(report)
    arguments.write(args.json, report.to_json)
    arguments.write(args.html, report.to_html)
    return 0


def _tune(args: argparse.Namespace) -> int:
    device = arguments.device_of(args)
    if device.type != "cuda":
        raise ArgumentError(f"tune: --device {device}: configurations are measured on a CUDA device")
    shapes = [(batch, length) for batch in args.batch for length in args.length]
    tune(arguments.load(args, device), shapes, limit_s=args.limit, say=lambda line: print(line, flush=True))
    return 0


def _profile(args: argparse.Namespace) -> int:
    device = arguments.device_of(args)
    trace = Path(args.trace) if args.trace else None
    phases = profile_model(arguments.load(args, device), args.batch, args.length, trace=trace)
    say = arguments.sayer(args)
    for phase in phases:
        for line in table_of(phase):
            say(line)
    arguments.write(args.json, lambda: json.dumps([p.to_dict() for p in phases], indent=2))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    device = arguments.device_of(args)
    return 0 if doctor(device, arguments.dtype_of(args, device), print) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0, or 1 where something measured was wrong, or 2 for arguments that cannot be used."""
    args = parser().parse_args(argv)
    try:
        arguments.check_targets(args)
        status: int = args.run(args)
    except (RegraftError, ValueError) as error:
        print(f"regraft {args.verb}: {error}", file=sys.stderr)
        return 2
    return status
