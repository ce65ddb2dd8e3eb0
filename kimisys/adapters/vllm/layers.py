"""Which layers of a model are alike, for vLLM and in the checkpoint: those are traced once.

A layer's number is the first number in its parameters' names. Layers are alike when their modules'
types, quantization methods, parameters' names, shapes and dtypes are, and when the checkpoint has
alike tensors of that number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.models.utils import PPMissingLayer

from kimisys.reshard import Layout, Tensor


@dataclass(frozen=True)
class Numbered:
    """A dotted name cut at its first number: "model.layers", 17, "mlp.gate.weight"."""

    prefix: str
    number: int
    rest: str

    @property
    def template(self) -> str:
        """The name with "{}" in the number's place."""
        return ".".join(part for part in (self.prefix, "{}", self.rest) if part)

    @staticmethod
    def of(name: str) -> Numbered | None:
        """None for a name without a number."""
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isascii() and part.isdigit() and str(int(part)) == part:
                return Numbered(".".join(parts[:at]), int(part), ".".join(parts[at + 1 :]))
        return None


class Checkpoint:
    """A checkpoint's tensors by number."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [(tensor, Numbered.of(tensor.name)) for tensor in tensors]
        self._alike: dict[int, set[Hashable]] = defaultdict(set)
        for tensor, at in self._tensors:
            if at is not None:
                self._alike[at.number].add((at.prefix, at.rest, tensor.dtype, tensor.shape))

    def signature(self, number: int) -> Hashable:
        """Equal for numbers that have the same tensors."""
        return frozenset(self._alike.get(number, ()))

    def of_layers(self, numbers: Collection[int]) -> list[Tensor]:
        """Tensors of these numbers, whatever their prefix."""
        return [t for t, at in self._tensors if at is not None and at.number in numbers]

    @staticmethod
    def prefixes_of(layers: Layout) -> frozenset[str]:
        """The checkpoint's prefixes of the tensors in a layout of numbered layers."""
        numbered = (Numbered.of(tensor.name) for tensor in layers.tensors)
        return frozenset(at.prefix for at in numbered if at is not None)

    def without_layers(self, prefixes: Collection[str], kept: Collection[int]) -> list[Tensor]:
        """All tensors, but of those under `prefixes` only the numbers in `kept`."""
        return [
            tensor
            for tensor, at in self._tensors
            if at is None or at.prefix not in prefixes or at.number in kept
        ]


def layer_prefixes(model: torch.nn.Module, layers: int, stages: int) -> frozenset[str]:
    """Names of the lists that hold a layer, or a place for one, for each of a model's `layers`.

    model: of one of the pipeline's `stages`. A vision tower may have as many layers: no stage lacks
    any of those. A model that keeps its layers otherwise has none: all of it counts as its outer
    part.
    """

    def is_split(blocks: torch.nn.ModuleList) -> bool:
        return stages == 1 or any(isinstance(block, PPMissingLayer) for block in blocks)

    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers and name
        if is_split(module)
    )


def layer_of(name: str, prefixes: Collection[str]) -> Numbered | None:
    """Where a parameter's name is cut when it belongs to a layer of these lists."""
    at = Numbered.of(name)
    return at if at is not None and at.prefix in prefixes else None


def layer_signatures(
    model: torch.nn.Module, prefixes: Collection[str], checkpoint: Checkpoint
) -> dict[int, Hashable]:
    """By number, what is equal for layers that are alike.

    model: with all layers of its pipeline stage.
    """
    parts: dict[int, set[Hashable]] = defaultdict(set)
    for name, module in model.named_modules():
        at = layer_of(name, prefixes)
        if at is not None and not isinstance(module, PPMissingLayer):
            parts[at.number].add((at.prefix, at.rest, *_traits(module)))
    return {number: (frozenset(own), checkpoint.signature(number)) for number, own in parts.items()}


def _traits(module: torch.nn.Module) -> tuple[Any, ...]:
    parameters = tuple(
        (name, tuple(parameter.shape), parameter.dtype)
        for name, parameter in module.named_parameters(recurse=False)
    )
    return type(module), type(getattr(module, "quant_method", None)), parameters


def alike(signatures: Mapping[int, Hashable]) -> list[list[int]]:
    """Numbers of equal signature together, in ascending order."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in sorted(signatures):
        groups[signatures[number]].append(number)
    return list(groups.values())


def shortest_window(groups: Iterable[Sequence[int]]) -> range:
    """The fewest consecutive numbers that hold one of every group; empty without groups.

    One build of these layers shows a model of every kind of layer that it has: some of vLLM's
    constructors refuse a model without experts, or look at more than one layer.
    """
    kind = {number: index for index, group in enumerate(groups) for number in group}
    numbers = sorted(kind)
    best = range(0, 0)
    last: dict[int, int] = {}
    for number in numbers:
        last[kind[number]] = number
        if len(last) == len(set(kind.values())):
            start = min(last.values())
            if not best or number + 1 - start < len(best):
                best = range(start, number + 1)
    return best
