"""Llama 1 to 3.3, dense: neither QK-norm nor biases; from 3.1 on, stretched rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kimisys.adapters.megatron.families.dense import Dense


class Llama(Dense):
    """transformers' `LlamaForCausalLM`."""

    defaults: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": None}
    only: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "mlp_bias": False}
