"""Routed experts placed on ranks: the one placement that every planner here is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from kimisys.reshard import Buffer, Layout, Plan, Tensor, itemsize

Traffic = Counter[tuple[int, int]]
"""Bytes by (source rank, destination rank)."""


class Piece(NamedTuple):
    """What one rank holds of one tensor. expert: whose tensor it is; None where all are stacked."""

    tensor: str
    shape: tuple[int, ...]
    layer: int
    expert: int | None
    rank: int
    offset: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass(frozen=True)
class ExpertPlacement:
    """Mixture-of-experts layers whose experts go from expert x pipeline ranks to expert ranks.

    Source rank `stage * source_expert_ranks + expert rank` holds whole experts of its stage's
    layers; the destination has one stage. Kimi-K2's numbers are the defaults: 69,120 copies with a
    tensor for each matrix of each expert, 5,760 with the experts `stacked` along a first axis.
    """

    layers: int = 60
    experts: int = 384
    hidden: int = 7168
    width: int = 2048
    source_expert_ranks: int = 16
    source_stages: int = 8
    destination_ranks: int = 32
    stacked: bool = False
    dtype: str = "bfloat16"

    @property
    def source_ranks(self) -> int:
        """How many ranks the source has."""
        return self.source_expert_ranks * self.source_stages

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """An expert's matrices by name, with their shapes."""
        up, down = (self.width, self.hidden), (self.hidden, self.width)
        return {"gate_proj": up, "up_proj": up, "down_proj": down}

    @property
    def copies(self) -> int:
        """How many copies any right plan has, no piece being cut."""
        ranks = max(self.source_expert_ranks, self.destination_ranks)
        return self.layers * len(self.matrices) * (ranks if self.stacked else self.experts)

    def stage(self, layer: int) -> int:
        """The pipeline stage of a layer; where layers do not divide, stages differ by one."""
        return layer * self.source_stages // self.layers

    def source(self) -> Iterator[Piece]:
        """What the source's ranks hold."""
        for layer in range(self.layers):
            first = self.stage(layer) * self.source_expert_ranks
            yield from self._pieces(layer, first, self.source_expert_ranks)

    def destination(self) -> Iterator[Piece]:
        """What the destination's ranks want."""
        for layer in range(self.layers):
            yield from self._pieces(layer, 0, self.destination_ranks)

    def _pieces(self, layer: int, first: int, ranks: int) -> Iterator[Piece]:
        held = self.experts // ranks
        for kind, shape in self.matrices.items():
            names = self._names(layer, kind)
            if self.stacked:
                all_ = (self.experts, *shape)
                for rank in range(ranks):
                    box = (rank * held, 0, 0), (held, *shape)
                    yield Piece(names[0], all_, layer, None, first + rank, *box)
            else:
                for expert, name in enumerate(names):
                    rank = first + expert // held
                    yield Piece(name, shape, layer, expert, rank, (0, 0), shape)

    def _names(self, layer: int, kind: str) -> list[str]:
        """A matrix of all experts of a layer: one tensor where they are stacked."""
        prefix = f"model.layers.{layer}.mlp.experts"
        if self.stacked:
            return [f"{prefix}.{kind}"]
        return [f"{prefix}.{expert}.{kind}.weight" for expert in range(self.experts)]

    def layouts(self) -> tuple[Layout, Layout]:
        """The source and the destination for `kimisys.reshard.plan`."""
        first = [self.stage(layer) * self.source_expert_ranks for layer in range(self.layers)]
        return (
            self._layout(first, self.source_expert_ranks),
            self._layout([0] * self.layers, self.destination_ranks),
        )

    def _layout(self, first: list[int], ranks: int) -> Layout:
        """The pieces of one side as columns, as an adapter gives many; each has a dense buffer.
        first: of each layer, the rank that holds expert 0."""
        size, held = itemsize(self.dtype), self.experts // ranks
        shapes = list(self.matrices.values())
        pieces = ranks if self.stacked else self.experts  # of each matrix of a layer
        tensors = [
            Tensor(name, self.dtype, (self.experts, *shape) if self.stacked else shape)
            for layer in range(self.layers)
            for kind, shape in self.matrices.items()
            for name in self._names(layer, kind)
        ]
        names = [tensor.name for tensor in tensors]
        number = np.arange(self.layers * len(shapes) * pieces)
        tensor = number // pieces if self.stacked else number
        owner = number % pieces // (1 if self.stacked else held)
        rank = np.repeat(first, len(shapes) * pieces) + owner
        boxes = [(held, *shape) if self.stacked else shape for shape in shapes]
        extent = np.repeat(np.tile(boxes, (self.layers, 1)), pieces, axis=0)
        offset = np.zeros_like(extent)
        if self.stacked:
            offset[:, 0] = owner * held
        strides = np.full_like(extent, size)
        strides[:, :-1] *= np.cumprod(extent[:, :0:-1], axis=1)[:, ::-1]
        nbytes = strides[:, 0] * extent[:, 0]
        rows = zip(rank.tolist(), tensor.tolist(), nbytes.tolist(), strict=True)
        return Layout.from_arrays(
            tensors, [Buffer(r, names[t], n) for r, t, n in rows], tensor, number, offset, extent,
            np.zeros_like(number), strides,
        )  # fmt: skip

    def traffic(self) -> Traffic:
        """What any right plan moves: counted one expert after the other."""
        total: Traffic = Counter()
        nbytes = itemsize(self.dtype) * sum(map(prod, self.matrices.values()))
        for layer in range(self.layers):
            for expert in range(self.experts):
                owner = expert * self.source_expert_ranks // self.experts
                source = self.stage(layer) * self.source_expert_ranks + owner
                total[source, expert * self.destination_ranks // self.experts] += nbytes
        return total


def traffic_of(plan: Plan) -> Traffic:
    """What a plan of ours moves."""
    total: Traffic = Counter()
    for copy in plan.copies:
        nbytes = prod(copy.extent) * itemsize(copy.source_dtype)
        total[copy.source_rank, copy.destination_rank] += nbytes
    return total
