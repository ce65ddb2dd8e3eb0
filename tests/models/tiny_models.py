"""config.json of tiny models of every family, for tests of trainers and of engines."""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
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

_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "rope_interleave": True,
        "attention_bias": False,
    },
}
"""What the families with experts say beside the dense ones. DeepSeek's first layer is dense."""


def tiny_config(family: str, *, tied: bool = False, **overrides: Any) -> dict[str, Any]:
    """Two layers, four heads of 32 (two KV heads), 101 rows of vocabulary, so that padding is
    real; `overrides` are keys of config.json.

    Two is the largest tensor-parallel size that Megatron can split it over; `num_key_value_heads=4`
    makes that four. Llama and Qwen3 are narrower than their heads together; Qwen2, whose
    configuration does not tell `head_dim`, is as wide. Those with experts have four, two for each
    token; DeepSeek's latent attention is too small for vLLM's CPU kernel, which takes 512 + 64.
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
    if family == "deepseek_v3":
        del config["head_dim"]
    return config | _EXPERTS.get(family, {}) | overrides
