"""The small interface of one-sided reads, and shared memory as its first implementation.

A transport reads byte ranges of a publisher's memory without the publisher's help. What it brings
is not trusted: records have checksums, increments and digests verify the rest.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kimisys._core.broadcast import Snapshot
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError

Ranges = npt.NDArray[np.int64]
"""int64[n, 3]: offset in the publisher's memory, offset in the reader's buffer, bytes."""


class Memory(Protocol):
    """One publisher's memory, as a reader has it."""

    @property
    def nbytes(self) -> int:
        """Of the whole memory: header, digests, log and data."""
        ...

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        """Copies the ranges into ``into`` (writable, bytes).

        Bytes that are written meanwhile arrive old, new or mixed by 8-byte words.
        Raises SnapshotError when the peer is gone or the deadline passes; ``into`` may hold
        anything then.
        """
        ...

    def mapped(self) -> memoryview | None:
        """The whole memory where this process has it mapped: full pulls go straight from it."""
        ...

    def close(self) -> None:
        """Lets go of the memory. Idempotent."""
        ...


class SharedMemory:
    """A publisher's memory on the same machine, mapped."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot: Snapshot | None = snapshot

    @property
    def nbytes(self) -> int:
        return self._mapping.parts.nbytes

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        self._mapping.read(ranges, into)

    def mapped(self) -> memoryview:
        return self._mapping.mapped().data

    def close(self) -> None:
        self._snapshot = None

    @property
    def _mapping(self) -> Snapshot:
        if self._snapshot is None:
            raise SnapshotError("this memory was closed; connect again")
        return self._snapshot


class Meter:
    """A memory that counts the bytes that are read from it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.nbytes_read = 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        self.nbytes_read += int(ranges[:, 2].sum())
        self._memory.read(ranges, into, deadline)

    def mapped(self) -> memoryview | None:
        """Who reads from it adds to ``nbytes_read`` what it reads."""
        return self._memory.mapped()

    def close(self) -> None:
        self._memory.close()
