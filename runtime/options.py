"""The options of `optimize`, validated once; an unknown name is an error that names the closest known one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from .decoding.memory import Limits
from .errors import InputError, OptionError, closest

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""The names of `torch.compile`."""
VERIFY = ("off", "fast", "full")
ON_ERROR = ("fallback", "raise")

PassChoice = Mapping[str, bool] | Iterable[str] | None


@dataclass(frozen=True)
class Options:
    """What `optimize` was asked for.

    `passes` holds only the passes that were named, with whether they run; the others run.
    """

    mode: str = "default"
    rules: tuple[Any, ...] = ()
    passes: Mapping[str, bool] = field(default_factory=dict)
    verify: str = "fast"
    strict: bool = False
    on_error: str = "fallback"
    dry_run: bool = False
    cache_dir: Path | None = None
    example_inputs: Mapping[str, Any] | None = None
    verbose: bool | None = None
    decoding: Limits | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("verify", self.verify, VERIFY)
        _one_of("on_error", self.on_error, ON_ERROR)
        for name in ("strict", "dry_run"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.verbose not in (None, True, False):
            raise OptionError(f"verbose={self.verbose!r}: expected None, True or False")

    def chosen(self) -> dict[str, Any]:
        """What is not at its default, as plain data for a report."""
        plain: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "rules" and value:
                plain["rules"] = [type(r).__name__ for r in value]
            elif f.name == "example_inputs" and value is not None:
                plain["example_inputs"] = sorted(value)
            elif f.name == "decoding" and value is not None:
                plain["decoding"] = asdict(value)
            elif f.name == "cache_dir" and value is not None:
                plain["cache_dir"] = str(value)
            elif f.name == "passes" and value:
                plain["passes"] = dict(value)
            elif value not in (f.default, (), {}):
                plain[f.name] = value
        return plain

    @property
    def raises(self) -> bool:
        """Whether what cannot be served by a graph is an error rather than the original's work."""
        return self.strict or self.on_error == "raise"


def make_options(
    known_passes: Sequence[str],
    *,
    rules: Iterable[Any] | None = None,
    passes: PassChoice = None,
    cache_dir: str | os.PathLike[str] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    decoding: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    is_rule: Callable[[object], bool] | None = None,
    **others: Any,
) -> Options:
    """Options from the keywords of `optimize` and the environment.

    `REGRAFT_PASSES` (`-rope,+qkv`) is applied after `passes`, `REGRAFT_CACHE_DIR` where no `cache_dir` is given.

    Raises:
        OptionError: an unknown keyword, pass, or value.
        InputError: `example_inputs` is not a mapping from names to values, or holds no tensor.
    """
    environ = os.environ if environ is None else environ
    known = [f.name for f in fields(Options)]
    for name in others:
        if name not in known:
            raise OptionError(f"optimize() has no option {name!r}{closest(name, known)} Known: {', '.join(known)}")
    chosen = dict(parse_passes(passes, known_passes, "passes"))
    if environ.get("REGRAFT_PASSES"):
        words = environ["REGRAFT_PASSES"].replace(",", " ").split()
        chosen |= parse_passes(words, known_passes, "REGRAFT_PASSES")
    if not isinstance(cache_dir, (str, os.PathLike, NoneType)):
        raise OptionError(f"cache_dir={cache_dir!r}: expected the path of a folder")
    directory = cache_dir if cache_dir is not None else environ.get("REGRAFT_CACHE_DIR") or None
    return Options(
        rules=_rules(rules, is_rule),
        passes=chosen,
        cache_dir=None if directory is None else Path(directory).expanduser(),
        example_inputs=_examples(example_inputs),
        decoding=_limits(decoding),
        **others,
    )


def parse_passes(passes: PassChoice, known: Sequence[str], where: str) -> dict[str, bool]:
    """`{"rope": False}` or `["-rope", "+qkv"]` as a mapping; a bare name means `+`.

    Raises:
        OptionError: a pass that does not exist, or a value that is not a bool.
    """
    if passes is None:
        return {}
    if isinstance(passes, str):
        passes = passes.replace(",", " ").split()
    if isinstance(passes, Mapping):
        chosen = dict(passes)
    elif not isinstance(passes, Iterable):
        raise OptionError(
            f"{where}={passes!r}: expected a mapping such as {{'rope': False}} or a list such as ['-rope']"
        )
    else:
        chosen = {}
        for word in passes:
            if not isinstance(word, str):
                raise OptionError(f"{where}: {word!r} is not a pass name; write '-rope' or '+qkv'")
            chosen[word.lstrip("+-")] = not word.startswith("-")
    for name, enabled in chosen.items():
        if name not in known:
            hint = closest(str(name), known)
            raise OptionError(f"{where}: unknown pass {name!r}{hint} Known passes: {', '.join(known)}")
        if not isinstance(enabled, bool):
            raise OptionError(f"{where}: {name!r} is {enabled!r}; expected True or False")
    return chosen


def _one_of(option: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        hint = closest(str(value), known)
        raise OptionError(f"{option}={value!r} is not known{hint} Known: {', '.join(known)}")


def _rules(rules: Iterable[Any] | None, is_rule: Callable[[object], bool] | None) -> tuple[Any, ...]:
    if rules is None:
        return ()
    if isinstance(rules, (str, type)) or not isinstance(rules, Iterable):
        raise OptionError(f"rules={rules!r}: expected a list of rule instances, such as [MyRule()]")
    given = tuple(rules)
    for rule in given:
        if isinstance(rule, type):
            raise OptionError(f"rules: {rule.__name__} is a class; give an instance, {rule.__name__}()")
        if is_rule is not None and not is_rule(rule):
            raise OptionError(f"rules: {rule!r} is neither a regraft.Rule nor a regraft.GroupRule")
    return given


def _examples(example_inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if example_inputs is None:
        return None
    if not isinstance(example_inputs, Mapping) or not all(isinstance(k, str) for k in example_inputs):
        kind = type(example_inputs).__name__
        raise InputError(
            f"example_inputs is a {kind}; expected a mapping from argument names to values, such as "
            "{'input_ids': ids, 'attention_mask': mask}"
        )
    if not any(isinstance(v, torch.Tensor) for v in example_inputs.values()):
        raise InputError("example_inputs holds no tensor; give the arguments of one typical call")
    return dict(example_inputs)


def _limits(decoding: Mapping[str, Any] | None) -> Limits | None:
    if decoding is None:
        return None
    if not isinstance(decoding, Mapping):
        raise OptionError(f"decoding={decoding!r}: expected a mapping such as {{'max_batch_size': 32}}")
    known = [f.name for f in fields(Limits)]
    for name in decoding:
        if name not in known:
            raise OptionError(
                f"decoding: unknown setting {name!r}{closest(str(name), known)} Known: {', '.join(known)}"
            )
    return Limits(**decoding)
