"""Which models are generated from flat tokens, which are not, and why."""

from __future__ import annotations

import pytest
import torch
import zoo
from flat_models import builder_of, flat_of, tiny

from regraft.runtime.build import Unserved
from regraft.runtime.decoding.flat import make

FULL = (-1,)
WINDOWS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((*zoo.DECODERS, "whisper", "bart", "t5"), FULL),
    "mistral": (5,),
    "starcoder2": (5,),
    "cohere2": (5,),
    "gemma3": (5,),
    "gemma2": (5, -1),
    "gpt_oss": (5, -1),
}
"""The window `left` of each group: two layers, of which some kinds alternate."""
LONGEST = {"gpt2": 256, "opt": 128, "gptj": 128, "mpt": 128, "whisper": 64, "bart": 128}
MASKED = {"whisper": False, "bart": True, "t5": True}
"""Decoders beside an encoder, and whether `attention_mask` says which of its states they see."""
REFUSED = {
    "mamba2": "holds more than keys and values",
    "llama4_text": "chunked",
    "phi3_longrope": "how long other sequences are",
    "llama_dynamic": "how long other sequences are",
}


@pytest.mark.parametrize("name", [*MASKED, *(n for n in zoo.DECODERS if n not in REFUSED)])
def test_served(name: str) -> None:
    """Made, compared with lone runs, and with the groups that its config says."""
    model, _ = zoo.build(name)
    builder = builder_of(model)
    flat = make(builder)
    assert not isinstance(flat, Unserved), flat.reason
    assert flat.groups == WINDOWS[name]
    assert len(flat.layers) == 2
    assert flat.max_positions == LONGEST.get(name)
    assert flat.vocab == zoo.VOCAB
    assert (flat.encoder.masked if flat.encoder is not None else None) == MASKED.get(name)
    found = builder.record.generate
    assert found is not None
    assert found["paged"] and found["error"] <= found["bound"]


@pytest.mark.parametrize("name", MASKED)
def test_beside_an_encoder_in_half_precision(name: str) -> None:
    """What `attention_mask` means is seen although logits of random states hardly differ by more than rounding."""
    flat = flat_of(tiny(name, dtype=torch.bfloat16))
    assert flat.encoder is not None
    assert flat.encoder.masked == MASKED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, _ = zoo.build(name)
    builder = builder_of(model)
    found = make(builder)
    assert isinstance(found, Unserved)
    assert REFUSED[name] in found.reason
    assert builder.record.generate == {"paged": False, "reason": found.reason}
    assert not builder.weights.packs
