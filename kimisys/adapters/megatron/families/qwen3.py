"""Qwen3, dense: queries and keys are normalised, and no projection has a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kimisys.adapters.megatron.families.dense import Dense


class Qwen3(Dense):
    """transformers' `Qwen3ForCausalLM`."""

    qk_norm: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 128}
    only: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "use_sliding_window": False}
