"""A publisher's memory as a reader sees it: its versions, its records, and what may be overwritten.

All reads are one-sided: the publisher goes on, and what was read counts only if a later look at
the memory confirms it. Two rules (see docs/broadcast.md):

- log: bytes read at position p of the log are a record's if ``log_tail <= p`` *afterwards*;
- data and digests: what was read is of one version if the sequence is the same *afterwards*, and
  even.

Everything that is read is hostile until it is checked: a peer, or a transport, may have written
anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimisys._core.broadcast import (
    HEADER_NBYTES,
    RECORD_HEADER_NBYTES,
    WORDS_OFFSET,
    Parts,
    Record,
)
from kimisys.broadcast.transport import Memory, Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError, VersionError

_NONE = 2**64 - 1
_PAUSE = 0.001  # seconds between two looks at a publisher that is writing


@dataclass(frozen=True)
class State:
    """The words of a publisher's memory that change.

    Attributes:
        sequence: odd while data and digests are being changed, or when a writer failed or died.
        version: of data and digests, if the sequence is even; None before the first publish.
        log_last: position of the newest record; None where the log has none.
        log_tail: position of the oldest byte of the log that was intact.
    """

    sequence: int
    version: int | None
    log_last: int | None
    log_tail: int

    @property
    def writing(self) -> bool:
        return self.sequence % 2 == 1


@dataclass(frozen=True)
class Entry:
    """A record and its absolute position in the log."""

    position: int
    record: Record


class Remote:
    """One publisher's memory.

    Args:
        memory: how it is read.
        who: names the publisher in errors.
        deadline: for reading the header.

    Attributes:
        parts: where what lies in the memory.

    Raises:
        SnapshotError: the memory is not a snapshot of the format that this build reads.
    """

    def __init__(self, memory: Memory, who: str, deadline: Deadline) -> None:
        self.memory = memory
        self.who = who
        with self._named():
            header = self._bytes(0, min(HEADER_NBYTES, memory.nbytes), deadline)
            self.parts = Parts.parse(header, memory.nbytes)
        self._record_nbytes = RECORD_HEADER_NBYTES  # header and tables of the record last read

    def state(self, deadline: Deadline) -> State:
        """The words as they are now. The sequence is read first: whatever the others belong to, a
        ``confirm_data`` of this sequence confirms them too."""
        with self._named():
            sequence = self._words(WORDS_OFFSET, 1, deadline)
            version, last, tail = self._words(WORDS_OFFSET + 8, 3, deadline)
            if version != _NONE:
                _check_version(version)
        return State(
            sequence[0],
            None if version == _NONE else version,
            None if last == _NONE else last,
            tail,
        )

    def settled(self, deadline: Deadline) -> State:
        """Waits until no publish is under way.

        Raises:
            SnapshotError: the deadline passed meanwhile: the publish is still going on, or its
            publisher failed or died.
        """
        while True:
            state = self.state(deadline)
            if not state.writing:
                return state
            try:
                time.sleep(min(_PAUSE, deadline.remaining()))
            except TimeoutError as error:
                raise SnapshotError(
                    f"{self.who}: a publish was still under way after {deadline.seconds:g} s, or "
                    "its publisher failed or died while writing; publish again, or wait longer"
                ) from error

    def readable(self, version: int, deadline: Deadline) -> State:
        """The state in which data and digests are ``version``; waits while a publish is under way.

        Raises:
            VersionError: they are of another version. SnapshotError: see ``settled``.
        """
        state = self.settled(deadline)
        if state.version != version:
            raise VersionError(
                f"{self.who}: it has version {state.version}, asked was {version}; publish "
                f"{version} on every rank before the pull, or pull what is published"
            )
        return state

    def digests(self, state: State, deadline: Deadline) -> npt.NDArray[np.uint64]:
        """The cumulative digests of ``state.version``, uint64[tensors].

        Raises:
            SnapshotError: a publish began since ``state``, or was under way.
        """
        parts = self.parts
        with self._named():
            raw = self._bytes(parts.digest_offset, 8 * parts.digest_count, deadline)
        self.confirm_data(state.sequence, deadline)
        return np.frombuffer(raw, np.uint64)

    def newest(self, deadline: Deadline) -> int | None:
        """The newest version that can be had by some way: from the log or from the data. None
        before the first publish, or if all there was is being overwritten."""
        state = self.state(deadline)
        if not state.writing and state.version is not None:
            return state.version
        entry = self._last(state, deadline)
        return None if entry is None else entry.record.version

    def record(self, position: int, deadline: Deadline) -> Record | None:
        """The record that begins at an absolute position; None if it was overwritten.

        Raises:
            SnapshotError: it is intact in the log, but malformed.
        """
        log_nbytes = self.parts.log_nbytes
        error: SnapshotError | None = None
        found: Record | None = None
        try:
            # One read for all, once the length is known: it is the same for all of a publisher's.
            raw = self._log(position, min(self._record_nbytes, log_nbytes), deadline)
            nbytes = Record.parse_header(raw[:RECORD_HEADER_NBYTES], log_nbytes)
            if nbytes != len(raw):
                raw = self._log(position, nbytes, deadline)
            found = Record.parse(raw)
            self._check_record(found)
            self._record_nbytes = nbytes
        except SnapshotError as damage:
            error = damage
        if not self.intact(position, deadline):
            return None
        if error is not None:
            raise SnapshotError(f"{self.who}: {error}") from error
        return found

    def chain(self, base: int, version: int, deadline: Deadline) -> list[Entry] | None:
        """The records that lead from ``base`` to ``version``, oldest first.

        None where there is no such way: a full publish lies between them, ``base`` was never
        published, or its successor has fallen off the log. Then pull in full.

        Raises:
            VersionError: the publisher does not have ``version``, or ``base`` is not below it.
            SnapshotError: a record is malformed.
        """
        if base >= version:
            raise VersionError(
                f"{self.who}: no records lead from version {base} to {version}; versions increase"
            )
        state = self.state(deadline)
        entry = self._last(state, deadline)
        if entry is None or entry.record.version < version:
            if state.writing or (state.version is not None and state.version >= version):
                return None
            raise VersionError(
                f"{self.who}: it has version {state.version}, asked was {version}; publish "
                f"{version} on every rank before the pull, or pull what is published"
            )
        found: list[Entry] = []
        wanted = version
        while entry is not None and entry.record.version >= wanted:
            if entry.record.version == wanted:
                found.append(entry)
                wanted = entry.record.base
            if wanted <= base:
                return found[::-1] if wanted == base else None
            entry = self._before(entry, deadline)
        return None

    def stage_ranges(self, entry: Entry, payload: npt.NDArray[np.int64]) -> Ranges:
        """Where byte ranges of a record's payload lie in the memory.

        Args:
            payload: int64[n, 2], begin and end in the payload.

        Returns:
            Ranges that pack them one after another; one that wraps around the log's end is two.

        Raises:
            SnapshotError: a range is not inside the payload.
        """
        begin, end = payload[:, 0], payload[:, 1]
        limit = entry.record.payload_nbytes
        if not bool(((begin >= 0) & (begin <= end) & (end <= limit)).all()):
            raise SnapshotError(
                f"{self.who}: ranges outside the {limit} bytes of the payload of version "
                f"{entry.record.version} were asked for"
            )
        start = (entry.position + entry.record.payload_offset) % self.parts.log_nbytes
        sizes = end - begin
        into = np.cumsum(sizes) - sizes
        return self._ring(start + begin, into, sizes)

    def stage(
        self, entry: Entry, payload: npt.NDArray[np.int64], deadline: Deadline
    ) -> npt.NDArray[np.uint8] | None:
        """Copies byte ranges of a record's payload, packed in their order; None if the record was
        overwritten meanwhile. The bytes are those that the publisher wrote, if it is honest and
        the transport too: the record's digest increments tell."""
        packed = np.empty(int((payload[:, 1] - payload[:, 0]).sum()), np.uint8)
        with self._named():
            self.memory.read(self.stage_ranges(entry, payload), packed.data, deadline)
        return packed if self.intact(entry.position, deadline) else None

    def intact(self, position: int, deadline: Deadline) -> bool:
        """Has no byte from this position of the log on been given up so far?"""
        with self._named():
            return self._words(WORDS_OFFSET + 24, 1, deadline)[0] <= position

    def confirm_data(self, sequence: int, deadline: Deadline) -> None:
        """Raises SnapshotError unless no publish began since the state with this sequence."""
        with self._named():
            now = self._words(WORDS_OFFSET, 1, deadline)[0]
        if now != sequence or sequence % 2 == 1:
            raise SnapshotError(
                f"{self.who}: its version was overwritten while it was read; what was read may be "
                "torn: discard it, or heal it by the records of the versions since"
            )

    def data_offset(self, offset: int) -> int:
        """Of a byte of the data, in the memory."""
        return self.parts.data_offset + offset

    def _last(self, state: State, deadline: Deadline) -> Entry | None:
        if state.log_last is None:
            return None
        record = self.record(state.log_last, deadline)
        return None if record is None else Entry(state.log_last, record)

    def _before(self, entry: Entry, deadline: Deadline) -> Entry | None:
        """The record before; None where the log begins, or it was overwritten."""
        position = entry.record.previous
        if position is None:
            return None
        record = self.record(position, deadline)
        if record is None:
            return None
        # Positions fall, and with them versions: the walk ends, whatever a peer wrote.
        if position + record.nbytes > entry.position or record.version > entry.record.base:
            raise SnapshotError(
                f"{self.who}: the record of version {entry.record.version} at byte "
                f"{entry.position} of the log follows one of version {record.version} at byte "
                f"{position}; the log is malformed: pull in full"
            )
        return Entry(position, record)

    def _check_record(self, record: Record) -> None:
        """What a record cannot know of itself. Its size too: it is what was read last that counts,
        and a peer may have written another since its length was looked at."""
        _check_version(record.version)
        if record.nbytes > self.parts.log_nbytes:
            raise SnapshotError(
                f"the record of version {record.version} has {record.nbytes} bytes in a log of "
                f"{self.parts.log_nbytes}; pull in full"
            )
        if record.tensors.size and int(record.tensors[-1]) >= self.parts.digest_count:
            raise SnapshotError(
                f"the record of version {record.version} changes the digest of tensor "
                f"{int(record.tensors[-1])} of {self.parts.digest_count}; install the same kimisys "
                "on both sides"
            )

    def _log(self, position: int, nbytes: int, deadline: Deadline) -> bytes:
        if self.parts.log_nbytes == 0 or position % 8 != 0:
            raise SnapshotError(f"no record can begin at byte {position} of the log")
        start = np.array([position % self.parts.log_nbytes], np.int64)
        size = np.array([nbytes], np.int64)
        raw = np.empty(nbytes, np.uint8)
        self.memory.read(self._ring(start, 0 * size, size), raw.data, deadline)
        return raw.tobytes()

    def _ring(
        self,
        start: npt.NDArray[np.int64],
        into: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> Ranges:
        """Ranges of the ring, which begin at most one lap after its start, as ranges of the
        memory."""
        log_nbytes = self.parts.log_nbytes
        start = start % log_nbytes
        first = np.minimum(sizes, log_nbytes - start)
        ranges = np.stack(
            [start, into, first, np.zeros_like(start), into + first, sizes - first], axis=1
        ).reshape(-1, 3)
        ranges[:, 0] += self.parts.log_offset
        return np.ascontiguousarray(ranges[ranges[:, 2] > 0])

    def _bytes(self, offset: int, nbytes: int, deadline: Deadline) -> bytes:
        raw = bytearray(nbytes)
        self.memory.read(np.array([[offset, 0, nbytes]], np.int64), memoryview(raw), deadline)
        return bytes(raw)

    def _words(self, offset: int, count: int, deadline: Deadline) -> list[int]:
        words: list[int] = np.frombuffer(
            self._bytes(offset, 8 * count, deadline), np.uint64
        ).tolist()
        return words

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except SnapshotError as error:
            raise SnapshotError(f"{self.who}: {error}") from error


def _check_version(version: int) -> None:
    if version >= 1 << 63:
        raise SnapshotError(
            f"it announces version {version}, and versions are below 2^63: its memory is damaged; "
            "make a new publisher and connect again"
        )
