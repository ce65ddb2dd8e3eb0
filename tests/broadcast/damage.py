"""A memory that damages what is read from it, as a bad wire would."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kimisys._core.broadcast import HEADER_NBYTES
from kimisys.broadcast import Peers, Snapshot
from kimisys.broadcast.peers import Found
from kimisys.broadcast.transport import Memory, Ranges, SharedMemory
from kimisys.broadcast.wire import Deadline, fetch


class Damaging:
    """Reads right until it is armed: then it damages the bytes of one read.

    Attributes:
        reads: since it was armed, those of the header's words left out.
        harmed: whether bytes were changed since then.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._strike: tuple[int, Callable[[np.ndarray], None]] | None = None
        self.reads = 0
        self.harmed = False

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def arm(self, read: int, change: Callable[[np.ndarray], None]) -> None:
        """Damage the read with this number, from 0 on, by ``change`` of its bytes in place."""
        self._strike, self.reads, self.harmed = (read, change), 0, False

    def disarm(self) -> None:
        self._strike = None

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        self._memory.read(ranges, into, deadline)
        if len(ranges) == 0 or int(ranges[:, 0].min()) < HEADER_NBYTES:
            return
        if self._strike is not None and self.reads == self._strike[0]:
            target = np.frombuffer(into, np.uint8)
            places = np.concatenate([np.arange(at, at + n) for _, at, n in ranges.tolist()])
            before = target[places]
            after = before.copy()
            self._strike[1](after)
            target[places] = after
            self.harmed = bool((before != after).any())
        self.reads += 1

    def mapped(self) -> None:
        return None

    def close(self) -> None:
        self._memory.close()


def flipped(random: np.random.Generator) -> Callable[[np.ndarray], None]:
    """Flips one bit."""
    at, bit = random.random(), int(random.integers(8))

    def change(taken: np.ndarray) -> None:
        if taken.size:
            taken[int(at * taken.size)] ^= 1 << bit

    return change


def truncated(random: np.random.Generator) -> Callable[[np.ndarray], None]:
    """Leaves a tail of zeros, as Mooncake's TCP once did."""
    at = random.random()

    def change(taken: np.ndarray) -> None:
        taken[int(at * taken.size) :] = 0

    return change


def connect_through(
    addresses: Sequence[Path], wrap: Callable[[Memory], Memory]
) -> tuple[Peers, list[Memory]]:
    """Peers whose memories are wrapped, and the wrapped memories."""
    found = []
    for path in addresses:
        manifest, descriptor = fetch(path, Deadline(10))
        try:
            memory = wrap(SharedMemory(Snapshot.open(descriptor)))
        finally:
            os.close(descriptor)
        found.append(Found(path, manifest, memory))
    return Peers(found, Deadline(10)), [each.memory for each in found]
