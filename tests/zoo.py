"""Tiny models with random weights, one builder per architecture: `build(name) -> (model, inputs)`.

Sizes are odd on purpose and differ from one another; every vector parameter (norm weights, biases, sinks) is random, so
that leaving one out shows. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor

BATCH, LENGTH, DECODER_LENGTH, VOCAB = 2, 9, 7, 131
PAD = 0

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FULL_HEADS = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
_ENCODER = {**_FULL_HEADS, "max_position_embeddings": 128}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 8,
    "image_size": 32,
    "patch_size": 8,
}
_LAYERS = "num_hidden_layers"


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, length))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _masked_tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(DECODER_LENGTH)}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


@dataclass(frozen=True)
class Entry:
    """How to build one model: its auto class, its config class, the config's arguments, and the example inputs."""

    auto: Any
    config: type
    arguments: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = _tokens
    layers: tuple[str, ...] = (_LAYERS,)
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _causal(config: type, /, *, layers: tuple[str, ...] = (_LAYERS,), base: Any = _DECODER, **arguments: Any) -> Entry:
    return Entry(tf.AutoModelForCausalLM, config, {**base, **arguments}, layers=layers)


def _llama3_rope() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def _longrope(dims: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(dims)],
        "long_factor": [2.0 + 0.3 * i for i in range(dims)],
        "original_max_position_embeddings": 16,
    }


