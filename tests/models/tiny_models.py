"""config.json of tiny models of every family, for tests of trainers and of engines."""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_HEAD_DIM = 32  # vLLM's CPU attention knows no smaller heads

LLAMA3_ROPE: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3.1's `rope_parameters`. Of the 16 wavelengths of a head of 32, two are interpolated and
three stretched."""


def tiny_config(family: str, *, tied: bool = False, **overrides: Any) -> dict[str, Any]:
    """Two layers, four heads of 32 (two KV heads), 101 rows of vocabulary, so that padding is
    real; `overrides` are keys of config.json.

    Two is the largest tensor-parallel size that Megatron can split it over; `num_key_value_heads=4`
    makes that four. Llama and Qwen3 are narrower than their heads together; Qwen2, whose
    configuration does not tell `head_dim`, is as wide.
    """
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "eos_token_id": 2,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "vocab_size": 101,
    }
    if family == "qwen2":
        del config["head_dim"]
        heads = overrides.get("num_attention_heads", config["num_attention_heads"])
        config["hidden_size"] = heads * _HEAD_DIM
    return config | overrides
