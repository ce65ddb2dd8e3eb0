"""Which landed elements to sum, so that replicas are verified too and each sum is comparable.

A published digest counts every element of a tensor once. A destination with replicas holds some
elements more often. Its fragments are therefore summed in rounds: each round counts every element
of the tensors in it exactly once, and every replica is counted in at least one round. An element
with fewer replicas than another takes part in several rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from kimisys.errors import LayoutError
from kimisys.reshard import Fragment, Layout, Region

Box = tuple[tuple[int, int], ...]
"""[begin, end) in each dimension of the tensor."""


@dataclass(frozen=True)
class Round:
    """One exact cover of some tensors.

    Attributes:
        layout: the fragments of the round.
        names: the tensors that it covers.
    """

    layout: Layout
    names: tuple[str, ...]

    def of_rank(self, rank: int) -> Round:
        """The part of the cover that one rank sums; the names stay, as the sum is over ranks."""
        return Round(self.layout.of_rank(rank), self.names)


def element_counts(layout: Layout) -> Counter[str]:
    """Elements of each tensor in the layout's fragments, replicas counted again."""
    counts: Counter[str] = Counter()
    for fragment in layout.fragments:
        counts[fragment.tensor] += math.prod(fragment.region.extent)
    return counts


def incomplete(layout: Layout) -> dict[str, tuple[int, int]]:
    """Tensors of which the layout holds some elements but not all: name to (held, all)."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in layout.tensors}
    held = element_counts(layout.cover())
    return {name: (held[name], sizes[name]) for name in held if held[name] != sizes[name]}


def rounds(layout: Layout) -> list[Round]:
    """The rounds of a layout that holds its tensors whole; at least one.

    Raises:
        LayoutError: a tensor is held in part.
    """
    if parts := incomplete(layout):
        raise LayoutError(f"no exact cover of {', '.join(map(repr, parts))}: held only in part")
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in layout.tensors}
    counts = element_counts(layout)
    replicated: dict[str, list[Fragment]] = {
        name: [] for name in counts if counts[name] > sizes[name]
    }
    first: list[Fragment] = []
    for fragment in layout.fragments:
        if fragment.tensor in replicated:
            replicated[fragment.tensor].append(fragment)
        else:
            first.append(fragment)
    table = [(first, list(counts.keys() - replicated.keys()))]
    for name, fragments in replicated.items():
        for index, cover in enumerate(_covers(fragments)):
            if index == len(table):
                table.append(([], []))
            table[index][0].extend(cover)
            table[index][1].append(name)
    return [
        Round(Layout(layout.tensors, layout.buffers, counted), tuple(sorted(names)))
        for counted, names in table
    ]


def _covers(fragments: list[Fragment]) -> list[list[Fragment]]:
    """Exact covers of one tensor, by trimmed fragments, such that every fragment is wholly in their
    union."""
    covers: list[list[Fragment]] = []
    pending = fragments
    while pending:
        cover: list[Fragment] = []
        left: list[Fragment] = []
        for fragment in pending:
            box = _box(fragment.region)
            left += [
                _trimmed(fragment, common)
                for taken in cover
                if (common := _intersection(box, _box(taken.region))) is not None
            ]
            cover += _uncovered(fragment, cover)
        for fragment in fragments:  # counted before, but this cover lacks them
            cover += _uncovered(fragment, cover)
        covers.append(cover)
        pending = left
    return covers


def _uncovered(fragment: Fragment, cover: list[Fragment]) -> list[Fragment]:
    boxes = [_box(fragment.region)] if fragment.region.elements else []
    for taken in cover:
        hole = _box(taken.region)
        boxes = [rest for box in boxes for rest in _difference(box, hole)]
    return [_trimmed(fragment, box) for box in boxes]


def _box(region: Region) -> Box:
    pairs = zip(region.offset, region.extent, strict=True)
    return tuple((offset, offset + extent) for offset, extent in pairs)


def _intersection(one: Box, other: Box) -> Box | None:
    pairs = zip(one, other, strict=True)
    common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)
    return common if all(begin < end for begin, end in common) else None


def _difference(box: Box, hole: Box) -> list[Box]:
    """The part of a box outside another, as disjoint boxes."""
    common = _intersection(box, hole)
    if common is None:
        return [box]
    parts: list[Box] = []
    for axis, ((begin, end), (low, high)) in enumerate(zip(box, common, strict=True)):
        # Axes before this one are cut to the hole, axes after it keep their full length.
        for cut in ((begin, low), (high, end)):
            if cut[0] < cut[1]:
                parts.append((*common[:axis], cut, *box[axis + 1 :]))
    return parts


def _trimmed(fragment: Fragment, box: Box) -> Fragment:
    corner = [begin for begin, _ in box]
    shift = sum(
        (new - old) * stride
        for new, old, stride in zip(
            corner, fragment.region.offset, fragment.byte_strides, strict=True
        )
    )
    return Fragment(
        fragment.tensor,
        Region(corner, [end - begin for begin, end in box]),
        fragment.rank,
        fragment.buffer,
        fragment.byte_offset + shift,
        fragment.byte_strides,
    )
