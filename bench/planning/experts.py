"""Routed experts placed on ranks: the one placement that every planner here is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kimisys.reshard import Buffer, Fragment, Layout, Plan, Region, Tensor, itemsize

Traffic = Counter[tuple[int, int]]
"""Bytes by (source rank, destination rank)."""


class Matrix(NamedTuple):
    """One matrix of one expert of one layer. index: among the layer's matrices of its kind."""

    name: str
    layer: int
    expert: int
    kind: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class ExpertPlacement:
    """Mixture-of-experts layers whose experts go from expert x pipeline ranks to expert ranks.

    Source rank `stage * source_expert_ranks + expert rank` holds whole experts of its stage's
    layers; the destination has one stage. Kimi-K2's numbers are the defaults: 69,120 copies.
    """

    layers: int = 60
    experts: int = 384
    hidden: int = 7168
    width: int = 2048
    source_expert_ranks: int = 16
    source_stages: int = 8
    destination_ranks: int = 32
    dtype: str = "bfloat16"

    @property
    def source_ranks(self) -> int:
        """How many ranks the source has."""
        return self.source_expert_ranks * self.source_stages

    def stage(self, layer: int) -> int:
        """The pipeline stage of a layer; where layers do not divide, stages differ by one."""
        return layer * self.source_stages // self.layers

    def source_rank(self, layer: int, expert: int) -> int:
        """The one source rank that holds this expert."""
        held = self.experts // self.source_expert_ranks
        return self.stage(layer) * self.source_expert_ranks + expert // held

    def destination_rank(self, expert: int) -> int:
        """The one destination rank that wants this expert of every layer."""
        return expert // (self.experts // self.destination_ranks)

    def matrices(self) -> Iterator[Matrix]:
        """Every matrix, by layer, expert and kind."""
        shapes = {
            "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden),
            "down_proj": (self.hidden, self.width),
        }
        for layer in range(self.layers):
            for expert in range(self.experts):
                for kind, shape in shapes.items():
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
                    yield Matrix(name, layer, expert, kind, shape)

    def layouts(self) -> tuple[Layout, Layout]:
        """The source and the destination for `kimisys.reshard.plan`."""
        size = itemsize(self.dtype)
        tensors: list[Tensor] = []
        sides: tuple[tuple[list[Buffer], list[Fragment]], ...] = (([], []), ([], []))
        whole: dict[tuple[int, int], Region] = {}
        for name, layer, expert, _, shape in self.matrices():
            tensors.append(Tensor(name, self.dtype, shape))
            region = whole.setdefault(shape, Region((0, 0), shape))
            nbytes, strides = shape[0] * shape[1] * size, (shape[1] * size, size)
            ranks = (self.source_rank(layer, expert), self.destination_rank(expert))
            for rank, (buffers, fragments) in zip(ranks, sides, strict=True):
                buffers.append(Buffer(rank, name, nbytes))
                fragments.append(Fragment(name, region, rank, name, 0, strides))
        source, destination = (Layout(tensors, *side) for side in sides)
        return source, destination

    def traffic(self) -> Traffic:
        """What any right plan moves: counted one matrix after the other."""
        size = itemsize(self.dtype)
        total: Traffic = Counter()
        for matrix in self.matrices():
            source = self.source_rank(matrix.layer, matrix.expert)
            destination = self.destination_rank(matrix.expert)
            total[source, destination] += matrix.shape[0] * matrix.shape[1] * size
        return total


def traffic_of(plan: Plan) -> Traffic:
    """What a plan of ours moves."""
    total: Traffic = Counter()
    for copy in plan.copies:
        elements = 1
        for extent in copy.extent:
            elements *= extent
        total[copy.source_rank, copy.destination_rank] += elements * itemsize(copy.source_dtype)
    return total
