"""The blocks of a rank's snapshot as tables of numbers for the kernels of `diff`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimisys.errors import LayoutError
from kimisys.kernels import elements
from kimisys.kernels.changes import Block
from kimisys.reshard import Fragment, Layout, Region, Tensor, itemsize

ALL = -1
"""So many boxes of a block count that counts whole."""

_WIDEST = 16  # bytes that one load of a device moves
_MOST_LANES = 8  # bits of a word's mask
_CASTS = {("float32", "bfloat16"), ("bfloat16", "float32")}


@dataclass(frozen=True)
class Table:
    """One launch: blocks whose dtypes are as wide, and whose elements lie as well aligned.

    Attributes:
        blocks: int64[n], which ones, ascending.
        rows: int64[n, columns], see diff_kernel.
        tiles: int32[tiles], the row of each tile.
        first_tiles: int64[n], the first tile of each row.
        boxes: int64[m], parts of blocks that the digest counts.
        live_width, wire_width: bytes of an element on the two sides.
        lanes: so many elements lie side by side, aligned, from every multiple of it on.
    """

    blocks: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int32]
    first_tiles: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]
    live_width: int
    wire_width: int
    lanes: int


@dataclass(frozen=True)
class _Axis:
    """Strides: in elements of each side; index: in elements of the whole tensor."""

    extent: int
    live: int
    snapshot: int
    index: int


@dataclass(frozen=True)
class _Row:
    """A block. boxes: those that count; None: all of it."""

    block: int
    addresses: tuple[int, int]
    region: Region
    tensor: Tensor
    axes: list[_Axis]
    boxes: list[Region] | None


def make_tables(
    live: Layout,
    snapshot: Layout,
    counted: Layout,
    blocks: Sequence[Block],
    live_addresses: Mapping[str, int],
    snapshot_address: int,
    tile: int,
) -> list[Table]:
    """The launches that compare these blocks.

    live, snapshot: layouts of one rank. counted: the elements of ``snapshot`` that this rank counts
    in digests. live_addresses: of the buffers, by name. tile: elements of one.

    Raises:
        LayoutError: a fragment of the snapshot has no live one of its region, its dtype is no cast
            of the live one's, or a device cannot read its elements where they lie.
    """
    sources = _paired(live, snapshot)
    counts = _counted_parts(snapshot, counted)
    wire = {tensor.name: tensor for tensor in snapshot.tensors}
    widths = {tensor.name: itemsize(tensor.dtype) for tensor in live.tensors}
    launches: dict[tuple[int, int, int], list[_Row]] = defaultdict(list)
    for number, (index, region) in enumerate(blocks):
        source, to = sources[index], snapshot.fragments[index]
        tensor = wire[to.tensor]
        width = widths[to.tensor], itemsize(tensor.dtype)
        addresses = (
            live_addresses[source.buffer] + elements.first_byte(source, region),
            snapshot_address + elements.first_byte(to, region),
        )
        parts = [elements.intersection(part, region) for part in counts[index]]
        boxes: list[Region] | None = [part for part in parts if part is not None]
        if sum(part.elements for part in boxes or []) == region.elements:
            boxes = None
        axes = _axes(tensor, region, source, to, addresses, width)
        if not boxes:  # a box is one of the axes as they are
            axes = _merged(axes)
        lanes = _lanes(axes, addresses, width)
        launches[*width, lanes].append(_Row(number, addresses, region, tensor, axes, boxes))
    return [_table(rows, *key, tile) for key, rows in sorted(launches.items())]


def _same(fragment: Fragment) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return fragment.tensor, tuple(fragment.region.offset), tuple(fragment.region.extent)


def _paired(live: Layout, snapshot: Layout) -> list[Fragment]:
    """The live fragment of each of the snapshot's: of equal regions, the k-th has the k-th."""
    by_region: dict[object, list[Fragment]] = defaultdict(list)
    for fragment in live.fragments:
        by_region[_same(fragment)].append(fragment)
    found = {region: iter(fragments) for region, fragments in by_region.items()}
    dtypes = {tensor.name: tensor.dtype for tensor in live.tensors}
    wire = {tensor.name: tensor.dtype for tensor in snapshot.tensors}
    pairs = []
    for fragment in snapshot.fragments:
        source = next(found.get(_same(fragment), iter(())), None)
        text = f"tensor '{fragment.tensor}' {fragment.region} of rank {fragment.rank}"
        if source is None:
            raise LayoutError(
                f"{text} is in the snapshot and not among the live fragments; make the snapshot's "
                "layout from the live one, with snapshot_layout"
            )
        cast = dtypes[fragment.tensor], wire[fragment.tensor]
        if cast[0] != cast[1] and cast not in _CASTS:
            raise LayoutError(
                f"{text} is {cast[0]} and published as {cast[1]}; only float32 and bfloat16 are "
                "cast: publish it in its own dtype"
            )
        pairs.append(source)
    return pairs


