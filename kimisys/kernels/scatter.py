"""Changed elements of a rank's blocks into strided tensors of a device, in place; on the CPU by
numpy.

``bind`` finds the places once; ``Bound.run`` writes what changed and nothing else, in one launch
for each element size. The kernel has not been run on a GPU: tests/gpu has its tests. Everything
else is tested with Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.kernels.changes import Block, Changes
from kimisys.kernels.elements import mixed
from kimisys.kernels.scatter_table import Target, targets_of
from kimisys.kernels.tensors import checked, one_device
from kimisys.reshard import Plan

Tensors: TypeAlias = Mapping[tuple[int, str], torch.Tensor]

FORCED = "KIMISYS_SCATTER_IMPLEMENTATION"
_REMEDY = "install triton, and unset TRITON_INTERPRET"


def implementations(device: torch.device | str = "cpu") -> list[str]:
    """Names for ``bind`` on tensors of this device, the default first: "triton" on a GPU, "numpy"
    on the CPU, and there "triton" too where Triton's interpreter is on."""
    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.device(device).type == "cuda":
        return ["triton"] if has_triton and not interpreted else []
    return ["numpy", "triton"] if has_triton and interpreted else ["numpy"]


class Bound(Protocol):
    """Destinations of one source rank's blocks, which it holds. Made by ``bind``."""

    def measure(self, changes: Changes) -> npt.NDArray[np.uint64]:
        """By how much ``run`` would change the digests, of every element that the destinations
        have, uint64[tensors of the plan's source]. Writes nothing."""

    def run(self, changes: Changes) -> int:
        """Writes what changed; returns how many elements. On a GPU it follows what is queued on
        the current stream, and waits for it."""
