"""Pieces of a model, of each kind one, as the blocks of a symbolic layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kimisys.adapters.megatron.families.part import Part, tensors_of
from kimisys.adapters.megatron.rules import Holding, TracedPart
from kimisys.adapters.megatron.seats import Seat
from kimisys.adapters.megatron.stages import Chunk
from kimisys.errors import LayoutError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    SymbolicLayout,
    Tensor,
)

Share = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """What a rank of some share holds of one occurrence of a part, and the bytes of each of its
    parameters."""

    holding: Holding
    nbytes: Mapping[str, int]


Pieces = Mapping[str, Mapping[tuple[bool, Share], Piece]]
"""{part: {(at the last of several stages, share): what a rank there holds}}; a share that holds
nothing of a part is left out."""


@dataclass
class _Lists:
    """A layout in the making."""

    buffers: list[Buffer] = field(default_factory=list)
    fragments: list[Fragment] = field(default_factory=list)
    padding: list[Padding] = field(default_factory=list)

    def add(self, piece: Piece, traced: TracedPart, rank: int, name: str, buffer: str) -> None:
        """A rank's piece: tensors are called `name` and their own name, buffers `buffer` and what
        follows the layer in Megatron's."""
        layer = f"decoder.layers.{piece.holding.label}." if piece.holding.label else ""
        own: dict[str, str] = {}
        for shard in piece.holding.shards:
            if not shard.name.startswith(layer):
                raise LayoutError(
                    f"parameter {shard.name!r} of {shard.key!r} is not where a layer's is: "
                    f"below {layer!r}"
                )
            own[shard.name] = buffer + shard.name.removeprefix(layer)
            self.fragments += [
                Fragment(
                    name + m.name, m.region, rank, own[m.parameter], m.byte_offset, m.byte_strides
                )
                for m in traced.meet(shard)
            ]
            if (rows := traced.padding(shard)) is not None:
                self.padding.append(Padding(rank, own[shard.name], *rows))
        self.buffers += [Buffer(rank, named, piece.nbytes[n]) for n, named in own.items()]

    def layout(self, tensors: Sequence[Tensor]) -> Layout:
        return Layout(tensors, self.buffers, self.fragments, self.padding)


def assemble(
    parts: Sequence[Part],
    everyone: Sequence[Seat],
    chunks: Sequence[Chunk],
    pieces: Pieces,
    dtype: str,
) -> SymbolicLayout:
    """One block for what occurs once, "outer", and one for each kind of layer.

    everyone: the seat of each rank. chunks: those of all stages. dtype: of what no rank holds.
    """
    traced = {
        name: TracedPart(piece.holding.part, piece.holding.shards)
        for name, own in pieces.items()
        for piece in [next(iter(own.values()))]
    }
    missing = [part.name for part in parts if part.name not in traced]
    if missing:
        raise LayoutError(f"no rank holds anything of {', '.join(missing)}")
    parts = [replace(part, dtypes=traced[part.name].dtypes) for part in parts]
    ranks_of: dict[int, list[int]] = {}
    for rank, seat in enumerate(everyone):
        ranks_of.setdefault(seat.stage, []).append(rank)
    outer = [part for part in parts if not part.layers]
    blocks = [_outer(outer, everyone, ranks_of, chunks, pieces, traced, dtype)]
    for part in parts:
        if part.layers:
            blocks += _layers(part, everyone, ranks_of, chunks, pieces, traced[part.name], dtype)
    return SymbolicLayout(blocks)


def _outer(
    parts: Sequence[Part],
    everyone: Sequence[Seat],
    ranks_of: Mapping[int, Sequence[int]],
    chunks: Sequence[Chunk],
    pieces: Pieces,
    traced: Mapping[str, TracedPart],
    dtype: str,
) -> Block:
    lists, last = _Lists(), max(ranks_of)
    prefixes = {
        chunk.last and chunk.stage > 0: chunk.prefix
        for chunk in chunks
        if chunk.first or chunk.last
    }
    ranks = [rank for stage in sorted({0, last}) for rank in ranks_of[stage]]
    for local, rank in enumerate(ranks):
        seat = everyone[rank]
        end = seat.stage > 0
        for part in parts:
            piece = pieces[part.name].get((end, seat.share))
            if piece is not None:
                lists.add(piece, traced[part.name], local, part.hf_prefix, prefixes[end])
    return Block(lists.layout(tensors_of(parts, dtype)), [Instance("", ranks)])


def _layers(
    part: Part,
    everyone: Sequence[Seat],
    ranks_of: Mapping[int, Sequence[int]],
    chunks: Sequence[Chunk],
    pieces: Pieces,
    traced: TracedPart,
    dtype: str,
) -> list[Block]:
    """Stages whose ranks hold the same shares, in order, share a block: in practice all."""
    numbers = set(part.layers)
    instances: dict[tuple[Share, ...], list[Instance]] = {}
    for chunk in chunks:
        shares = tuple(everyone[rank].share for rank in ranks_of[chunk.stage])
        instances.setdefault(shares, []).extend(
            Instance(str(layer), ranks_of[chunk.stage], f"{chunk.prefix}decoder.layers.{place}")
            for place, layer in enumerate(chunk.layers)
            if layer in numbers
        )
    blocks = []
    for shares, own in instances.items():
        lists = _Lists()
        for local, share in enumerate(shares):
            lists.add(pieces[part.name][False, share], traced, local, part.hf_prefix, "{}.")
        if own:
            blocks.append(Block(lists.layout(part.tensors("{}", dtype)), own))
    return blocks
