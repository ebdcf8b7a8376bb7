"""Beside an encoder: tokens in float32 on the CPU are those of HuggingFace eager, with encoder inputs of ragged length,
by the fast loop, by beams over pages, and through Whisper's own `generate`, which calls it several times."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
import zoo
from flat_models import tiny

import regraft
from regraft.runtime import dispatch
from regraft.runtime.errors import RegraftWarning

PAGES, FAST, HUGGINGFACE = "HuggingFace's loop over pages", "the fast loop", "HuggingFace's loop"
DECODING = {"max_seq_len": 64, "max_batch_size": 9}


@pytest.fixture(scope="module", autouse=True)
def no_graphs() -> Iterator[None]:
    """Only the flat programs are compiled: graphs of forwards take their time, and have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_SIGNATURES", 0)
        yield


def text(length: int, holes: bool = False) -> dict[str, Any]:
    """Three texts of different lengths; `holes` are anywhere."""
    ids = torch.randint(3, zoo.VOCAB, (3, length))
    mask = torch.ones_like(ids)
    mask[0, -4:], mask[2, -1:] = 0, 0
    if holes:
        mask[1, 2:5] = 0
    return {"input_ids": torch.where(mask == 1, ids, zoo.PAD), "attention_mask": mask}


def compare(
    model: Any, inputs: list[dict[str, Any]], calls: list[dict[str, Any]], reason: str | None = None
) -> dict[str, int]:
    """Run all calls before and after `optimize`; returns how often each way served."""

    def run() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for given in inputs:
            for call in calls:
                torch.manual_seed(5)
                output = model.generate(**given, **call)
                found.append(output if isinstance(output, torch.Tensor) else output["sequences"])
                if not isinstance(output, torch.Tensor):
                    found += output["scores"]
        return found

    expected = run()
    model = regraft.optimize(model, verbose=False, decoding=DECODING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegraftWarning)
        actual = run()
    said = [str(w.message) for w in caught if issubclass(w.category, RegraftWarning)]
    assert any(reason in text for text in said) if reason is not None else not said, said
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, atol=1e-5) if a.is_floating_point() else torch.equal(a, e)
    if reason is None:
        gc.collect()
        engine = model.generate.decoding.engine().engine
        with engine.turn():
            assert engine.executor.encoder.used == 0
            assert all(pool.used == 0 for pool in engine.executor.tables.pools)
    served = dict(model.forward.record.generated)
    regraft.restore(model)
    assert "generate" not in model.__dict__
    return served


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_text(name: str) -> None:
    """T5's bias by distance is the same for all that is farther than its last bucket, which 24 tokens pass."""
    model, _ = zoo.build(name)
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 24, "min_new_tokens": 24},
        {"max_new_tokens": 6, "repetition_penalty": 1.3, "decoder_input_ids": torch.tensor([[2, 5, 6]] * 3)},
        {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True},
    ]
    served = compare(model, [text(9), text(40, holes=True)], calls)
    assert served == {FAST: 4, PAGES: 4}


def test_speech() -> None:
    """Short and long audio, with and without timestamps; fallbacks over temperatures stop at the first here."""
    model, _ = zoo.build("whisper")
    transformers.logging.set_verbosity_error()
    config = model.generation_config
    config.no_timestamps_token_id, config.max_initial_timestamp_index, config.is_multilingual = 60, 10, False
    torch.manual_seed(0)
    short = {"input_features": torch.randn(3, 16, 100)}
    long = {"input_features": torch.randn(3, 16, 250), "attention_mask": torch.ones(3, 250, dtype=torch.long)}
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 8, "return_timestamps": True},
        {"max_new_tokens": 8, "return_timestamps": True, "num_beams": 2},
    ]
    once = [{"max_new_tokens": 8}, {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}]
    assert compare(model, [short], calls + once) == {PAGES: 4}
    assert compare(model, [long], calls) == {PAGES: 2}


def test_what_is_not_served() -> None:
    """A decoder with a bias whose buckets have no end goes on through HuggingFace's loop, and says so."""
    model = tiny("t5", relative_attention_max_distance=1 << 20)
    served = compare(model, [text(9)], [{"max_new_tokens": 4}], reason="bias of decoder.block.0")
    assert served == {HUGGINGFACE: 1}


def test_states_that_do_not_fit() -> None:
    model, _ = zoo.build("bart")
    given = text(9)
    given["attention_mask"][1] = 0
    assert compare(model, [given], [{"max_new_tokens": 4}], reason="none of the encoder's states") == {HUGGINGFACE: 1}


