"""A plan's strided copies on a device, all in one launch; on the CPU by the C++ executor.

``bind`` checks the tensors and builds the table of the copies once, on the device; ``Bound.run``
launches one kernel over it. Copies are cut into tiles of about equal cost, so thousands of small
ones keep a device as busy as one large one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kimisys._core.reshard import copy_table
from kimisys.kernels.tensors import (
    Tensors,
    arrays,
    check_contiguous,
    chosen,
    on,
    one_device,
    with_triton,
)
from kimisys.reshard import Plan
from kimisys.reshard import implementations as on_cpu

FORCED = "KIMISYS_STRIDED_COPY_IMPLEMENTATION"


def implementations(device: torch.device | str = "cpu") -> list[str]:
    """Names for ``bind`` on tensors of this device, the default first.

    "triton" on a GPU; on the CPU those of ``kimisys.reshard``. Where Triton's interpreter is on
    (``TRITON_INTERPRET=1`` when Triton is imported), "triton" is for the CPU instead.
    """
    return with_triton(on_cpu(), device)


class Bound:
    """A plan on its tensors, which it holds. Made by ``bind``."""

    def __init__(self, plan: Plan, implementation: str, run: Callable[[], None]) -> None:
        self._about = f"{plan.proof.copies} copies, {plan.nbytes} bytes, by {implementation}"
        self._run = run

    def run(self) -> None:
        """Fills the destinations; of a share, the bytes that are its own.

        On a GPU it is queued on the current stream, as torch's own operations are. Not twice at
        once: both would write the same memory.
        """
        self._run()

    def __repr__(self) -> str:
        return f"Bound({self._about})"


def bind(
    plan: Plan, sources: Tensors, destinations: Tensors, implementation: str | None = None
) -> Bound:
    """Checks a plan's tensors and prepares its copies, to run again and again.

    sources, destinations: from (rank, buffer name) to a contiguous tensor of any dtype and of
    exactly the layout's bytes, all on one device; tensors that the plan does not touch may be
    absent. implementation: one of ``implementations``; the environment variable
    KIMISYS_STRIDED_COPY_IMPLEMENTATION forces one where there is no argument.

    Raises:
        BufferMismatchError: a tensor is missing, not contiguous, of another size, on another
            device, or a destination overlaps another tensor. Nothing has been written then.
        LayoutError: the device has no such implementation, or none at all.
    """
    device = one_device(source=sources, destination=destinations)
    name = chosen("strided copy", implementation, FORCED, implementations(device), device)
    check_contiguous(sources, "source")
    check_contiguous(destinations, "destination")
    if name == "triton":
        return Bound(plan, name, _launch(plan, sources, destinations, device))
    # Unless one was asked for, kimisys.reshard decides, which has a variable of its own.
    asked = name if implementation or os.environ.get(FORCED) else None
    execution = plan.bind(arrays(sources), arrays(destinations), implementation=asked)
    return Bound(plan, asked or "kimisys.reshard", execution.run)


def _addresses(tensors: Tensors) -> dict[tuple[int, str], tuple[int, int]]:
    return {key: (tensor.data_ptr(), tensor.nbytes) for key, tensor in tensors.items()}


def _launch(
    plan: Plan, sources: Tensors, destinations: Tensors, device: torch.device
) -> Callable[[], None]:
    """The call that launches the kernel over the plan's table, which is on the device by now."""
    from kimisys.kernels import strided_copy_kernel as kernel

    table = copy_table(plan, _addresses(sources), _addresses(destinations))
    rows, tiles, words = _tiled(table, kernel.BLOCK, kernel.BLOCKS)
    held = (dict(sources), dict(destinations))  # the table has only their addresses
    on_device = torch.from_numpy(rows).to(device), torch.from_numpy(tiles).to(device)

    def run() -> None:
        assert held
        if len(tiles) == 0:
            return
        with on(device):
            kernel.strided_copy[(len(tiles),)](
                *on_device, rows.shape[1], words, kernel.BLOCK, kernel.BLOCKS, num_warps=4
            )

    return run


def _tiled(
    table: npt.NDArray[np.int64], block: int, blocks: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]:
    """The table's rows without the columns of axes that none has, and with the number of their
    first tile; the row of each tile; and the words that occur, as bits."""
    from kimisys.kernels import strided_copy_kernel as kernel

    words = table[:, kernel.WORD]
    per_tile = block * np.asarray(blocks, np.int64)[words]
    counts = -(-table[:, kernel.WORDS] // per_tile)
    axes = max(1, int(table[:, kernel.AXES].max(initial=0)))
    rows = table[:, : kernel.AXIS + axes * kernel.AXIS_COLUMNS].copy()
    rows[:, kernel.FIRST_TILE] = np.cumsum(counts) - counts
    tiles = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    return rows, tiles, int(np.bitwise_or.reduce(1 << words, initial=0))