ENTRIES: dict[str, Entry] = {
    # the eighteen
    "llama": _causal(tf.LlamaConfig),
    "llama31": _causal(tf.LlamaConfig, rope_parameters=_llama3_rope()),
    "mistral": _causal(tf.MistralConfig, sliding_window=6),
    "qwen2": _causal(tf.Qwen2Config),
    "qwen3": _causal(tf.Qwen3Config, head_dim=16),
    "gemma2": _causal(
        tf.Gemma2Config, head_dim=16, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=2.0
    ),
    "gemma3": _causal(tf.Gemma3TextConfig, head_dim=16, sliding_window=6, query_pre_attn_scalar=20),
    "phi3": _causal(tf.Phi3Config),
    "gptneox": _causal(tf.GPTNeoXConfig, base=_FULL_HEADS),
    "gpt2": _causal(
        tf.GPT2Config,
        base={},
        layers=("n_layer",),
        vocab_size=VOCAB,
        n_positions=256,
        n_embd=64,
        n_head=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    ),
    "bert": Entry(tf.AutoModel, tf.BertConfig, _ENCODER, _masked_tokens),
    "mixtral": _causal(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3moe": _causal(tf.Qwen3MoeConfig, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "deepseekv3": _causal(
        tf.DeepseekV3Config,
        num_key_value_heads=8,
        moe_intermediate_size=48,
        n_shared_experts=1,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
    ),
    "whisper": Entry(
        tf.AutoModelForSpeechSeq2Seq,
        tf.WhisperConfig,
        {
            **_SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 50,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        lambda: {"input_features": torch.randn(BATCH, 16, 100), "decoder_input_ids": _ids(DECODER_LENGTH)},
        layers=("encoder_layers", "decoder_layers"),
    ),
    "t5": Entry(
        tf.AutoModelForSeq2SeqLM,
        tf.T5Config,
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 112,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
        _pair,
        layers=("num_layers",),
    ),
    "vit": Entry(tf.AutoModel, tf.ViTConfig, _VISION, _pixels),
    "mamba2": _causal(
        tf.Mamba2Config,
        base={},
        num_heads=8,
        head_dim=16,
        vocab_size=VOCAB,
        hidden_size=64,
        state_size=16,
        expand=2,
        n_groups=1,
        chunk_size=8,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # more decoders
    "gpt_oss": _causal(tf.GptOssConfig, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "bloom": _causal(tf.BloomConfig, base={}, layers=("n_layer",), vocab_size=VOCAB, hidden_size=64, n_head=4),
    "falcon": _causal(tf.FalconConfig, base={}, vocab_size=VOCAB, hidden_size=64, num_attention_heads=4, alibi=False),
    "falcon_alibi": _causal(
        tf.FalconConfig, base={}, vocab_size=VOCAB, hidden_size=64, num_attention_heads=4, alibi=True
    ),
    "opt": _causal(
        tf.OPTConfig,
        base={},
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=112,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=48,
        pad_token_id=PAD,
    ),
    "olmo2": _causal(tf.Olmo2Config),
    "cohere2": _causal(tf.Cohere2Config, sliding_window=6, head_dim=16),
    "starcoder2": _causal(tf.Starcoder2Config, sliding_window=6),
    "mpt": _causal(
        tf.MptConfig, base={}, layers=("n_layers",), vocab_size=VOCAB, d_model=64, n_heads=4, max_seq_len=128
    ),
    "gptj": _causal(
        tf.GPTJConfig,
        base={},
        layers=("n_layer",),
        vocab_size=VOCAB,
        n_embd=64,
        n_head=4,
        n_positions=128,
        rotary_dim=8,
    ),
    "phi3_longrope": _causal(
        tf.Phi3Config,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=_longrope(4),
    ),
    "llama_dynamic": _causal(
        tf.LlamaConfig,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "llama4_text": _causal(
        tf.Llama4TextConfig,
        head_dim=16,
        num_local_experts=4,
        attention_chunk_size=6,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=2,
    ),
    "glm": _causal(tf.GlmConfig, head_dim=16),
    "granite": _causal(tf.GraniteConfig, attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=3.0),
    "stablelm": _causal(tf.StableLmConfig, use_qkv_bias=True, qk_layernorm=True),
    "nemotron": _causal(tf.NemotronConfig, head_dim=8),
    # encoders
    "roberta": Entry(tf.AutoModelForMaskedLM, tf.RobertaConfig, _ENCODER, _masked_tokens),
    "distilbert": Entry(
        tf.AutoModelForMaskedLM,
        tf.DistilBertConfig,
        {
            "vocab_size": VOCAB,
            "dim": 64,
            "n_heads": 4,
            "hidden_dim": 112,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
        },
        _masked_tokens,
        layers=("n_layers",),
    ),
    "modernbert": Entry(
        tf.AutoModelForMaskedLM,
        tf.ModernBertConfig,
        {**_ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 3, "sep_token_id": 4},
        _masked_tokens,
    ),
    "electra": Entry(tf.AutoModel, tf.ElectraConfig, {**_ENCODER, "embedding_size": 48}, _masked_tokens),
    # encoder-decoders
    "bart": Entry(
        tf.AutoModelForSeq2SeqLM,
        tf.BartConfig,
        {**_SEQ2SEQ, "max_position_embeddings": 128},
        _pair,
        layers=("encoder_layers", "decoder_layers"),
    ),
    # vision, speech, both
    "dinov2": Entry(tf.AutoModel, tf.Dinov2Config, _VISION, _pixels),
    "clip": Entry(
        tf.AutoModel,
        tf.CLIPConfig,
        {"projection_dim": 48, "vision_config": dict(_VISION), "text_config": dict(_ENCODER)},
        lambda: {**_tokens(), **_pixels()},
        layers=(),
        nested={"vision_config": (_LAYERS,), "text_config": (_LAYERS,)},
    ),
    "wav2vec2": Entry(
        tf.AutoModelForCTC,
        tf.Wav2Vec2Config,
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_attention_heads": 4,
            "conv_dim": (32, 32),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "num_feat_extract_layers": 2,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
        },
        lambda: {"input_values": torch.randn(BATCH, 400)},
    ),
}

EIGHTEEN = tuple(ENTRIES)[:18]
NAMES = tuple(ENTRIES)
DECODERS = tuple(n for n, e in ENTRIES.items() if e.auto is tf.AutoModelForCausalLM)


def build(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> tuple[Any, dict[str, Tensor]]:
    """The model in eval mode, weights of `dtype` and fp32 where the model keeps them so, and example inputs."""
    entry = ENTRIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = entry.auto.from_config(config(name, layers), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = entry.inputs()
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def config(name: str, layers: int = 2) -> Any:
    """The config of a tiny model."""
    entry = ENTRIES[name]
    arguments = {**entry.arguments, **dict.fromkeys(entry.layers, layers)}
    for key, names in entry.nested.items():
        arguments[key] = {**arguments[key], **dict.fromkeys(names, layers)}
    return entry.config(**arguments)
