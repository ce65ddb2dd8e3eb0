"""Qwen3, dense: grouped-query attention with QK-norm, SwiGLU, RMSNorm, rotary embedding, tied or
untied embeddings.

Hugging Face: transformers' `Qwen3ForCausalLM`. Megatron: GPTModel with the local layer spec, keys
as in `ShardedTensor.key`; tensors inside layers have a leading axis of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kimisys.errors import LayoutError
from kimisys.reshard import Tensor

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Qwen3:
    """The numbers of a Qwen3 configuration that decide shapes and arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    initializer_range: float
    tied: bool

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Qwen3:
        """Read config.json's contents (transformers 4 or 5). Raises LayoutError for what cannot
        be honoured."""
        _refuse_variants(hf_config)
        try:
            heads = int(hf_config["num_attention_heads"])
            hidden = int(hf_config["hidden_size"])
            return cls(
                vocab_size=int(hf_config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(hf_config["intermediate_size"]),
                layers=int(hf_config["num_hidden_layers"]),
                heads=heads,
                groups=int(hf_config["num_key_value_heads"]),
                head_dim=int(hf_config.get("head_dim") or hidden // heads),
                norm_epsilon=float(hf_config["rms_norm_eps"]),
                rope_theta=float(_rope(hf_config)["rope_theta"]),
                max_positions=int(hf_config["max_position_embeddings"]),
                initializer_range=float(hf_config.get("initializer_range", 0.02)),
                tied=bool(hf_config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise LayoutError(
                f"the Qwen3 configuration lacks {error}: "
                "give the whole config.json of the checkpoint"
            ) from error

    @property
    def vocabulary_keys(self) -> tuple[str, ...]:
        return (_EMBEDDING,) if self.tied else (_EMBEDDING, _OUTPUT)

    def check_tensor_parallel(self, size: int) -> None:
        """Raise LayoutError unless heads, KV heads and the MLP's width can be split over `size`
        ranks."""
        parts = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.intermediate_size,
        }
        if self.heads % self.groups:
            raise LayoutError(
                f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads "
                f"{self.groups}: each KV head must serve the same number of query heads"
            )
        bad = [f"{name} {count}" for name, count in parts.items() if size < 1 or count % size]
        if bad:
            legal = [
                n for n in range(1, self.groups + 1) if all(c % n == 0 for c in parts.values())
            ]
            raise LayoutError(
                f"tensor_parallel {size} does not divide {' and '.join(bad)} of this Qwen3 model: "
                f"tensor_parallel may be one of {legal}"
            )

    def has_partial_gradient(self, parameter: str) -> bool:
        """QK-norm weights are one for all heads, but a rank only sees its own heads' gradient."""
        return parameter.endswith(("q_layernorm.weight", "k_layernorm.weight"))

    def transformer_config(self) -> dict[str, Any]:
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": self.heads,
            "num_query_groups": self.groups,
            "kv_channels": self.head_dim,
            "layernorm_epsilon": self.norm_epsilon,
            "init_method_std": self.initializer_range,
            "normalization": "RMSNorm",
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
        }

    def model_arguments(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self.max_positions,
            "position_embedding_type": "rope",
            "rotary_base": self.rope_theta,
            "share_embeddings_and_output_weights": self.tied,
        }

    def hf_tensors(self, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors. `dtype` is kimisys' name of it, as in "float32"."""
        return [Tensor(name, dtype, shape) for name, shape in self._shapes().items()]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, width, dim = self.hidden_size, self.intermediate_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {
                at + "input_layernorm.weight": (hidden,),
                at + "self_attn.q_proj.weight": (self.heads * dim, hidden),
                at + "self_attn.k_proj.weight": (self.groups * dim, hidden),
                at + "self_attn.v_proj.weight": (self.groups * dim, hidden),
                at + "self_attn.o_proj.weight": (hidden, self.heads * dim),
                at + "self_attn.q_norm.weight": (dim,),
                at + "self_attn.k_norm.weight": (dim,),
                at + "post_attention_layernorm.weight": (hidden,),
                at + "mlp.gate_proj.weight": (width, hidden),
                at + "mlp.up_proj.weight": (width, hidden),
                at + "mlp.down_proj.weight": (hidden, width),
            }
        return shapes

    def rule(self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]) -> None:
        """Copy Megatron's global tensors to Hugging Face's, with views alone."""
        hf["model.embed_tokens.weight"].copy_(megatron[_EMBEDDING][: self.vocab_size])
        hf["model.norm.weight"].copy_(megatron["decoder.final_layernorm.weight"])
        if not self.tied:
            hf["lm_head.weight"].copy_(megatron[_OUTPUT][: self.vocab_size])
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            tensors = {k.removeprefix(prefix): t for k, t in hf.items() if k.startswith(prefix)}
            self._layer_rule(
                {
                    k.removeprefix(_LAYERS): t[layer]
                    for k, t in megatron.items()
                    if k.startswith(_LAYERS)
                },
                tensors,
            )

    def _layer_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        # Megatron's QKV rows, for each KV head: its query heads, the key head, the value head.
        query_heads, dim, hidden = self.heads // self.groups, self.head_dim, self.hidden_size
        qkv = megatron["self_attention.linear_qkv.weight"]
        qkv = qkv.view(self.groups, query_heads + 2, dim, hidden)
        query = hf["self_attn.q_proj.weight"].view(self.groups, query_heads, dim, hidden)
        query.copy_(qkv[:, :query_heads])
        hf["self_attn.k_proj.weight"].view(self.groups, dim, hidden).copy_(qkv[:, -2])
        hf["self_attn.v_proj.weight"].view(self.groups, dim, hidden).copy_(qkv[:, -1])
        hf["self_attn.o_proj.weight"].copy_(megatron["self_attention.linear_proj.weight"])
        hf["self_attn.q_norm.weight"].copy_(megatron["self_attention.q_layernorm.weight"])
        hf["self_attn.k_norm.weight"].copy_(megatron["self_attention.k_layernorm.weight"])

        gate, up = megatron["mlp.linear_fc1.weight"].chunk(2)
        hf["mlp.gate_proj.weight"].copy_(gate)
        hf["mlp.up_proj.weight"].copy_(up)
        hf["mlp.down_proj.weight"].copy_(megatron["mlp.linear_fc2.weight"])

        # The local spec's norms carry the keys of the fused (Transformer Engine) ones.
        hf["input_layernorm.weight"].copy_(megatron["self_attention.linear_qkv.layer_norm_weight"])
        hf["post_attention_layernorm.weight"].copy_(megatron["mlp.linear_fc1.layer_norm_weight"])


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary parameters: `rope_parameters` in transformers 5, top-level keys before."""
    parameters = hf_config.get("rope_parameters")
    return parameters if parameters else {**(hf_config.get("rope_scaling") or {}), **hf_config}


def _refuse_variants(hf_config: Mapping[str, Any]) -> None:
    rope = _rope(hf_config)
    refused = {
        "hidden_act": (hf_config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(hf_config.get("attention_bias", False)), False),
        "use_sliding_window": (bool(hf_config.get("use_sliding_window", False)), False),
        "rope_type": (rope.get("rope_type") or rope.get("type") or "default", "default"),
    }
    for name, (value, supported) in refused.items():
        if value != supported:
            raise LayoutError(
                f"{name} {value!r} of this Qwen3 configuration is not supported: "
                f"only {supported!r} is"
            )
