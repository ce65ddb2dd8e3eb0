"""One process's end of Mooncake's transfer engine, and reads with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from kimisys.broadcast.transport import Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError

_LOOK_SECONDS = (0.00002, 0.001)
"""Between two looks at a transfer: the first pause, and the longest."""
_BATCH = 4096
"""Ranges submitted at once."""

_abandoned: list[object] = []
"""Engines and buffers into which a late transfer may still write: they live as long as the process.
"""


class Engine:
    """Listens for transfers, and reads from others.

    Mooncake has no authentication: whoever reaches its two ports can read and write the memory that
    is registered with it. See docs/security.md for how to confine it.

    Args:
        host: the address of this host that peers reach; no port.
        protocol: ``"tcp"``, or ``"rdma"`` where the machine has it (not tested here).
        device: the name of the RDMA device, or several with commas; "" for TCP.
        staging_nbytes: of the buffer through which everything is read.

    Raises:
        SnapshotError: Mooncake is not installed here, or its engine does not start.
    """

    def __init__(
        self,
        host: str,
        protocol: str = "tcp",
        device: str = "",
        staging_nbytes: int = 64 << 20,
    ) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise SnapshotError(
                f"Mooncake's transfer engine cannot be loaded: {error}; install "
                "mooncake-transfer-engine and Debian's libibverbs1, or use shared memory"
            ) from error
        self._transfer = TransferEngine()
        if self._transfer.initialize(host, "P2PHANDSHAKE", protocol, device) != 0:
            raise SnapshotError(
                f"Mooncake's transfer engine does not start on {host} with protocol {protocol!r} "
                f"and device {device!r}; its own log, on stderr, says why"
            )
        self.session = f"{host}:{self._transfer.get_rpc_port()}"
        self._lock = threading.Lock()
        self._staging = np.empty(staging_nbytes, np.uint8)
        self._opened: set[str] = set()
        self._lost = ""
        # Kept mapped as long as the engine may read or write it.
        self._registered: dict[int, npt.NDArray[np.uint8]] = {}
        self.register(self._staging)

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        """Lets peers read this memory, which lives at least until it is unregistered. Raises
        SnapshotError when the engine refuses."""
        if self._transfer.register_memory(memory.ctypes.data, memory.nbytes) != 0:
            raise SnapshotError(
                f"Mooncake refuses to register {memory.nbytes} bytes; its own log says why (for "
                "RDMA the limit of locked memory may be too low)"
            )
        self._registered[memory.ctypes.data] = memory

    def unregister(self, memory: npt.NDArray[np.uint8]) -> None:
        """Peers cannot read it any more. Raises SnapshotError when the engine refuses."""
        if self._transfer.unregister_memory(memory.ctypes.data) != 0:
            raise SnapshotError("Mooncake does not know the memory that was to be unregistered")
        self._registered.pop(memory.ctypes.data, None)

    def read(
        self, session: str, address: int, ranges: Ranges, into: memoryview, deadline: Deadline
    ) -> None:
        """Reads ranges of a peer's memory, one after the other, from byte ``address`` of it on.

        Raises:
            SnapshotError: the peer is gone or refuses, or the deadline passed. After the latter the
            engine reads no more: a late transfer could still write to its buffer. (Only where it
            passed while another thread was reading, the engine goes on.)
        """
        with self._turn(session, deadline):
            for batch in _batches(ranges, self._staging.nbytes):
                if self._lost:
                    raise SnapshotError(self._lost)
                sizes = batch[:, 2]
                places = np.cumsum(sizes) - sizes
                self._transfer_batch(
                    session,
                    (self._staging.ctypes.data + places).tolist(),
                    (address + batch[:, 0]).tolist(),
                    sizes.tolist(),
                    deadline,
                )
                target = np.frombuffer(into, np.uint8)
                for (_, local, size), place in zip(batch.tolist(), places.tolist(), strict=True):
                    target[local : local + size] = self._staging[place : place + size]

    @contextmanager
    def _turn(self, session: str, deadline: Deadline) -> Iterator[None]:
        """The staging buffer, for one thread at a time."""
        try:
            mine = self._lock.acquire(timeout=min(deadline.remaining(), threading.TIMEOUT_MAX))
        except TimeoutError:
            mine = False
        if not mine:
            raise SnapshotError(
                f"nothing was read from Mooncake at {session} within {deadline.seconds:g} s: time "
                "had passed before, or another thread's read took it; wait longer, or make an "
                "Engine for each thread"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _transfer_batch(
        self,
        session: str,
        local: list[int],
        remote: list[int],
        sizes: list[int],
        deadline: Deadline,
    ) -> None:
        try:
            # One transfer each: of a batch of several, transfer_check_status sees the first alone.
            transfers = [
                self._submit(session, [to], [source], [nbytes], deadline)
                for to, source, nbytes in zip(local, remote, sizes, strict=True)
            ]
            sound = [self._wait(each, deadline) for each in transfers]  # all, whatever one did
        except TimeoutError as error:
            self._lost = (
                f"Mooncake at {session} did not answer within {deadline.seconds:g} s; see whether "
                "its process is alive and reachable, and make a new Engine"
            )
            _abandoned.append((self._transfer, self._staging))
            raise SnapshotError(self._lost) from error
        if not all(sound):
            raise SnapshotError(
                f"Mooncake could not read from {session}: its process has ended, or does not "
                "export this memory any more; connect again with a new card"
            )

    def _wait(self, transfer: int, deadline: Deadline) -> bool:
        """Whether the transfer succeeded. Raises TimeoutError."""
        status, pause = 0, _LOOK_SECONDS[0]
        while transfer and (status := self._transfer.transfer_check_status(transfer)) == 0:
            time.sleep(min(pause, deadline.remaining()))
            pause = min(2 * pause, _LOOK_SECONDS[1])
        return status == 1

    def _submit(
        self,
        session: str,
        local: list[int],
        remote: list[int],
        sizes: list[int],
        deadline: Deadline,
    ) -> int:
        """The transfer's number; 0 when it was refused. Raises TimeoutError."""
        if session in self._opened:
            return int(self._transfer.batch_transfer_async_read(session, local, remote, sizes))
        # The first transfer also shakes hands, and waits for that without a deadline of ours.
        answers: list[int] = []

        def submit() -> None:
            answers.append(self._transfer.batch_transfer_async_read(session, local, remote, sizes))

        thread = threading.Thread(target=submit, name=f"mooncake {session}", daemon=True)
        thread.start()
        thread.join(deadline.remaining())
        if thread.is_alive():
            raise TimeoutError(f"no handshake within {deadline.seconds:g} s")
        if answers and answers[0]:
            self._opened.add(session)
        return answers[0] if answers else 0


def _batches(ranges: Ranges, limit: int) -> Iterator[Ranges]:
    """The ranges in order, cut and grouped so that each group has at most ``limit`` bytes."""
    group: list[tuple[int, int, int]] = []
    free = limit
    for remote, local, nbytes in ranges.tolist():
        done = 0
        while done < nbytes:
            size = min(nbytes - done, free)
            group.append((remote + done, local + done, size))
            done, free = done + size, free - size
            if free == 0 or len(group) == _BATCH:
                yield np.array(group, np.int64)
                group, free = [], limit
    if group:
        yield np.array(group, np.int64)
