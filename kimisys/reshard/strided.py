"""Strided index sets as boxes: the arithmetic under the tracer. Pure integers, no tensors.

A `Piece` is an N-d index set seen from several flat storages at once: index (i_0, ..., i_n) stands
at `offset + sum(i_k * stride_k)` of each. `boxes` cuts a piece until, on every side whose shape is
given, each dimension of the piece runs along exactly one axis of that shape in steps of one: then
the piece is a box there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

MAX_PIECES = 1 << 20


@dataclass(frozen=True)
class Side:
    """One storage's view of a piece: `offset` and one stride per dimension, in elements."""

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """An index set of `sizes`, seen from each of `sides`."""

    sizes: tuple[int, ...]
    sides: tuple[Side, ...]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of `shape`, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def unravel(offset: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of flat element `offset` in a row-major tensor of `shape`."""
    return tuple(
        offset // stride % extent
        for stride, extent in zip(contiguous_strides(shape), shape, strict=True)
    )


def axis_of(stride: int, shape: Sequence[int]) -> tuple[int, int]:
    """The axis along which a step of `stride` elements runs, and its length in coordinates.

    (-1, 0) when no axis does: a broadcast (stride 0) or a diagonal step.
    """
    strides = contiguous_strides(shape)
    for axis, (own, extent) in enumerate(zip(strides, shape, strict=True)):
        if extent > 1 and 0 < own <= stride:
            return (axis, stride // own) if stride % own == 0 else (-1, 0)
    return -1, 0


def boxes(piece: Piece, shapes: Sequence[Sequence[int] | None]) -> Iterator[Piece]:
    """Cut `piece` into pieces that are boxes on every side with a shape (None: any strides will
    do).

    Together they hold each index of `piece` once. Raises ValueError past MAX_PIECES.
    """
    if 0 in piece.sizes:
        return
    pending, made = [_squeeze(piece)], 0
    while pending:
        current = _merge(pending.pop(), shapes)
        cut = _first_cut(current, shapes)
        if cut is None:
            made += 1
            yield current
        else:
            pending.extend(reversed(cut))
        if made + len(pending) > MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES} boxes are needed for {piece.sizes}")


def _squeeze(piece: Piece) -> Piece:
    keep = [d for d, size in enumerate(piece.sizes) if size != 1]
    return Piece(
        tuple(piece.sizes[d] for d in keep),
        tuple(Side(s.offset, tuple(s.strides[d] for d in keep)) for s in piece.sides),
    )


def _merge(piece: Piece, shapes: Sequence[Sequence[int] | None]) -> Piece:
    """Join neighbouring dimensions that are one run on every side, and one axis where there are
    axes."""
    sizes, sides = list(piece.sizes), [list(s.strides) for s in piece.sides]

    def one_run(strides: list[int], shape: Sequence[int] | None, d: int) -> bool:
        outer, inner = strides[d], strides[d + 1]
        if inner <= 0 or outer != inner * sizes[d + 1]:
            return False
        return shape is None or axis_of(outer, shape)[0] == axis_of(inner, shape)[0]

    for d in reversed(range(len(sizes) - 1)):
        if all(one_run(s, shape, d) for s, shape in zip(sides, shapes, strict=True)):
            sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
            for s in sides:
                del s[d]
    merged = (Side(side.offset, tuple(s)) for side, s in zip(piece.sides, sides, strict=True))
    return Piece(tuple(sizes), tuple(merged))


def _first_cut(piece: Piece, shapes: Sequence[Sequence[int] | None]) -> list[Piece] | None:
    """What to cut `piece` into because some side is not a box yet; None when all are."""
    for side, shape in zip(piece.sides, shapes, strict=True):
        if shape is None:
            continue
        cut = _cut_at_axes(piece, side, shape) or _cut_shared_axis(piece, side, shape)
        if cut is not None:
            return cut
    return None


def _cut_at_axes(piece: Piece, side: Side, shape: Sequence[int]) -> list[Piece] | None:
    """Cut where a dimension leaves the axis it runs along."""
    start = unravel(side.offset, shape)
    mapped = [axis_of(stride, shape) for stride in side.strides]
    reach = [0] * len(shape)
    for (axis, step), size in zip(mapped, piece.sizes, strict=True):
        if axis >= 0:
            reach[axis] += (size - 1) * step
    for d, (axis, step) in enumerate(mapped):
        if axis < 0:
            return _unroll(piece, d)
        room = shape[axis] - 1 - start[axis]
        if reach[axis] <= room or step < max(s for a, s in mapped if a == axis):
            continue
        others = reach[axis] - (piece.sizes[d] - 1) * step
        per_axis, ragged = divmod(shape[axis], step)
        aligned = start[axis] + others < step and not ragged
        if aligned and piece.sizes[d] % per_axis == 0:
            return [_split(piece, d, per_axis)]
        first = (room - others) // step + 1 if room >= others else 1
        if aligned and piece.sizes[d] > per_axis:
            first = piece.sizes[d] // per_axis * per_axis
        return _divide(piece, d, min(first, piece.sizes[d] - 1))
    return None


def _cut_shared_axis(piece: Piece, side: Side, shape: Sequence[int]) -> list[Piece] | None:
    """Unroll a dimension that shares its axis with a finer one, or walks it in longer steps."""
    owner: dict[int, int] = {}
    mapped = [axis_of(stride, shape) for stride in side.strides]
    for d, (axis, step) in enumerate(mapped):
        if step != 1:
            return _unroll(piece, d)
        if axis in owner:
            return _unroll(piece, owner[axis])
        owner[axis] = d
    return None


def _split(piece: Piece, d: int, inner: int) -> Piece:
    """Dimension `d` as two: its size over `inner`, and `inner`."""
    sizes = (*piece.sizes[:d], piece.sizes[d] // inner, inner, *piece.sizes[d + 1 :])
    sides = tuple(
        replace(s, strides=(*s.strides[:d], s.strides[d] * inner, *s.strides[d:]))
        for s in piece.sides
    )
    return Piece(sizes, sides)


def _divide(piece: Piece, d: int, first: int) -> list[Piece]:
    """The piece as two along dimension `d`: its first `first` indices, and the rest."""
    head = replace(piece, sizes=(*piece.sizes[:d], first, *piece.sizes[d + 1 :]))
    rest = Piece(
        (*piece.sizes[:d], piece.sizes[d] - first, *piece.sizes[d + 1 :]),
        tuple(replace(s, offset=s.offset + first * s.strides[d]) for s in piece.sides),
    )
    return [_squeeze(head), _squeeze(rest)]


def _unroll(piece: Piece, d: int) -> list[Piece]:
    """One piece for each index of dimension `d`."""
    if piece.sizes[d] > MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} boxes are needed for {piece.sizes}")
    return [
        Piece(
            piece.sizes[:d] + piece.sizes[d + 1 :],
            tuple(
                Side(s.offset + i * s.strides[d], s.strides[:d] + s.strides[d + 1 :])
                for s in piece.sides
            ),
        )
        for i in range(piece.sizes[d])
    ]
