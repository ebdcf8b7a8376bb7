"""The whole pipeline on one screen: what runs, in which order, under which name.

A name is what `optimize(model, passes={"rope": False})` and `REGRAFT_PASSES=-rope` switch.
"""

from __future__ import annotations

from ..compiler.pipeline import Compiled, Pass, Settings, compile_with
from ..compiler.program import Program
from ..compiler.rule import Stage
from . import (
    activation,
    add_norm,
    attention,
    attention_scale,
    cache,
    canonicalize,
    eager_attention,
    encode,
    gate_up,
    glu,
    layer_norm,
    linear,
    linear_act,
    lower,
    masks,
    norm_rope,
    outputs,
    pack,
    patches,
    qkv,
    qkv_rope,
    rms_norm,
    rope,
    softcap,
    softmax,
    tabulate,
)


def _of(stage: Stage, module: object) -> tuple:  # type: ignore[type-arg]
    return tuple(r for r in module.RULES if r.stage is stage)  # type: ignore[attr-defined]


PASSES: tuple[Pass, ...] = (
    Pass("canonicalize", Stage.CANONICALIZE, run=lambda program, _: canonicalize.canonicalize(program), optional=False),
    # canonical ATen -> semantic ops
    Pass("linear", Stage.RAISE, linear.RULES),
    Pass("rms_norm", Stage.RAISE, _of(Stage.RAISE, rms_norm)),
    Pass("layer_norm", Stage.RAISE, _of(Stage.RAISE, layer_norm)),
    Pass("rope", Stage.RAISE, rope.RULES),
    Pass("activation", Stage.RAISE, activation.RULES),
    Pass("glu", Stage.RAISE, glu.RULES),
    Pass("attention", Stage.RAISE, (attention.SDPA(), *eager_attention.RULES, attention.RepeatKV())),
    Pass("softmax", Stage.RAISE, softmax.RULES),  # what is left of them: attention has one inside
    Pass("softcap", Stage.RAISE, softcap.RULES),  # and may have one of these
    Pass("attention_scale", Stage.RAISE, run=attention_scale.attention_scale),
    Pass("masks", Stage.RAISE, run=masks.masks),
    Pass("tidy", Stage.RAISE, run=lambda program, _: canonicalize.canonicalize(program, "tidy"), optional=False),
    # semantic ops -> fused ops; candidates of all of them compete
    Pass("qkv", Stage.FUSE, qkv.RULES),
    Pass("gate_up", Stage.FUSE, gate_up.RULES),
    Pass("linear_act", Stage.FUSE, linear_act.RULES),
    Pass("add_norm", Stage.FUSE, add_norm.RULES),
    Pass("norm_rope", Stage.FUSE, norm_rope.RULES),
    Pass("qkv_rope", Stage.FUSE, qkv_rope.RULES),
    Pass("patches", Stage.FUSE, patches.RULES),
    Pass("written_norm", Stage.FUSE, (*_of(Stage.FUSE, layer_norm), *_of(Stage.FUSE, rms_norm))),
    # weights and kernels
    Pass("pack", Stage.PACK, run=pack.pack, optional=False),
    Pass("outputs", Stage.LOWER, run=outputs.outputs, optional=False),
    Pass("lower", Stage.LOWER, run=lower.lower),
)

PAGED: tuple[Pass, ...] = (
    *(p for p in PASSES if p.name != "masks"),  # what they say is asked once more, for one sequence
    Pass("cache", Stage.CACHE, run=cache.cache, optional=False),
    Pass("tabulate", Stage.CACHE, run=tabulate.tabulate),
)
"""For a graph of flat tokens, whose keys and values lie in pages."""

ENCODED: tuple[Pass, ...] = (
    *(p for p in PAGED if p.stage is not Stage.CACHE),
    Pass("encode", Stage.CACHE, run=encode.encode, optional=False),
)
"""For the keys and values of an encoder's states."""

PASS_NAMES: tuple[str, ...] = tuple(dict.fromkeys(p.name for p in (*PASSES, *PAGED) if p.optional))
"""What a user can switch off."""

FORMS = {"forward": PASSES, "paged": PAGED, "encoded": ENCODED}


def compile_program(program: Program, settings: Settings, *, form: str = "forward") -> Compiled:
    """Run the pipeline on a copy of `program`; CacheError where it cannot have this form."""
    return compile_with(program, FORMS[form], settings)
