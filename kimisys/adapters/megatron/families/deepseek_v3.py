"""DeepSeek-V3 and what is built like it (Moonlight, Kimi-K2): latent attention, a few dense layers
first, then routed and shared experts behind a router with a correction bias.

The layers for multi-token prediction that some checkpoints carry are no part of the model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kimisys.adapters.megatron.families.dense import (
    check_divides,
    copy_gated_mlp,
    either,
    gated_mlp_shapes,
)
from kimisys.adapters.megatron.families.experts import Experts
from kimisys.adapters.megatron.families.numbers import number
from kimisys.adapters.megatron.families.rope import Yarn

_BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class DeepseekV3(Experts):
    """transformers' `DeepseekV3ForCausalLM`. q_rank: None where queries are projected at once."""

    count_name: ClassVar[str] = "n_routed_experts"
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": None,
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
    }
    only: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    }

    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    shared: int
    router_groups: int
    active_groups: int
    router_scale: float
    yarn: Yarn | None

    @classmethod
    def _fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        rank = given["q_lora_rank"]
        yarn = Yarn.from_config(given)
        if yarn is not None:  # the dense families' rotary embedding knows only the unstretched one
            scaling = given.get("rope_parameters") or given["rope_scaling"]
            theta = {k: v for k, v in scaling.items() if k == "rope_theta"}
            given = {**given, "rope_scaling": None, "rope_parameters": None, **theta}
        heads = number(given, "num_attention_heads", int)
        given["head_dim"] = number(given, "qk_rope_head_dim", int)
        return super()._fields({**given, "num_key_value_heads": heads}) | {
            "q_rank": None if rank is None else number(given, "q_lora_rank", int),
            "kv_rank": number(given, "kv_lora_rank", int),
            "plain_dim": number(given, "qk_nope_head_dim", int),
            "rope_dim": number(given, "qk_rope_head_dim", int),
            "value_dim": number(given, "v_head_dim", int),
            "shared": int(given["n_shared_experts"] or 0),
            "router_groups": number(given, "n_group", int),
            "active_groups": number(given, "topk_group", int),
            "router_scale": number(given, "routed_scaling_factor", float),
            "yarn": yarn,
        }

    @classmethod
    def moe_layer_numbers(cls, given: Mapping[str, Any], layers: int) -> tuple[int, ...]:
        return tuple(range(number(given, "first_k_dense_replace", int), layers))

    def _check_tensor_parallel(self, size: int) -> None:
        parts = {"num_attention_heads": self.heads}
        if self.dense_layers:
            parts["intermediate_size"] = self.intermediate_size
        if self.shared:
            parts["moe_intermediate_size of the shared experts"] = self.shared * self.expert_width
        check_divides("tensor_parallel", size, parts, type(self).__name__)

    def transformer_config(self) -> dict[str, Any]:
        config = super().transformer_config()
        del config["num_query_groups"]
        groups = self.router_groups if self.router_groups > 1 else None
        return config | {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "kv_channels": self.value_dim,
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "qk_head_dim": self.plain_dim,
            "qk_pos_emb_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
            "moe_shared_expert_intermediate_size": self.shared * self.expert_width or None,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": self.router_scale,
            "moe_router_num_groups": groups,
            "moe_router_group_topk": self.active_groups if groups else None,
            "rotary_base": self.rope.theta,
            **(self.yarn.transformer_config() if self.yarn else {"rope_type": "rope"}),
        }

    def model_arguments(self) -> dict[str, Any]:
        # latent attention rotates by itself
        return {
            "max_sequence_length": self.max_positions,
            "share_embeddings_and_output_weights": self.tied,
            "position_embedding_type": "none",
        }

    def _dtypes(self, part: str) -> dict[str, str]:
        return {_BIAS: "float32"} if part == "MoE layer" else {}

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, queries = self.hidden_size, self.heads * (self.plain_dim + self.rope_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_proj_with_mqa.weight": (self.kv_rank + self.rope_dim, hidden),
            "kv_a_layernorm.weight": (self.kv_rank,),
            "kv_b_proj.weight": (self.heads * (self.plain_dim + self.value_dim), self.kv_rank),
            "o_proj.weight": (hidden, self.heads * self.value_dim),
        }
        if self.q_rank is None:
            shapes["q_proj.weight"] = (queries, hidden)
        else:
            shapes["q_a_proj.weight"] = (self.q_rank, hidden)
            shapes["q_a_layernorm.weight"] = (self.q_rank,)
            shapes["q_b_proj.weight"] = (queries, self.q_rank)
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().expert_shapes() | {_BIAS: (self.experts,)}
        if self.shared:
            width = self.shared * self.expert_width
            shapes |= gated_mlp_shapes("mlp.shared_experts.", self.hidden_size, width)
        return shapes

    def moe_layer_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        super().moe_layer_rule(megatron, hf)
        hf[_BIAS].copy_(megatron["mlp.router.expert_bias"])
        if self.shared:
            copy_gated_mlp(megatron, "mlp.shared_experts.", hf, "mlp.shared_experts.")

    def attention_rule(
        self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]
    ) -> None:
        def copy(name: str, *keys: str) -> None:
            tensor = either(megatron, *(f"self_attention.{key}" for key in keys))
            hf[f"self_attn.{name}.weight"].copy_(tensor)

        if self.q_rank is None:
            copy("q_proj", "linear_q_proj.weight")
        else:
            copy("q_a_proj", "linear_q_down_proj.weight")
            copy("q_a_layernorm", "linear_q_up_proj.layer_norm_weight", "q_layernorm.weight")
            copy("q_b_proj", "linear_q_up_proj.weight")
        copy("kv_a_proj_with_mqa", "linear_kv_down_proj.weight")
        copy("kv_a_layernorm", "linear_kv_up_proj.layer_norm_weight", "kv_layernorm.weight")
        copy("kv_b_proj", "linear_kv_up_proj.weight")
        copy("o_proj", "linear_proj.weight")
