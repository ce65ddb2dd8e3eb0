"""`scatter` on the CPU, spelled out with numpy: what the kernel is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.kernels import elements
from kimisys.kernels.changes import Changes
from kimisys.kernels.scatter_table import Target
from kimisys.reshard import Plan

Places = tuple[npt.NDArray[np.intp], ...]


class Numpy:
    """Targets and the bytes of the destinations, which it holds."""

    def __init__(
        self,
        plan: Plan,
        targets: Sequence[Target],
        destinations: Mapping[tuple[int, str], npt.NDArray[np.uint8]],
    ) -> None:
        self._plan, self._targets, self._destinations = plan, targets, destinations

    def measure(self, changes: Changes) -> npt.NDArray[np.uint64]:
        increments = np.zeros(len(self._plan.source.tensors), np.uint64)
        for target, view, at, bits in self._landings(changes):
            tensor = self._plan.source.tensors[target.tensor]
            index = np.zeros(len(bits), np.uint64)
            # not strict: the one place of a scalar has no dimension
            for stride, start, place in zip(
                elements.index_strides(tensor), target.box.offset, at, strict=False
            ):
                index += np.uint64(stride) * (np.uint64(start) + place.astype(np.uint64))
            counters = elements.counters(tensor, index)
            change = elements.mixed(counters, bits) - elements.mixed(counters, view[at])
            increments[target.tensor : target.tensor + 1] += change.sum(dtype=np.uint64)
        return increments

    def run(self, changes: Changes) -> int:
        written = 0
        for _, view, at, bits in self._landings(changes):
            view[at] = bits
            written += len(bits)
        return written

    def _landings(
        self, changes: Changes
    ) -> Iterator[tuple[Target, npt.NDArray[Any], Places, npt.NDArray[Any]]]:
        """For each target with changes: its box in the destination, places in the box, bits."""
        for target in self._targets:
            positions, bits = changes.positions[target.block], changes.bits[target.block]
            if len(positions) == 0:
                continue
            copy, region, box = target.copy, target.region, target.box
            # (extent of the block, first and extent of the box in it, stride); one for a scalar
            axes = [
                (n, o - start, size, stride)
                for n, start, o, size, stride in zip(
                    region.extent, region.offset, box.offset, box.extent,
                    copy.destination_strides, strict=True,
                )
            ] or [(1, 0, 1, 0)]  # fmt: skip
            at = np.unravel_index(positions, [n for n, *_ in axes])
            moved = [place - first for place, (_, first, _, _) in zip(at, axes, strict=True)]
            inside = np.ones(len(positions), bool)
            for place, (_, _, size, _) in zip(moved, axes, strict=True):
                inside &= (place >= 0) & (place < size)
            view: npt.NDArray[Any] = np.ndarray(
                [size for _, _, size, _ in axes], bits.dtype,
                self._destinations[copy.destination_rank, copy.destination_buffer],
                target.byte_offset, [stride for *_, stride in axes],
            )  # fmt: skip
            yield target, view, tuple(place[inside] for place in moved), bits[inside]
