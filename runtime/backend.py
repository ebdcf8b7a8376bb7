"""`torch.compile(model, backend="regraft")`: the same passes behind Dynamo's capture.

    compiled = torch.compile(model, backend="regraft", options={"passes": {"rope": False}, "report": print})

`options` takes `passes`, `rules`, `verify`, `strict`, `on_error` as `regraft.optimize` does, and `report`: a callable
that gets the `Report` of each graph. Dynamo hands over weights as arguments of every call, and reuses one compiled
graph for a second instance of the class and after `load_state_dict`: what is packed from weights is therefore looked
up by the tensors of the call, and made again when they changed. Outputs carry no autograd.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..compiler.dynamo import DynamoProgram, from_dynamo
from ..compiler.errors import CaptureError
from ..compiler.program import Input, InputKind, Recipe
from ..compiler.verify import Upcast, bound_for, distance, higher
from ..passes.pipeline import PASS_NAMES, Compiled, Settings, compile_program
from .errors import OptionError, ParityError, RegraftWarning, closest
from .options import Options, make_options
from .record import Record, SignatureRecord
from .report import Report
from .stages import is_rule
from .weights import compute, lay, plainly

log = logging.getLogger("regraft")

_OPTIONS = ("passes", "rules", "verify", "strict", "on_error", "report")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Dynamo's backend contract: a callable that computes what `gm` computes.

    Returns `gm.forward` with a warning where the graph cannot be compiled, unless `strict` or `on_error="raise"`.

    Raises:
        OptionError: an unknown option or value.
    """
    chosen, tell = _options(options, mode)
    record = Record(_owner(gm))
    entry = SignatureRecord(_described(gm), served=False)
    record.signatures.append(entry)
    try:
        if any(_is_active_dropout(n) for n in gm.graph.nodes):
            raise CaptureError("", "the graph was traced in training mode", hint="call model.eval() first")
        dynamo = from_dynamo(gm, example_inputs)
        compiled = _compile(dynamo, example_inputs, chosen)
    except Exception as error:
        if chosen.raises:
            raise
        entry.reason = str(error)
        if not isinstance(error, (CaptureError, ParityError)):
            log.debug("compiling a graph of %s failed", record.model, exc_info=True)
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry.reason = f"the compiler failed ({cause}); to see where: options={{'on_error': 'raise'}}"
        warnings.warn(f"regraft leaves this graph as it is: {entry.reason}", RegraftWarning, stacklevel=2)
        return gm.forward
    entry.served, entry.passes, entry.program = True, compiled.passes, compiled.program
    report = Report(record)
    log.info("%s", report)
    if tell is not None:
        tell(report)
    return _Compiled(gm, dynamo, compiled, record)


def _options(options: Mapping[str, Any] | None, mode: str | None) -> tuple[Options, Callable[[Report], Any] | None]:
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            hint = closest(name, _OPTIONS)
            raise OptionError(f"options: the backend has no option {name!r}{hint} Known: {', '.join(_OPTIONS)}")
    tell = given.pop("report", None)
    if tell is not None and not callable(tell):
        raise OptionError(f"options: report={tell!r}: expected a callable that takes the Report")
    return make_options(PASS_NAMES, is_rule=is_rule, mode=mode or "default", **given), tell


def _compile(dynamo: DynamoProgram, example_inputs: Sequence[Any], options: Options) -> Compiled:
    values = {a.target: example_inputs[a.position] for a in dynamo.arguments}
    program = dynamo.program

    def weight(meaning: Input) -> torch.Tensor:
        if meaning.value is not None:
            return meaning.value
        if meaning.recipe is not None:
            return compute(meaning.recipe, [values[s] for s in meaning.recipe.sources])
        return values[meaning.target].detach()  # type: ignore[no-any-return]

    device = next((v.device for v in values.values()), torch.device("cpu"))
    real = all(type(v) is not torch._subclasses.FakeTensor and not v.is_meta for v in values.values())
    verify = options.verify if real else "off"
    settings = Settings(
        device=device,
        verify=verify,
        enabled=options.passes,
        rules=options.rules,
        weights=weight if real else None,
        inputs=program.example,
    )
    compiled = compile_program(program, settings)
    if verify != "off":
        _check_whole(dynamo, compiled, weight)
    return compiled