def reads_pictures() -> Any:
    """A picture's encoder, which returns a pooled state too, and a decoder of another width."""
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
    encoder = transformers.ViTConfig(hidden_size=32, image_size=32, patch_size=8, **sizes)
    text = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    decoder = transformers.TrOCRConfig(vocab_size=zoo.VOCAB, d_model=48, cross_attention_hidden_size=32, **text)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, zoo.PAD
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=zoo.PAD, eos_token_id=2)
    return model


def reads_patches() -> Any:
    """The width of its states stands in the config of its encoder, by the name of a picture's."""
    text = {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
    picture = {"patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Pix2StructConfig(
        text_config={"vocab_size": zoo.VOCAB, "hidden_size": 32, "eos_token_id": 1, **text},
        vision_config={"hidden_size": 32, "seq_len": 16, **picture},
    )
    return transformers.Pix2StructForConditionalGeneration(config)


@pytest.mark.parametrize("make", [reads_pictures, reads_patches])
def test_beside_a_picture(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if make is reads_pictures:
        given = {"pixel_values": torch.randn(3, 3, 32, 32)}
    else:
        places = torch.randint(1, 10, (3, 16, 2)).float()
        given = {"flattened_patches": torch.cat([places, torch.randn(3, 16, 12)], -1)}
    calls: list[dict[str, Any]] = [{"max_new_tokens": 8}, {"max_new_tokens": 8, "num_beams": 3}]
    assert compare(model, [given], calls) == {FAST: 1, PAGES: 1}


def counts_tokens() -> Any:
    """Positions are the tokens so far that are not padding."""
    sizes = {**zoo.ENTRIES["bart"].arguments, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**sizes))


def slices_a_buffer() -> Any:
    """Positions are a part of a table of them, of which tokens' types are gathered."""
    sizes = {**zoo.ENTRIES["bert"].arguments, "num_hidden_layers": 1, "eos_token_id": 2}
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**sizes), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, zoo.PAD
    return transformers.EncoderDecoderModel(config)


def test_what_its_encoder_returns_beside_states() -> None:
    """Moonshine's decoder reads a mask of its encoder's states: none, or one that hides nothing of whole recordings."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    heads = {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
    config = transformers.MoonshineConfig(
        vocab_size=zoo.VOCAB, **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.MoonshineForConditionalGeneration(config).eval()
    sound = {"input_values": torch.randn(3, 2000)}
    whole = {**sound, "attention_mask": torch.ones(3, 2000, dtype=torch.long)}
    assert compare(model, [sound, whole], [{"max_new_tokens": 8}]) == {FAST: 2}
    part = {**whole, "attention_mask": (torch.arange(2000) < torch.tensor([[2000], [300], [700]])).long()}
    assert compare(model, [part], [{"max_new_tokens": 8}], reason="encoder_outputs with attention_mask") == {
        HUGGINGFACE: 1
    }


def test_a_decoder_that_asks_which_tokens_are_padding() -> None:
    """T5Gemma does where it has no mask and no cache, so in no step of `generate`; some layers see a window."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: zoo.ENTRIES["gemma2"].arguments[name] for name in names}
    sizes |= {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 2, "pad_token_id": zoo.PAD, "bos_token_id": 1}
    config = transformers.T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), vocab_size=zoo.VOCAB)
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    begun = {"max_new_tokens": 6, "decoder_input_ids": torch.tensor([[1, zoo.PAD, 6]] * 3)}
    calls: list[dict[str, Any]] = [{"max_new_tokens": 12, "min_new_tokens": 12}, begun]
    assert compare(model, [text(9)], calls) == {FAST: 2}


@pytest.mark.parametrize("make", [counts_tokens, slices_a_buffer])
def test_positions_of_its_own(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 12, "min_new_tokens": 12},
        {"max_new_tokens": 6, "decoder_input_ids": torch.tensor([[2, 5, 6]] * 3)},
        {"max_new_tokens": 8, "num_beams": 3},
    ]
    assert compare(model, [text(9)], calls) == {FAST: 2, PAGES: 1}
    if make is counts_tokens:
        begun = {"max_new_tokens": 6, "decoder_input_ids": torch.tensor([[zoo.PAD, 5, 6]] * 3)}
        assert compare(model, [text(9)], [begun], reason="counts its positions") == {HUGGINGFACE: 1}
