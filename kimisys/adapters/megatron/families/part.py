"""Pieces of a model: what occurs once, and what is repeated layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from kimisys.reshard import Tensor

Rule = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]
"""Copies Megatron's global tensors (by key) to Hugging Face tensors (by name), with views alone."""


@dataclass(frozen=True)
class Part:
    """Tensors that are converted together, by one rule that sees nothing else.

    name: what a person calls it, as in "MoE layer". shapes: Hugging Face's tensors by name, below
    `hf_prefix`. rule: gets both sides under names below the prefixes. layers: the numbers that
    stand for "{}" in the prefixes; empty for what occurs once. dtypes: those of tensors that are
    not of the model's dtype, by the same names. padded_rows: whether Megatron's tensors may have
    more rows than the checkpoint's, those of the padded vocabulary.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    rule: Rule
    layers: tuple[int, ...] = ()
    hf_prefix: str = ""
    key_prefix: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    padded_rows: bool = False

    def instances(self) -> Iterator[str]:
        """What stands for "{}" in each occurrence: "17", or "" for what occurs once."""
        return (str(layer) for layer in self.layers) if self.layers else iter([""])

    def tensors(self, label: str, dtype: str) -> list[Tensor]:
        """The checkpoint's tensors of one occurrence; "{}" for a label leaves names as they are."""
        prefix = self.hf_prefix.replace("{}", label)
        return [
            Tensor(prefix + name, self.dtypes.get(name, dtype), shape)
            for name, shape in self.shapes.items()
        ]


def layers_of(
    name: str,
    layers: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    rule: Rule,
    dtypes: Mapping[str, str] | None = None,
) -> Part:
    """Layers of one kind, where decoders keep them in a checkpoint and in a GPTModel."""
    return Part(name, shapes, rule, layers, "model.layers.{}.", "decoder.layers.{}.", dtypes or {})


def copy_all(pairs: Mapping[str, str], rows: int | None = None) -> Rule:
    """A rule that copies whole tensors, {Hugging Face's name: Megatron's key}; of a padded
    vocabulary the first `rows`."""

    def rule(megatron: Mapping[str, torch.Tensor], hf: Mapping[str, torch.Tensor]) -> None:
        for name, key in pairs.items():
            hf[name].copy_(megatron[key][:rows])

    return rule


def tensors_of(parts: Iterable[Part], dtype: str) -> list[Tensor]:
    """The checkpoint's tensors; `dtype` is kimisys' name of the model's, as in "float32"."""
    return [
        tensor
        for part in parts
        for label in part.instances()
        for tensor in part.tensors(label, dtype)
    ]
