"""Live weights against their snapshot on a device, block by block; on the CPU by the C++ core.

``bind`` checks the tensors and builds the tables of the blocks once, on the device; ``Bound.run``
brings the snapshot up to date and says what changed. The snapshot may lie on the live weights'
device, or in page-locked memory of the host, which the device reads and writes where it lies.

The kernels have not been run on a GPU, where tests/gpu would test and measure them; they are tested
in Triton's interpreter and compiled for Hopper. ``kimisys.broadcast.Publisher`` does not use them
yet: it takes live weights in the memory of the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from kimisys._core.broadcast import Diff
from kimisys._core.broadcast import diff_implementations as on_cpu
from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.kernels.delta import Delta, blocks_of, encode
from kimisys.kernels.diff_table import make_tables
from kimisys.kernels.tensors import (
    Tensors,
    arrays,
    check_apart,
    chosen,
    needed,
    one_device,
    with_triton,
)
from kimisys.reshard import Layout

FORCED = "KIMISYS_DIFF_IMPLEMENTATION"


def implementations(device: torch.device | str = "cpu") -> list[str]:
    """Names for ``bind`` on live tensors of this device, the default first.

    "triton" on a GPU; on the CPU those of the core. Where Triton's interpreter is on
    (``TRITON_INTERPRET=1`` when Triton is imported), "triton" is for the CPU instead.
    """
    return with_triton(on_cpu(), device)


class Bound:
    """Live tensors and their snapshot, which it holds. Made by ``bind``."""

    def __init__(self, implementation: str, run: Callable[[], Delta]) -> None:
        self.implementation = implementation
        self._run = run

    def run(self) -> Delta:
        """Compares, brings the snapshot up to date, and returns what changed.

        The live weights keep still meanwhile. On a GPU it follows what is queued on the current
        stream, and waits for it. If it fails, the snapshot is as it was, or torn: publish in full.
        """
        return self._run()

    def __repr__(self) -> str:
        return f"Bound(diff by {self.implementation})"


def bind(
    live: Layout,
    snapshot: Layout,
    counted: Layout,
    sources: Tensors,
    into: torch.Tensor,
    implementation: str | None = None,
) -> Bound:
    """Checks one rank's live tensors and its snapshot, to be compared again and again.

    Args:
        live, snapshot: the layouts of this rank; the snapshot has one buffer.
        counted: the elements of it that this rank counts in digests:
            ``whole_snapshot.cover().of_rank(rank)``.
        sources: the live buffers by (rank, name): contiguous, of any dtype and of exactly the
            layout's bytes, all on one device.
        into: the snapshot's data, contiguous uint8[nbytes]: on that device, or page-locked memory
            of the host.
        implementation: one of ``implementations``; the environment variable
            KIMISYS_DIFF_IMPLEMENTATION forces one where there is no argument.

    Raises:
        BufferMismatchError: a tensor is missing, not contiguous, of another size, where the device
            cannot read it, or shares memory with the snapshot.
        LayoutError: the device has no such implementation; the layouts do not fit together; an
            element does not lie at a multiple of its size.
    """
    device = one_device(live=sources)
    name = chosen("diff", implementation, FORCED, implementations(device), device)
    tensors = needed(live.buffers, sources, "live")
    _check_snapshot(snapshot, into, device)
    check_apart({(snapshot.buffers[0].rank, "snapshot"): into}, tensors, "live weights, snapshot")
    if name == "triton":
        return Bound(name, _launches(live, snapshot, counted, tensors, into, device))
    # Unless one was asked for, the core decides, which has a variable of its own.
    asked = name if implementation or os.environ.get(FORCED) else None
    core, on_host = Diff(live, snapshot, counted), arrays(tensors)

    def run() -> Delta:
        found = core.compare(on_host, into.numpy(), implementation=asked)
        return Delta(found.descriptors, found.payloads, found.increments, found.changed)

    return Bound(asked or "kimisys.broadcast", run)


def _check_snapshot(snapshot: Layout, into: torch.Tensor, device: torch.device) -> None:
    if len(snapshot.buffers) != 1:
        raise LayoutError(
            f"the snapshot's layout has {len(snapshot.buffers)} buffers; take one rank's part of "
            "what snapshot_layout makes"
        )
    buffer = snapshot.buffers[0]
    text = f"the snapshot of rank {buffer.rank}"
    if into.dtype != torch.uint8 or not into.is_contiguous() or into.nbytes != buffer.nbytes:
        raise BufferMismatchError(
            f"{text} is {into.dtype} of {into.nbytes} bytes; it must be a contiguous uint8 tensor "
            f"of {buffer.nbytes}"
        )
    if into.device != device and not (into.device.type == "cpu" and into.is_pinned()):
        raise BufferMismatchError(
            f"{text} is on {into.device} and the live weights are on {device}, which cannot reach "
            "it; put it there, or page-lock it (cudaHostRegister)"
        )


def _launches(
    live: Layout, snapshot: Layout, counted: Layout, sources: Tensors, into: torch.Tensor,
    device: torch.device,
) -> Callable[[], Delta]:  # fmt: skip
    """The call that launches the kernels over the tables, which are on the device by now."""
    from kimisys.kernels import diff_kernel as kernel
    from kimisys.kernels.diff_launch import Launch, find_changes

    blocks = blocks_of(snapshot)
    addresses = {name: tensor.data_ptr() for (_, name), tensor in sources.items()}
    tables = make_tables(live, snapshot, counted, blocks, addresses, into.data_ptr(), kernel.TILE)
    launches = [Launch(table, device) for table in tables]
    held = dict(sources)  # the tables have only their addresses

    def run() -> Delta:
        assert held is not None
        return encode(find_changes(launches, snapshot, blocks), snapshot, blocks, into)

    return run
