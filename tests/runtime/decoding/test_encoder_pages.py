"""What is kept of encoders' states: shared where they are equal, given back, refused where there is no room."""

from __future__ import annotations

import pytest
import torch
from flat_models import flat_of, tiny

from regraft.runtime.decoding.encoder_pages import EncoderPages
from regraft.runtime.decoding.engine import Engine
from regraft.runtime.decoding.flat import FlatProgram
from regraft.runtime.decoding.memory import Limits
from regraft.runtime.errors import InputError

CPU = torch.device("cpu")
WIDTH = 64


@pytest.fixture(scope="module")
def flat() -> FlatProgram:
    return flat_of(tiny("bart"))


def states(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, WIDTH) for n in lengths]


def test_written_where_the_blocks_say(flat: FlatProgram) -> None:
    assert flat.encoder is not None
    pages = EncoderPages(flat.encoder, Limits(max_batch_size=4), CPU)
    first, second = states(17, 5)
    kept = pages.keep([first, first.clone(), second])
    assert kept[0] is kept[1] and kept[2] is not kept[0]
    assert [len(e.blocks) for e in kept] == [2, 2, 1]
    assert pages.used == 3
    for one, given in ((kept[0], first), (kept[2], second)):
        wanted = flat.encoder(given[None])
        for layer, sides in zip(pages.pages.layers, wanted, strict=True):
            for stored, side in zip(layer, sides, strict=True):
                assert torch.allclose(stored[one.blocks].flatten(0, 1)[: one.length], side, atol=1e-6)
    pages.give_back(kept)
    assert pages.used == 0
    assert pages.keep([first])[0].number > kept[2].number


def test_refusals(flat: FlatProgram) -> None:
    assert flat.encoder is not None
    pages = EncoderPages(flat.encoder, Limits(max_batch_size=1), CPU)
    assert pages.refusal([2048]) is None
    assert "2049 states" in str(pages.refusal([2049]))
    assert "none of" in str(pages.refusal([0, 3]))
    with pytest.raises(InputError, match="need 129 pages of 16, 128 are free"):
        pages.keep(states(2048, 1))
    assert pages.used == 0


def test_given_back_whatever_happens(flat: FlatProgram) -> None:
    """By sessions that are closed, forgotten, or cut off by an error."""
    engine = Engine(flat, CPU, Limits(max_batch_size=4, max_seq_len=40))
    pages = engine.executor.encoder
    assert pages is not None
    kept = engine.session([[2, 3]], 4, states(20))
    closed = engine.session([[2], [2]], 4, states(7, 40))
    closed.prefill()
    assert pages.used == 2 + 1 + 3
    closed.close()
    assert pages.used == 2
    forgotten = engine.session([[2]], 4, states(7))
    del forgotten
    with engine.turn():
        assert pages.used == 2
    with pytest.raises(KeyboardInterrupt), engine.turn():
        pages.keep(states(30))
        raise KeyboardInterrupt
    assert pages.used == 2
    with pytest.raises(ValueError, match="states of an encoder"):
        engine.session([[2]], 4)
    kept.close()
    assert pages.used == 0


def test_equal_prompts_beside_other_states_share_nothing(flat: FlatProgram) -> None:
    engine = Engine(flat, CPU, Limits(max_batch_size=4, max_seq_len=60))
    prompt = list(range(3, 40))
    first, second = states(20, 30)
    logits = []
    for given in ([first, second], [second, first]):
        session = engine.session([prompt, prompt], 4, given)
        logits.append(session.prefill())
        session.close()
    assert torch.allclose(logits[0], logits[1].flip(0), atol=1e-5)
    assert not torch.allclose(logits[0][0], logits[0][1], atol=1e-3)
