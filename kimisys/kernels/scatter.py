"""Changed elements of a rank's blocks into strided tensors of a device, in place; on the CPU by
numpy.

``bind`` finds the places once; ``Bound.run`` writes what changed and nothing else, in one launch
for each element size. The kernel has not been run on a GPU, where tests/gpu would test and measure
it; it is tested in Triton's interpreter and compiled for Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kimisys.errors import LayoutError
from kimisys.kernels.changes import Block, Changes
from kimisys.kernels.scatter_numpy import Numpy
from kimisys.kernels.scatter_table import targets_of
from kimisys.kernels.tensors import (
    Tensors,
    arrays,
    check_apart,
    chosen,
    needed,
    one_device,
    with_triton,
)
from kimisys.reshard import Plan

FORCED = "KIMISYS_SCATTER_IMPLEMENTATION"


def implementations(device: torch.device | str = "cpu") -> list[str]:
    """Names for ``bind`` on tensors of this device, the default first: "triton" on a GPU, "numpy"
    on the CPU, and "triton" there too where Triton's interpreter is on."""
    return with_triton(["numpy"], device)


class Bound(Protocol):
    """The places of a source rank's blocks in destinations, which it holds. Made by ``bind``."""

    def measure(self, changes: Changes) -> npt.NDArray[np.uint64]:
        """By how much ``run`` would change the digests of all elements that the destinations have:
        uint64[tensors of the plan's source], mod 2^64. Nothing is written."""
        ...

    def run(self, changes: Changes) -> int:
        """Writes the changed elements; returns how many they are.

        On a GPU both follow what is queued on the current stream, and wait for it.
        """
        ...


def bind(
    plan: Plan,
    rank: int,
    blocks: Sequence[Block],
    destinations: Tensors,
    implementation: str | None = None,
) -> Bound:
    """Checks the destinations, and finds the places of a rank's blocks in them.

    Args:
        plan: from the snapshots to the destinations, without casts.
        rank: the source rank whose changes are written.
        blocks: of its snapshot, in the order in which changes come; ``changes.blocks_of``.
        destinations: from (rank, buffer name) to a contiguous tensor of any dtype and of exactly
            the layout's bytes, all on one device.
        implementation: one of ``implementations``; the environment variable
            KIMISYS_SCATTER_IMPLEMENTATION forces one where there is no argument.

    Raises:
        BufferMismatchError: a destination is missing, not contiguous, of another size, on another
            device, or overlaps another one.
        LayoutError: the plan casts, the device has no such implementation, or an element does not
            lie at a multiple of its size.
    """
    device = one_device(destination=destinations)
    name = chosen("scatter", implementation, FORCED, implementations(device), device)
    if plan.share_of is not None and plan.share_of != rank:
        raise LayoutError(
            f"the plan is the share of rank {plan.share_of} and the changes are of rank {rank}; "
            "take a plan of all source ranks, or of this one"
        )
    targets = targets_of(plan, rank, blocks)
    used = {(target.copy.destination_rank, target.copy.destination_buffer) for target in targets}
    buffers = [b for b in plan.destination.buffers if (b.rank, b.name) in used]
    tensors = needed(buffers, destinations, "destination")
    check_apart(tensors, {}, "destinations")
    if name == "numpy":
        return Numpy(plan, targets, arrays(tensors))
    from kimisys.kernels.scatter_launch import Triton

    return Triton(plan, targets, tensors, device)
