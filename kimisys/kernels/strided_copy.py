"""A plan's strided copies on a device, all in one launch; on the CPU by the C++ executor.

``bind`` checks the tensors and builds the table of the copies once, on the device; ``Bound.run``
launches one kernel over it. Copies are cut into tiles of about equal cost, so thousands of small
ones keep a device as busy as one large one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kimisys._core.reshard import copy_table
from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.reshard import Plan
from kimisys.reshard import implementations as on_cpu

Tensors: TypeAlias = Mapping[tuple[int, str], torch.Tensor]

FORCED = "KIMISYS_STRIDED_COPY_IMPLEMENTATION"
_REMEDY = "install triton, and unset TRITON_INTERPRET"


def implementations(device: torch.device | str = "cpu") -> list[str]:
    """Names for ``bind`` on tensors of this device, the default first.

    "triton" on a GPU; on the CPU those of ``kimisys.reshard``. Where Triton's interpreter is on
    (``TRITON_INTERPRET=1`` when Triton is imported), "triton" is for the CPU instead.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.device(device).type == "cuda":
        # the interpreter runs on the host, where the table's addresses would not be memory
        return ["triton"] if has_triton and not interpreted else []
    return [*on_cpu(), "triton"] if has_triton and interpreted else on_cpu()


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
    device = _device(sources, destinations)
    known = implementations(device)
    name = implementation or os.environ.get(FORCED) or (known[0] if known else "triton")
    if name not in known:
        raise LayoutError(
            f"unknown strided copy implementation '{name}' (argument or {FORCED}) on {device}: "
            f"there {'is ' + ', '.join(known) if known else 'is none: ' + _REMEDY}"
        )
    _check_contiguous(sources, "source")
    _check_contiguous(destinations, "destination")
    if name == "triton":
        return Bound(plan, name, _launch(plan, sources, destinations, device))
    # Unless one was asked for, kimisys.reshard decides, which has a variable of its own.
    asked = name if implementation or os.environ.get(FORCED) else None
    execution = plan.bind(_arrays(sources), _arrays(destinations), implementation=asked)
    return Bound(plan, asked or "kimisys.reshard", execution.run)


def _device(sources: Tensors, destinations: Tensors) -> torch.device:
    """The one device of all tensors; the CPU where there are none."""
    first: tuple[str, tuple[int, str], torch.device] | None = None
    for side, tensors in (("source", sources), ("destination", destinations)):
        for key, tensor in tensors.items():
            if first is None:
                first = (side, key, tensor.device)
            elif tensor.device != first[2]:
                raise BufferMismatchError(
                    f"{side} buffer '{key[1]}' of rank {key[0]} is on {tensor.device}, and "
                    f"{first[0]} buffer '{first[1][1]}' of rank {first[1][0]} on {first[2]}; bring "
                    "all tensors of a plan to one device"
                )
    if first is not None and first[2].type not in ("cpu", "cuda"):
        raise BufferMismatchError(f"tensors on {first[2]}: only CPU and CUDA devices are supported")
    return torch.device("cpu") if first is None else first[2]


def _check_contiguous(tensors: Tensors, side: str) -> None:
    for (rank, name), tensor in tensors.items():
        if not tensor.is_contiguous():
            raise BufferMismatchError(
                f"{side} buffer '{name}' of rank {rank} is a tensor of shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}; pass a contiguous one (a fragment of the layout "
                "may have strides instead)"
            )


def _arrays(tensors: Tensors) -> dict[tuple[int, str], npt.NDArray[np.uint8]]:
    return {
        key: tensor.detach().reshape(-1).view(torch.uint8).numpy()
        for key, tensor in tensors.items()
    }


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
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
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