@torch.no_grad()
def _check_whole(dynamo: DynamoProgram, compiled: Compiled, weight: Callable[[Input], torch.Tensor]) -> None:
    """The rewritten graph against Dynamo's, both against an oracle one precision up; raises ParityError."""

    def feed(inputs: Sequence[Input]) -> list[torch.Tensor]:
        example = dynamo.program.example
        return [example[i.target] if i.kind is InputKind.USER else weight(i) for i in inputs]

    given = feed(dynamo.program.inputs)
    before = dynamo.program.gm(*given)
    after = compiled.program.gm(*feed(compiled.program.inputs))
    floating = [t for t in before if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not floating:
        return
    lowest = max((t.dtype for t in floating), key=lambda d: torch.finfo(d).eps)
    oracle = Upcast(dynamo.program.gm, higher(lowest)).run(*given)
    error, bound = distance(after, oracle), bound_for(distance(before, oracle), oracle, lowest)
    if not error.within(bound, sum(t.numel() for t in floating)):
        raise ParityError(
            f"the rewritten graph has error {error.largest:.3g} and on average {error.rms:.3g}, "
            f"{bound.largest:.3g} and {bound.rms:.3g} are allowed"
        )


@dataclass
class _Packed:
    """What is packed from the weights of one model: buffers, and the addresses and versions they were made from."""

    values: list[torch.Tensor]
    marks: list[tuple[tuple[int, int], ...] | None]


class _Compiled:
    """The compiled graph. Packed weights belong to the tensors they come from, and go when those do."""

    def __init__(self, gm: fx.GraphModule, dynamo: DynamoProgram, compiled: Compiled, record: Record) -> None:
        self._original = gm.forward
        self._run: Callable[..., Any] = compiled.program.gm.forward
        self._record = record
        place = {a.target: a.position for a in dynamo.arguments}
        self._numbers = dynamo.numbers
        self._users = [a.position for a in dynamo.arguments if a.kind is InputKind.USER]
        self._recipes: list[Recipe] = []
        self._slots: list[tuple[str, Any]] = []
        for meaning in compiled.program.inputs:
            if meaning.kind is InputKind.PACKED:
                assert meaning.recipe is not None
                self._slots.append(("packed", len(self._recipes)))
                self._recipes.append(meaning.recipe)
            elif meaning.kind is InputKind.CONSTANT:
                self._slots.append(("constant", meaning.value))
            else:
                self._slots.append(("argument", place[meaning.target]))
        self._sources = [[place[s] for s in r.sources] for r in self._recipes]
        self._packs: dict[tuple[int, ...], _Packed] = {}
        self._said: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        reason = self._unserved(args)
        if reason is not None:
            if reason not in self._said:
                self._said.add(reason)
                warnings.warn(f"regraft: {reason}; the original graph runs", RegraftWarning, stacklevel=2)
            self._record.calls["original"] += 1
            return self._original(*args)
        with torch.no_grad():
            packed = self._packed(args)
            values = [
                args[which] if kind == "argument" else packed[which] if kind == "packed" else which
                for kind, which in self._slots
            ]
            self._record.calls["graph"] += 1
            return self._run(*values)

    def _unserved(self, args: Sequence[Any]) -> str | None:
        """Why the graph does not compute what this call asks for, or `None`."""
        if torch.is_grad_enabled() and any(args[i].requires_grad for i in self._users):
            return "an input asks for gradients"
        if any(args[i].item() != number for i, number in self._numbers):
            return "a float that the graph was compiled for has changed"
        return None

    def _packed(self, args: Sequence[Any]) -> list[torch.Tensor]:
        if not self._recipes:
            return []
        sources = [[args[i] for i in positions] for positions in self._sources]
        key = tuple(id(s) for group in sources for s in group)
        known = self._packs.get(key)
        if known is None:
            known = _Packed([torch.empty(0)] * len(sources), [None] * len(sources))
            self._packs[key] = known
            for tensor in {id(s): s for group in sources for s in group}.values():
                weakref.finalize(tensor, self._packs.pop, key, None)
        for i, (recipe, group) in enumerate(zip(self._recipes, sources)):
            if known.marks[i] != _marks(recipe, group):
                known.values[i] = _pack(recipe, group, known.values[i])
                known.marks[i] = _marks(recipe, group)
        return known.values


def _marks(recipe: Recipe, sources: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Where the sources lie and, unless they are views of the packed weight, which version of them it was made from."""
    return tuple((s.data_ptr(), 0 if recipe.concatenation or s.is_inference() else s._version) for s in sources)


@plainly()
def _pack(recipe: Recipe, sources: Sequence[torch.Tensor], old: torch.Tensor) -> torch.Tensor:
    alike = len({(s.dtype, s.device, s.shape[1:]) for s in sources}) == 1
    if not recipe.concatenation or not alike or any(s.is_inference() for s in sources):
        return compute(recipe, sources)
    first = sources[0]
    shape = (sum(s.shape[0] for s in sources), *first.shape[1:])
    fits = old.shape == shape and old.dtype == first.dtype and old.device == first.device
    value = old if fits else torch.empty(shape, dtype=first.dtype, device=first.device)
    lay(value, sources)
    return value


def _is_active_dropout(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if "dropout" not in name or not node.op.startswith("call_"):  # a placeholder may be a module's rate
        return False
    rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return bool(training) and bool(rate != 0)


def _owner(gm: fx.GraphModule) -> str:
    """The class of the outermost module in the graph's stacks."""
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            kind = next(iter(stack.values()))[1]
            return getattr(kind, "__name__", str(kind))
    return "graph"


def _described(gm: fx.GraphModule) -> str:
    values = [(n.name, n.meta.get("example_value")) for n in gm.graph.nodes if n.op == "placeholder"]
    tensors = [(n, v) for n, v in values if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
    return ", ".join(f"{n} {str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for n, v in tensors[:6])
