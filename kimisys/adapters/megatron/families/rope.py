"""Rotary embeddings as config.json describes them, for megatron-core's GPTModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimisys.adapters.megatron.families.numbers import number
from kimisys.errors import LayoutError

_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What megatron-core 0.16.1 (RotaryEmbedding._apply_scaling) computes with, whatever is asked."""


@dataclass(frozen=True)
class Rope:
    """theta: the base of the wavelengths. llama3_factor: by how much Llama 3.1 stretches the long
    ones; None where they are as they are."""

    theta: float
    llama3_factor: float | None = None

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Rope:
        """Read config.json's contents: `rope_parameters` in transformers 5, `rope_scaling` and
        keys at the top before.

        Raises LayoutError for what megatron-core cannot compute exactly, KeyError for a number
        that is missing.
        """
        scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise LayoutError(
                f"rope_parameters {scaling!r} of the configuration is no JSON object: "
                "give the config.json of the checkpoint as it is"
            )
        given = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, **hf_config, **scaling}
        if given["partial_rotary_factor"] != 1.0:
            raise LayoutError(
                f"partial_rotary_factor {given['partial_rotary_factor']!r} is not supported: only "
                "1.0 is, where the whole head is rotated"
            )
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return cls(number(given, "rope_theta", float))
        if kind != "llama3":
            raise LayoutError(
                f"rope_type {kind!r} is not supported: only 'default' and 'llama3' are"
            )
        for name, constant in _LLAMA3_CONSTANTS.items():
            if number(scaling, name, float) != constant:
                raise LayoutError(
                    f"{name} {scaling[name]!r} of rope_type 'llama3' is not supported: "
                    f"megatron-core always computes with {constant}"
                )
        return cls(number(given, "rope_theta", float), number(scaling, "factor", float))

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of megatron-core's GPTModel."""
        arguments = {"position_embedding_type": "rope", "rotary_base": self.theta}
        if self.llama3_factor is None:
            return arguments
        return {**arguments, "rope_scaling": True, "rope_scaling_factor": self.llama3_factor}


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers (Peng et al., 2023), as DeepSeek's configurations give them."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Yarn | None:
        """Read config.json's contents; None where the rotary embedding is not of this type.
        Raises as `Rope.from_config`."""
        scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            return None  # Rope refuses it
        if (scaling.get("rope_type") or scaling.get("type")) != "yarn":
            return None
        given = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, **scaling}
        return cls(
            number(given, "factor", float),
            number(given, "original_max_position_embeddings", int),
            *(number(given, name, float) for name in ("beta_fast", "beta_slow")),
            *(number(given, name, float) for name in ("mscale", "mscale_all_dim")),
        )

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of megatron-core's MLATransformerConfig."""
        return {
            "rope_type": "yarn",
            "rotary_scaling_factor": self.factor,
            "original_max_position_embeddings": self.original_positions,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "mscale": self.mscale,
            "mscale_all_dim": self.mscale_all_dim,
        }
