"""Model families: what a Hugging Face configuration means in Megatron's terms. No Megatron import
here.

A family knows the Hugging Face tensors of a model, how they lie in Megatron's global (unsharded)
tensors, and which layouts are possible. One file for each, and one for what the dense ones share;
`family_of` picks one by the architecture's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from kimisys.adapters.megatron.families.deepseek_v3 import DeepseekV3
from kimisys.adapters.megatron.families.llama import Llama
from kimisys.adapters.megatron.families.mixtral import Mixtral
from kimisys.adapters.megatron.families.part import Part
from kimisys.adapters.megatron.families.qwen2 import Qwen2
from kimisys.adapters.megatron.families.qwen3 import Qwen3
from kimisys.adapters.megatron.families.qwen3_moe import Qwen3Moe
from kimisys.adapters.megatron.parallel import Parallel, check_stages, of_world
from kimisys.errors import LayoutError
from kimisys.reshard import Tensor


class Family(Protocol):
    """What the adapter asks of a model family."""

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that are real; Megatron pads them."""

    @property
    def layers(self) -> int:
        """Transformer layers."""

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
        """Columns of the dense MLP."""

    def check(self, parallel: Parallel) -> None:
        """Raise LayoutError, saying what would be legal, when the ranks of a stage cannot share
        out the model so."""

    def has_partial_gradient(self, parameter: str) -> bool:
        """True for a parameter that is replicated over TP ranks but sees only the rank's own
        heads."""

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of megatron-core's TransformerConfig that the architecture decides."""

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of megatron-core's GPTModel that the architecture decides."""

    def parts(self) -> Sequence[Part]:
        """The model in pieces: each says which tensors a checkpoint has of it, and how they lie
        in Megatron's. Every tensor is in one piece."""

    def hf_tensors(self, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors, in Hugging Face coordinates; of `dtype` unless their part says
        otherwise. `tensors_of(parts, dtype)` is the answer."""


FamilyReader = Callable[[Mapping[str, Any]], Family]
"""Makes a family out of the contents of config.json."""

_FAMILIES: dict[str, FamilyReader] = {
    "DeepseekV3ForCausalLM": DeepseekV3.from_config,
    "LlamaForCausalLM": Llama.from_config,
    "MixtralForCausalLM": Mixtral.from_config,
    "Qwen2ForCausalLM": Qwen2.from_config,
    "Qwen3ForCausalLM": Qwen3.from_config,
    "Qwen3MoeForCausalLM": Qwen3Moe.from_config,
}


_OURS = frozenset(_FAMILIES.values())


def implementations() -> list[str]:
    """The architectures that can be built, by their Hugging Face name."""
    return sorted(_FAMILIES)


Converter = Callable[[str, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]
"""A function that stands in for a family's rules: (name of the part, Megatron's tensors by key,
Hugging Face's tensors by name), names as the part's own rule sees them."""


def family_of(
    hf_config: Mapping[str, Any],
    reader: FamilyReader | None = None,
    converter: Converter | None = None,
) -> Family:
    """The family of a Hugging Face configuration (the contents of config.json).

    reader: makes a family that is not registered. converter: replaces the family's rules. Raises
    LayoutError, naming the architecture, when it is not supported.
    """
    family = _registered(hf_config)(hf_config) if reader is None else reader(hf_config)
    return family if converter is None else _Converted(family, converter)


class _Converted:
    """A family whose parts are converted by one function of the user's."""

    def __init__(self, family: Family, converter: Converter) -> None:
        self._family, self._converter = family, converter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def parts(self) -> list[Part]:
        return [
            replace(part, rule=partial(self._converter, part.name)) for part in self._family.parts()
        ]


def _registered(hf_config: Mapping[str, Any]) -> FamilyReader:
    names = hf_config.get("architectures") or []
    if len(names) != 1 or names[0] not in _FAMILIES:
        raise LayoutError(
            f"architecture {', '.join(names) or '(none given)'!r} is not supported by "
            "kimisys.adapters.megatron; `architectures` of config.json must be one of: "
            f"{', '.join(implementations())}"
        )
    return _FAMILIES[names[0]]


def register(architecture: str, reader: FamilyReader) -> None:
    """Make an architecture known, for `architectures` of config.json; replaces what was known."""
    _FAMILIES[architecture] = reader


def is_registered_elsewhere(hf_config: Mapping[str, Any]) -> bool:
    """Whether the configuration's family is one that `register` brought in."""
    return _registered(hf_config) not in _OURS


def check_layout(
    hf_config: Mapping[str, Any], tensor_parallel: int, pipeline_parallel: int, world_size: int
) -> None:
    """Raise LayoutError when the model cannot be laid out so; nothing is started to find out."""
    parallel = of_world(tensor_parallel, pipeline_parallel, world_size)
    check_model(family_of(hf_config), parallel)


def check_model(family: Family, parallel: Parallel) -> None:
    """Raise LayoutError, saying what would be legal, when the model cannot be laid out so."""
    family.check(parallel)
    check_stages(parallel, family.layers)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the vocabulary with Megatron's padding: each rank holds the same multiple of 8
    (one AVX-512 or tensor-core tile of rows)."""
    multiple = 8 * tensor_parallel
    return -(-vocab_size // multiple) * multiple
