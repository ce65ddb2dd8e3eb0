"""The launches of `scatter`: one for each element size, over the targets that have changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels import scatter_kernel as kernel
from kimisys.kernels.changes import Changes
from kimisys.kernels.scatter_table import Target, make_rows, make_tiles
from kimisys.kernels.tensors import Tensors, on
from kimisys.reshard import Plan

_UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


class Triton:
    """Targets of a device, whose tensors it holds, as tables there."""

    def __init__(
        self, plan: Plan, targets: Sequence[Target], destinations: Tensors, device: torch.device
    ) -> None:
        self._device = device
        self._held = destinations  # the tables have only their addresses
        self._tensors = len(plan.source.tensors)
        addresses = {key: tensor.data_ptr() for key, tensor in destinations.items()}
        self._launches = [
            _Launch(plan, [t for t in targets if t.itemsize == width], addresses, width, device)
            for width in sorted({target.itemsize for target in targets})
        ]

    def measure(self, changes: Changes) -> npt.NDArray[np.uint64]:
        sums = np.zeros(self._tensors, np.uint64)
        for launch in self._launches:
            tensors, increments, _ = launch.run(changes, write=False)
            np.add.at(sums, tensors, increments)
        return sums

    def run(self, changes: Changes) -> int:
        return sum(int(launch.run(changes, write=True)[2].sum()) for launch in self._launches)


class _Launch:
    """The targets of one element size."""

    def __init__(
        self, plan: Plan, targets: Sequence[Target], addresses: dict[tuple[int, str], int],
        width: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._device, self._width = device, width
        self._rows = torch.from_numpy(make_rows(plan, targets, addresses)).to(device)
        self._tensor = np.array([target.tensor for target in targets], np.intp)
        self._blocks, self._block = np.unique([t.block for t in targets], return_inverse=True)

    def run(
        self, changes: Changes, write: bool
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """For each tile: its tensor, the increment, and how many elements it has or wrote."""
        parts = [changes.positions[block] for block in self._blocks]
        ends = np.cumsum([len(part) for part in parts])
        begins = ends - np.array([len(part) for part in parts])
        tiles = make_tiles(begins[self._block], ends[self._block], kernel.TILE)
        increments = torch.zeros(len(tiles), dtype=torch.int64, device=self._device)
        written = torch.zeros(len(tiles), dtype=torch.int32, device=self._device)
        if len(tiles):
            # Triton's integers are as wide as torch's signed ones, of which there are all sizes.
            bits = np.concatenate([changes.bits[block] for block in self._blocks])
            sent = (tiles, np.concatenate(parts).view(np.int32), bits.view(f"i{self._width}"))
            there, positions, values = (torch.from_numpy(p).to(self._device) for p in sent)
            with on(self._device):
                kernel.scatter[(len(tiles),)](
                    self._rows, there, self._rows.shape[1], positions, values, increments, written,
                    _UNSIGNED[self._width], write, kernel.TILE, num_warps=4,
                )  # fmt: skip
        return (
            self._tensor[tiles[:, kernel.ROW]],
            increments.cpu().numpy().view(np.uint64),
            written.cpu().numpy(),
        )
