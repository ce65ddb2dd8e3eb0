"""The launches of `diff`: its tables on the device, the kernels over them, what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels import diff_kernel as kernel
from kimisys.kernels.changes import Changes
from kimisys.kernels.diff_table import ALL, Block, Table
from kimisys.kernels.tensors import on
from kimisys.reshard import Layout

_UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Lists:
    """What `take` writes, on the device. positions: int32; bits: integers of the wire's width."""

    counts: npt.NDArray[np.int64]  # of each row
    positions: torch.Tensor
    bits: torch.Tensor
    increments: torch.Tensor  # int64, of each tile


@dataclass(frozen=True)
class Found:
    """Of one table, on the host. counts, increments: of each row; positions, bits: of all rows, one
    after another."""

    counts: npt.NDArray[np.int64]
    positions: npt.NDArray[np.uint32]
    bits: npt.NDArray[Any]
    increments: npt.NDArray[np.uint64]


class Launch:
    """One table on the device, and what its kernels need there beside the result: a byte for each
    word and 12 for each tile.

    A run is ``find``, ``allocate``, ``take``, ``found``, in this order, and the live weights keep
    still.
    """

    def __init__(self, table: Table, device: torch.device) -> None:
        self.table = table
        self._device = device
        self._rows, self._tiles, self._boxes = (
            # the boxes of no block would be a tensor without an address
            torch.from_numpy(part).to(device)
            for part in (table.rows, table.tiles, np.append(table.boxes, 0))
        )
        words = len(table.tiles) * (kernel.TILE // table.lanes)
        self._masks = torch.empty(words, dtype=torch.uint8, device=device)
        self._counts = torch.empty(len(table.tiles), dtype=torch.int32, device=device)
        self._ends = torch.empty(len(table.tiles), dtype=torch.int64, device=device)
        self._dtypes = _UNSIGNED[table.live_width], _UNSIGNED[table.wire_width]
        self._has_boxes = bool((table.rows[:, kernel.BOXES] != ALL).any())
        self._lists: _Lists | None = None

    def find(self) -> None:
        """Queues the comparison, which only reads."""
        lanes = self.table.lanes
        with on(self._device):
            kernel.find[self._grid](
                *self._blocks, self._masks, self._counts, *self._dtypes, lanes, kernel.TILE,
                min(kernel.WORDS, kernel.TILE // lanes), num_warps=4,
            )  # fmt: skip
            torch.cumsum(self._counts, 0, dtype=torch.int64, out=self._ends)

    def allocate(self) -> None:
        """Waits for the counts, and makes room for the rest."""
        counts = np.add.reduceat(self._counts.cpu().numpy(), self.table.first_tiles, dtype=np.int64)
        total = int(counts.sum())
        wide = _SIGNED[self.table.wire_width]
        self._lists = _Lists(
            counts,
            torch.empty(total, dtype=torch.int32, device=self._device),
            torch.empty(total, dtype=wide, device=self._device),
            torch.zeros(len(self.table.tiles), dtype=torch.int64, device=self._device),
        )

    def take(self) -> None:
        """Queues the lists of what changed and the update of the snapshot."""
        lists = self._lists
        assert lists is not None
        if len(lists.positions) == 0:
            return
        with on(self._device):
            kernel.list_positions[self._grid](
                *self._blocks, self._masks, self._ends, lists.positions, self.table.lanes,
                kernel.TILE, num_warps=4,
            )  # fmt: skip
            kernel.take[self._grid](
                *self._blocks, self._boxes, self._counts, self._ends, lists.positions, lists.bits,
                lists.increments, *self._dtypes, self._has_boxes, kernel.TAKEN, kernel.TILE,
                num_warps=4,
            )  # fmt: skip

    def found(self) -> Found:
        """Waits for what `take` queued, and brings it to the host."""
        lists, self._lists = self._lists, None
        assert lists is not None
        kept = [_to_host(part) for part in (lists.positions, lists.bits, lists.increments)]
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        positions, bits, increments = (part.numpy() for part in kept)
        return Found(
            lists.counts,
            positions.view(np.uint32),
            bits.view(f"u{self.table.wire_width}"),
            np.add.reduceat(increments.view(np.uint64), self.table.first_tiles),
        )

    @property
    def _grid(self) -> tuple[int]:
        return (len(self.table.tiles),)

    @property
    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self._rows, self._tiles, self._rows.shape[1]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queued, into page-locked memory; as it is where it is the host's."""
    if tensor.device.type == "cpu":
        return tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)


def find_changes(launches: Sequence[Launch], snapshot: Layout, blocks: Sequence[Block]) -> Changes:
    """Runs the launches that together have all blocks of the rank's snapshot."""
    for launch in launches:
        launch.find()
    for launch in launches:  # all memory is there before the snapshot changes
        launch.allocate()
    for launch in launches:
        launch.take()
    positions: list[npt.NDArray[np.uint32]] = [np.empty(0, np.uint32)] * len(blocks)
    bits: list[npt.NDArray[Any]] = [np.empty(0, np.uint8)] * len(blocks)
    places = {tensor.name: place for place, tensor in enumerate(snapshot.tensors)}
    tensors = np.array([places[snapshot.fragments[index].tensor] for index, _ in blocks], np.intp)
    increments = np.zeros(len(places), np.uint64)
    for launch in launches:
        found = launch.found()
        np.add.at(increments, tensors[launch.table.blocks], found.increments)
        ends = np.cumsum(found.counts)[:-1]
        for block, part, values in zip(launch.table.blocks, np.split(found.positions, ends),
                                       np.split(found.bits, ends), strict=True):  # fmt: skip
            positions[block], bits[block] = part, values
    return Changes(positions, bits, increments)
