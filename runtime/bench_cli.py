"""`python -m regraft bench ...`: what can be measured, and with which arguments."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .ablate import ablate
from .arguments import device_of, dtype_of, load, model, names, number, numbers, rounds, sayer, where, write
from .bench import REGRAFT, Bench, summary_table
from .bench_forward import CANDIDATES, bench_forward
from .bench_generate import GenerateRow, bench_generate, slower
from .bench_kernels import bench_kernels, regressions
from .generators import EAGER, GENERATORS
from .loading import DTYPES, ArgumentError
from .reuse import Earlier
from .stages import PASS_NAMES
from .suite import Settings, read_suite, run_suite


def add(verbs: Any) -> None:
    """`bench` with its kinds, to the parser's verbs."""
    bench = verbs.add_parser("bench", help="measure").add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_forward(bench)
    _add_kernels(bench)
    _add_ablate(bench)
    _add_generate(bench)


def _add_forward(bench: Any) -> None:
    forward = bench.add_parser("forward", help="a model's forward: eager, torch.compile and regraft")
    model(forward, optional=True)
    forward.add_argument("--suite", metavar="FILE", help="rows of models, batch sizes, lengths and peers, as JSON")
    forward.add_argument("--only", metavar="TEXT", help="of a suite, rows whose label contains this: llama_8b 1x512")
    forward.add_argument("--batch", type=numbers, default=[1], metavar="LIST", help="1,8")
    forward.add_argument("--length", type=numbers, default=[128], metavar="LIST", help="128,2048")
    forward.add_argument(
        "--candidates", type=names(CANDIDATES), metavar="LIST", help=f"of {', '.join(CANDIDATES)}; eager always"
    )
    forward.add_argument("--no-mask", action="store_true", help="no attention mask (rows of a suite say themselves)")
    forward.add_argument("--limit", type=number, default=300, metavar="S", help="seconds a candidate may take")
    forward.add_argument("--reuse", metavar="FILE", help="peers from this JSON where eager or the device's rates agree")
    rounds(forward)
    forward.set_defaults(run=_forward)


def _add_kernels(bench: Any) -> None:
    kernels = bench.add_parser("kernels", help="every kernel of every op against PyTorch")
    kernels.add_argument("ops", nargs="*", metavar="OP", help="all ops where none is named")
    kernels.add_argument("--op", metavar="LIST", help="the same as a list: rms_norm,attention")
    kernels.add_argument("--shape", default="", metavar="TEXT", help="cases whose name contains this; * is any text")
    kernels.add_argument("--baseline", metavar="FILE", help="JSON of an earlier run: fail where a kernel got slower")
    kernels.add_argument("--threshold", type=float, default=0.08, metavar="SHARE", help="by how much, 0.08 by default")
    where(kernels)
    rounds(kernels)
    kernels.set_defaults(run=_kernels)


def _add_ablate(bench: Any) -> None:
    taken = bench.add_parser("ablate", help="what each fusion contributes: the forward without it")
    model(taken)
    taken.add_argument("--batch", type=number, default=1, metavar="N")
    taken.add_argument("--length", type=number, default=512, metavar="N")
    taken.add_argument("--passes", type=names(PASS_NAMES), default=[], metavar="LIST", help="only without these")
    taken.add_argument("--no-mask", action="store_true", help="no attention mask")
    taken.add_argument("--limit", type=number, default=300, metavar="S", help="seconds a variant may take")
    rounds(taken)
    taken.set_defaults(run=_ablate)


def _add_generate(bench: Any) -> None:
    made = bench.add_parser("generate", help="a model's generate: HuggingFace's, vLLM's and regraft's")
    model(made, optional=True)
    made.add_argument("--model", dest="named", metavar="MODEL", help="the same as the positional argument")
    made.add_argument("--batch", type=numbers, default=[1], metavar="LIST", help="1,8")
    made.add_argument("--prompt", type=numbers, default=[128], metavar="LIST", help="tokens of each prompt: 128,2048")
    made.add_argument("--new", type=number, default=128, metavar="N", help="tokens to generate")
    made.add_argument(
        "--candidates",
        type=names(GENERATORS),
        default=[EAGER, REGRAFT],
        metavar="LIST",
        help=f"of {', '.join(GENERATORS)}; eager and regraft by default",
    )
    made.add_argument("--limit", type=number, default=300, metavar="S", help="seconds a candidate may take")
    made.add_argument("--baseline", metavar="FILE", help="JSON of an earlier run: fail where regraft got slower")
    made.add_argument("--threshold", type=float, default=0.05, metavar="SHARE", help="by how much, 0.05 by default")
    made.add_argument("--rounds", type=number, default=3, metavar="N", help="of which the median")
    made.add_argument("--json", metavar="FILE", help="write the results as JSON; - is standard output")
    made.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.named is None):
        raise ArgumentError("bench generate needs a model, as `bench generate MODEL` or `--model MODEL`")
    args.model = args.model or args.named
    baseline = _baseline(args.baseline, "generate", ("row", "candidate", "step_ms")) if args.baseline else None
    say = sayer(args)
    model = load(args, device_of(args))
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise ArgumentError(f"model {args.model!r}: expected one that generates text, {type(model).__name__} does not")
    bench = bench_generate(
        model,
        [GenerateRow(batch, prompt, args.new) for batch in args.batch for prompt in args.prompt],
        args.candidates,
        name=name_of(args.model),
        rounds=args.rounds,
        limit_s=args.limit,
        say=say,
    )
    write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    late = slower(bench.results, baseline, args.threshold) if baseline is not None else []
    for line in late:
        say(f"slower than {args.baseline}: {line}")
    return 1 if late or any(r.candidate == REGRAFT and r.problem for r in bench.results) else 0


