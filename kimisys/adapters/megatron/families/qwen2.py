"""Qwen2 and Qwen2.5, dense: the query, key and value projections have a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kimisys.adapters.megatron.families.dense import Dense


class Qwen2(Dense):
    """transformers' `Qwen2ForCausalLM`."""

    qkv_bias: ClassVar[bool] = True
    only: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}