def _counted_parts(snapshot: Layout, counted: Layout) -> dict[int, list[Region]]:
    """For each fragment of the snapshot, the boxes of its tensor that count there: a counted
    fragment is a part of the one that has its memory."""
    fragments: dict[str, list[int]] = defaultdict(list)
    for index, fragment in enumerate(snapshot.fragments):
        fragments[fragment.tensor].append(index)
    parts: dict[int, list[Region]] = defaultdict(list)
    for part in counted.fragments:
        for index in fragments[part.tensor]:
            whole = snapshot.fragments[index]
            same = whole.byte_strides == part.byte_strides and whole.buffer == part.buffer
            inside = elements.intersection(whole.region, part.region) == part.region
            if same and inside and elements.first_byte(whole, part.region) == part.byte_offset:
                parts[index].append(part.region)
                break
        else:
            raise LayoutError(
                f"tensor '{part.tensor}' {part.region} counts in the digests of rank {part.rank} "
                "and is in no fragment of its snapshot; take snapshot.cover().of_rank(rank)"
            )
    return parts


def _axes(
    tensor: Tensor, region: Region, source: Fragment, to: Fragment,
    addresses: tuple[int, int], widths: tuple[int, int],
) -> list[_Axis]:  # fmt: skip
    """Outermost first, as the dimensions of the tensor."""
    dimensions = len(region.extent)
    # Along a dimension of one element nothing is moved; its stride may be anything.
    used = [n > 1 for n in region.extent]
    live, snapshot = (
        elements.in_elements(
            [*(stride if use else 0 for stride, use in zip(side.byte_strides, used, strict=True)),
             address], width, side,
        )
        for side, address, width in zip((source, to), addresses, widths, strict=True)
    )  # fmt: skip
    index = elements.index_strides(tensor)
    return [_Axis(region.extent[d], live[d], snapshot[d], index[d]) for d in range(dimensions)] or [
        _Axis(1, 0, 0, 0)
    ]


def _merged(axes: Iterable[_Axis]) -> list[_Axis]:
    """Neighbours as one axis where both sides and the index go on without a seam."""
    merged: list[_Axis] = []
    for axis in axes:
        if axis.extent == 1:
            continue
        if merged:
            last = merged[-1]
            strides = last.live, last.snapshot, last.index
            if strides == tuple(n * axis.extent for n in (axis.live, axis.snapshot, axis.index)):
                merged[-1] = _Axis(last.extent * axis.extent, axis.live, axis.snapshot, axis.index)
                continue
        merged.append(axis)
    return merged or [_Axis(1, 0, 0, 0)]


def _lanes(axes: Sequence[_Axis], addresses: tuple[int, int], widths: tuple[int, int]) -> int:
    """How many elements are a word: dense and aligned on both sides, and a divisor of each row."""
    lanes = min(_MOST_LANES, _WIDEST // max(widths))
    inner = axes[-1]
    fits = (
        inner.live == 1
        and inner.snapshot == 1
        and inner.extent % lanes == 0
        and all(axis.live % lanes == axis.snapshot % lanes == 0 for axis in axes[:-1])
        and all(a % (lanes * n) == 0 for a, n in zip(addresses, widths, strict=True))
    )
    return lanes if fits else 1


def _table(rows: Sequence[_Row], live_width: int, wire_width: int, lanes: int, tile: int) -> Table:
    from kimisys.kernels import diff_kernel as kernel

    axes = max(len(row.axes) for row in rows)
    numbers = np.zeros((len(rows), kernel.AXIS + axes * kernel.AXIS_COLUMNS), np.int64)
    boxes: list[int] = []
    for row, to in zip(rows, numbers, strict=True):
        to[kernel.LIVE], to[kernel.SNAPSHOT] = row.addresses
        to[kernel.ELEMENTS] = row.region.elements
        to[kernel.COUNTER] = elements.first_counter(row.tensor, row.region.offset)
        to[kernel.BOXES] = ALL if row.boxes is None else len(row.boxes)
        to[kernel.FIRST_BOX] = len(boxes)
        to[kernel.AXES] = len(row.axes)
        for place, axis in zip(range(kernel.AXIS, len(to), kernel.AXIS_COLUMNS),
                               reversed(row.axes), strict=False):  # fmt: skip
            to[place : place + kernel.AXIS_COLUMNS] = (
                axis.extent, elements.magic(axis.extent), axis.live, axis.snapshot,
                elements.counter_step(axis.index),
            )  # fmt: skip
        for box in row.boxes or []:
            sides = zip(box.offset, row.region.offset, box.extent, strict=True)
            boxes += [n for o, start, n in reversed(list(sides)) for n in (o - start, n)]
    counts = -(-numbers[:, kernel.ELEMENTS] // tile)
    numbers[:, kernel.FIRST_TILE] = first = np.cumsum(counts) - counts
    return Table(
        np.array([row.block for row in rows], np.int64), numbers,
        np.repeat(np.arange(len(rows), dtype=np.int32), counts), first,
        np.array(boxes, np.int64), live_width, wire_width, lanes,
    )  # fmt: skip
