"""Mixtral: every layer has experts; neither QK-norm nor biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kimisys.adapters.megatron.families.experts import Experts


@dataclass(frozen=True)
class Mixtral(Experts):
    """transformers' `MixtralForCausalLM`."""

    count_name: ClassVar[str] = "num_local_experts"
    width_name: ClassVar[str] = "intermediate_size"
    router: ClassVar[str] = "block_sparse_moe.gate.weight"
    expert: ClassVar[str] = "block_sparse_moe.experts.{}."
    projections: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")
    defaults: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": 8, "rope_theta": 1e6}
    only: ClassVar[Mapping[str, Any]] = {"sliding_window": None}
