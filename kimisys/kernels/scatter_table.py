"""Where the changed elements of a rank's blocks go, as tables of numbers for the kernel of
`scatter`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimisys.errors import LayoutError
from kimisys.kernels import elements
from kimisys.kernels.changes import Block
from kimisys.reshard import Copy, Plan, Region, itemsize


@dataclass(frozen=True)
class Target:
    """A part of a block that a plan copies to one place.

    Attributes:
        block: which one; region: its box of the tensor, box: the target's.
        tensor: index in the plan's source layout.
        copy: of the plan; byte_offset: of the box's corner in the destination's buffer.
    """

    block: int
    region: Region
    box: Region
    tensor: int
    copy: Copy
    byte_offset: int

    @property
    def itemsize(self) -> int:
        return itemsize(self.copy.destination_dtype)


def targets_of(plan: Plan, rank: int, blocks: Sequence[Block]) -> list[Target]:
    """Of all blocks of a source rank, in the order of the plan's copies.

    Raises:
        LayoutError: the plan casts.
    """
    own = [index for index, f in enumerate(plan.source.fragments) if f.rank == rank]
    by_fragment: dict[int, list[int]] = defaultdict(list)
    for number, (fragment, _) in enumerate(blocks):
        by_fragment[own[fragment]].append(number)
    tensors = {tensor.name: place for place, tensor in enumerate(plan.source.tensors)}
    targets = []
    for copy in plan.copies:
        if copy.source_rank != rank:
            continue
        if copy.source_dtype != copy.destination_dtype:
            raise LayoutError(
                f"tensor '{copy.tensor}' is published as {copy.source_dtype} and rank "
                f"{copy.destination_rank} holds {copy.destination_dtype}; changes are written as "
                "they are: publish in the dtype that is held"
            )
        for number in by_fragment[copy.source_fragment]:
            region = blocks[number][1]
            box = elements.intersection(copy.region, region)
            if box is None:
                continue
            corner = zip(box.offset, copy.region.offset, copy.destination_strides, strict=True)
            offset = copy.destination_offset + sum((o - c) * stride for o, c, stride in corner)
            targets.append(Target(number, region, box, tensors[copy.tensor], copy, offset))
    return targets


def make_rows(
    plan: Plan, targets: Sequence[Target], addresses: Mapping[tuple[int, str], int]
) -> npt.NDArray[np.int64]:
    """A row for each target, see scatter_kernel. addresses: of the destination's buffers.

    Raises:
        LayoutError: a device cannot write an element where it lies.
    """
    from kimisys.kernels import scatter_kernel as kernel

    axes = max([1, *(len(target.region.extent) for target in targets)])
    rows = np.zeros((len(targets), kernel.AXIS + axes * kernel.AXIS_COLUMNS), np.int64)
    for target, row in zip(targets, rows, strict=True):
        tensor, copy = plan.source.tensors[target.tensor], target.copy
        address = addresses[copy.destination_rank, copy.destination_buffer] + target.byte_offset
        fragment = plan.destination.fragments[copy.destination_fragment]
        # Along a dimension of one element nothing is moved; its stride may be anything.
        moved = [
            stride if n > 1 else 0
            for stride, n in zip(copy.destination_strides, target.box.extent, strict=True)
        ]
        *strides, _ = elements.in_elements([*moved, address], target.itemsize, fragment)
        row[kernel.ADDRESS] = address
        row[kernel.COUNTER] = elements.first_counter(tensor, target.box.offset)
        row[kernel.AXES] = len(strides)
        index = elements.index_strides(tensor)
        place = kernel.AXIS
        for d in reversed(range(len(strides))):
            extent = target.region.extent[d]
            row[place : place + kernel.AXIS_COLUMNS] = (
                extent, elements.magic(extent), target.box.offset[d] - target.region.offset[d],
                target.box.extent[d], strides[d], elements.counter_step(index[d]),
            )  # fmt: skip
            place += kernel.AXIS_COLUMNS
    return rows


def make_tiles(
    begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], tile: int
) -> npt.NDArray[np.int64]:
    """int64[tiles, 3]: (row, first position, end), of rows that have positions [begin, end)."""
    counts = -(-(ends - begins) // tile)
    rows = np.repeat(np.arange(len(begins)), counts)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = begins[rows] + number * tile
    return np.stack([rows, first, np.minimum(first + tile, ends[rows])], axis=1)