def _ablate(args: argparse.Namespace) -> int:
    say = sayer(args)
    bench = ablate(
        load(args, device_of(args)),
        (args.batch, args.length),
        name=name_of(args.model) + (f" ({args.layers} layers)" if args.layers is not None else ""),
        passes=args.passes,
        rounds=args.rounds,
        calls=args.calls,
        limit_s=args.limit,
        mask=not args.no_mask,
        say=say,
    )
    (result,) = bench.results
    for line in result.lines():
        say(line)
    write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    return 1 if any(p.problem for p in result.passes) else 0


def name_of(model: str) -> str:
    """How results call a model: the file without its ending, or the folder."""
    return Path(model).stem if model.endswith(".json") else Path(model).name


def _forward(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.suite is None):
        raise ArgumentError("bench forward needs a model or --suite FILE, and not both")
    bench = _suite(args) if args.suite else _one_model(args)
    write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    return 1 if any(r.candidate == REGRAFT and r.problem for r in bench.results) else 0


def _one_model(args: argparse.Namespace) -> Bench:
    say = sayer(args)
    bench = bench_forward(
        load(args, device_of(args)),
        [(batch, length) for batch in args.batch for length in args.length],
        args.candidates or ("eager", "compile-graphs", REGRAFT),
        name=name_of(args.model),
        rounds=args.rounds,
        calls=args.calls,
        limit_s=args.limit,
        mask=not args.no_mask,
        earlier=Earlier(args.reuse) if args.reuse else None,
        say=say,
    )
    for line in summary_table(bench.results):
        say(line)
    return bench


def _suite(args: argparse.Namespace) -> Bench:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for devices without starting CUDA: rows are forked
    device = device_of(args)
    candidates = tuple(args.candidates) if args.candidates else None
    settings = Settings(
        device,
        dtype_of(args, device) if args.dtype is None else DTYPES[args.dtype],
        args.rounds,
        args.calls,
        args.limit,
        args.reuse,
        candidates,
    )
    rows = [r if args.layers is None else replace(r, layers=args.layers) for r in read_suite(args.suite)]
    rows = [r for r in rows if args.only is None or args.only in r.label]
    if not rows:
        raise ArgumentError(f"--only {args.only!r}: no row of {args.suite} has that in its label")
    if args.reuse:
        Earlier(args.reuse)  # an unreadable file is an error now, not in each row

    def keep(bench: Bench) -> None:
        if args.json != "-":
            write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))

    return run_suite(rows, settings, say=sayer(args), done=keep)


def _kernels(args: argparse.Namespace) -> int:
    device = device_of(args)
    baseline = _baseline(args.baseline, "kernels", ("op", "case", "provider")) if args.baseline else None
    ops = [*args.ops, *(args.op.split(",") if args.op else [])]
    say = sayer(args)

    def keep(bench: Bench) -> None:
        if args.json != "-":
            write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))

    bench = bench_kernels(
        device,
        dtype_of(args, device),
        ops,
        shape=args.shape,
        rounds=args.rounds,
        calls=args.calls,
        say=say,
        done=keep,
    )
    write(args.json, lambda: json.dumps(bench.to_dict(), indent=2))
    slower = regressions(bench.results, baseline, args.threshold) if baseline is not None else []
    for line in slower:
        say(f"slower than {args.baseline}: {line}")
    return 1 if slower or any(r.problem.startswith("wrong") and not r.peer for r in bench.results) else 0


def _baseline(file: str, kind: str, keys: tuple[str, ...]) -> Any:
    """The results in an earlier run's JSON, each of which must have these keys."""
    try:
        plain = json.loads(Path(file).read_text())
        return {"results": [r for r in plain["results"] if all(r[k] is not None for k in keys)]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"--baseline {file!r}: not the JSON of `bench {kind}` ({type(error).__name__})") from error
