"""Model families: what a Hugging Face configuration means in Megatron's terms. No Megatron import
here.

A family knows the Hugging Face tensors of a model, how they lie in Megatron's global (unsharded)
tensors, and which layouts are possible. One file for each, and one for what the dense ones share;
`family_of` picks one by the architecture's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from kimisys.adapters.megatron.families.llama import Llama
from kimisys.adapters.megatron.families.qwen2 import Qwen2
from kimisys.adapters.megatron.families.qwen3 import Qwen3
from kimisys.errors import LayoutError
from kimisys.reshard import Tensor


class Family(Protocol):
    """What the adapter asks of a model family."""

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that are real; Megatron pads them."""

    @property
    def layers(self) -> int:
        """Transformer layers; a pipeline gives each stage as many."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def groups(self) -> int:
        """Key-value heads."""

    @property
    def head_dim(self) -> int:
        """Elements of a head."""

    @property
    def intermediate_size(self) -> int:
        """Columns of the MLP."""

    @property
    def vocabulary_keys(self) -> tuple[str, ...]:
        """Keys of the Megatron tensors whose axis 0 is the padded vocabulary."""

    def check_tensor_parallel(self, size: int) -> None:
        """Raise LayoutError, saying what would be legal, when the model cannot be split over
        `size` ranks."""

    def has_partial_gradient(self, parameter: str) -> bool:
        """True for a parameter that is replicated over TP ranks but sees only the rank's own
        heads."""

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of megatron-core's TransformerConfig that the architecture decides."""

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of megatron-core's GPTModel that the architecture decides."""

    def hf_tensors(self, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors, in Hugging Face coordinates."""

    def rule(self, megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]) -> None:
        """Copy Megatron's global tensors (by key) to Hugging Face tensors (by name), with views
        alone."""


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {
    "LlamaForCausalLM": Llama.from_config,
    "Qwen2ForCausalLM": Qwen2.from_config,
    "Qwen3ForCausalLM": Qwen3.from_config,
}


def implementations() -> list[str]:
    """The architectures that can be built, by their Hugging Face name."""
    return sorted(_FAMILIES)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face configuration (the contents of config.json).

    Raises LayoutError, naming the architecture, when it is not supported.
    """
    names = hf_config.get("architectures") or []
    if len(names) != 1 or names[0] not in _FAMILIES:
        raise LayoutError(
            f"architecture {', '.join(names) or '(none given)'!r} is not supported by "
            "kimisys.adapters.megatron; `architectures` of config.json must be one of: "
            f"{', '.join(implementations())}"
        )
    return _FAMILIES[names[0]](hf_config)


def check_layout(
    hf_config: Mapping[str, Any], tensor_parallel: int, pipeline_parallel: int, world_size: int
) -> None:
    """Raise LayoutError when the model cannot be laid out so; nothing is started to find out."""
    check_world(tensor_parallel, pipeline_parallel, world_size)
    check_model(family_of(hf_config), tensor_parallel, pipeline_parallel)


def check_model(family: Family, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise LayoutError when the model cannot be split into so many shards and stages."""
    family.check_tensor_parallel(tensor_parallel)
    if pipeline_parallel < 1 or family.layers % pipeline_parallel:
        legal = [n for n in range(1, family.layers + 1) if family.layers % n == 0]
        raise LayoutError(
            f"pipeline_parallel {pipeline_parallel} does not divide num_hidden_layers "
            f"{family.layers}: each stage must hold as many layers; "
            f"pipeline_parallel may be one of {legal}"
        )


def check_world(tensor_parallel: int, pipeline_parallel: int, world_size: int) -> None:
    """Raise LayoutError when `world_size` ranks cannot form replicas of `tensor_parallel` times
    `pipeline_parallel` ranks."""
    if min(tensor_parallel, pipeline_parallel, world_size) < 1:
        raise LayoutError(
            f"tensor_parallel {tensor_parallel}, pipeline_parallel {pipeline_parallel} and "
            f"world_size {world_size} must all be at least 1"
        )
    if world_size % (tensor_parallel * pipeline_parallel):
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        legal = [(tp, pp) for tp in divisors for pp in divisors if world_size % (tp * pp) == 0]
        raise LayoutError(
            f"world_size {world_size} is not divisible by tensor_parallel {tensor_parallel} times "
            f"pipeline_parallel {pipeline_parallel}: with {world_size} ranks (tensor_parallel, "
            f"pipeline_parallel) may be one of {legal}"
        )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the vocabulary with Megatron's padding: each rank holds the same multiple of 8
    (one AVX-512 or tensor-core tile of rows)."""
    multiple = 8 * tensor_parallel
    return -(-vocab_size // multiple) * multiple
