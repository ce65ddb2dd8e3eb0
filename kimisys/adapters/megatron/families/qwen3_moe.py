"""Qwen3 with experts: queries and keys are normalised; some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kimisys.adapters.megatron.families.experts import Experts


@dataclass(frozen=True)
class Qwen3Moe(Experts):
    """transformers' `Qwen3MoeForCausalLM`."""

    qk_norm: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": False}
    only: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "use_sliding_window": False}

    @classmethod
    def moe_layer_numbers(cls, given: Mapping[str, Any], layers: int) -> tuple[int, ...]:
        dense = given.get("mlp_only_layers") or []
        step = given.get("decoder_sparse_step") or 1
        return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
