"""Changed elements of a rank's snapshot by block: what `diff` leaves and `scatter` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.reshard import Region

Block = tuple[int, Region]
"""(index of the fragment in the snapshot's layout, the block's box of the tensor)."""


@dataclass(frozen=True)
class Changes:
    """Of a rank's snapshot.

    Attributes:
        positions: for each block uint32[n], ascending: places in the block, row-major.
        bits: for each block [n], the new bits: unsigned integers of the wire dtype's size.
        increments: uint64[tensors of the snapshot's layout]: what the digests of the elements that
            the rank counts grow by (csrc/broadcast/mix.h, mod 2^64).
    """

    positions: Sequence[npt.NDArray[np.uint32]]
    bits: Sequence[npt.NDArray[Any]]
    increments: npt.NDArray[np.uint64]
