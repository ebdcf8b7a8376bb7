"""Arguments that several commands share, and what their values mean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import closest
from .loading import DTYPES, ArgumentError, has_weights, load_model


def where(to: argparse.ArgumentParser) -> None:
    to.add_argument("--dtype", type=one_of(DTYPES), metavar="NAME", help=", ".join(DTYPES))
    to.add_argument("--device", type=parse_device, default=None, help="cuda where there is one, else cpu")


def model(to: argparse.ArgumentParser, *, optional: bool = False) -> None:
    what = "a folder with config.json and weights; or, for random weights, a config.json or a name in benchmarks/"
    to.add_argument("model", help=what, nargs="?" if optional else None)
    where(to)
    to.add_argument("--layers", type=number, metavar="N", help="use only N layers of each stack")


def rounds(to: argparse.ArgumentParser) -> None:
    to.add_argument("--rounds", type=number, default=5, metavar="N", help="interleaved rounds, of which the median")
    to.add_argument("--calls", type=number, default=10, metavar="N", help="calls in each round")
    to.add_argument("--json", metavar="FILE", help="write the results as JSON; - is standard output")


# -- values of arguments -----------------------------------------------------------------------------------------------


def number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def numbers(text: str) -> list[int]:
    return [number(part) for part in text.split(",")]


def one_of(known: Any) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            hint = closest(text, list(known))
            raise argparse.ArgumentTypeError(f"{text!r} is not known{hint} Known: {', '.join(known)}")
        return text

    return parse


def names(known: Any) -> Callable[[str], list[str]]:
    one = one_of(known)
    return lambda text: [one(part) for part in text.split(",")]


def parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; allowed are cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; allowed are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device is not None:
        chosen: torch.device = args.device
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)


def load(args: argparse.Namespace, device: torch.device) -> nn.Module:
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is None and device.type == "cuda" and not has_weights(args.model):
        dtype = torch.bfloat16
    return load_model(args.model, dtype=dtype, device=device, layers=args.layers)


def sayer(args: argparse.Namespace) -> Callable[[str], None]:
    """Where the table goes: standard output, unless the JSON does."""
    stream = sys.stderr if args.json == "-" else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def check_targets(args: argparse.Namespace) -> None:
    """Raises ArgumentError where a file that is written in the end has no place: before the work, not behind it."""
    for name in ("json", "html", "trace"):
        target = getattr(args, name, None)
        if target in (None, "-"):
            continue
        if not Path(target).parent.is_dir():
            raise ArgumentError(f"--{name} {target!r}: there is no folder {str(Path(target).parent)!r}")
        if Path(target).is_dir():
            raise ArgumentError(f"--{name} {target!r}: expected a file, this is a folder")


def write(target: str | None, text: Callable[[], str]) -> None:
    if target == "-":
        print(text())
    elif target is not None:
        try:
            Path(target).write_text(text() + "\n")
        except OSError as error:
            raise ArgumentError(f"cannot write {target!r}: {error.strerror}") from error
