"""A peer may have written anything into its memory: reading it ends, in an answer or an error."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from kimisys._core.broadcast import RECORD_HEADER_NBYTES, WORDS_OFFSET, Draft, Record, Snapshot
from kimisys.broadcast.remote import Remote
from kimisys.broadcast.transport import Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError, VersionError

LOG_NBYTES = 1000
DEADLINE = Deadline(3600)


class Forged:
    """A memory of these bytes; reads outside of it are refused, as any transport does."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.nbytes = len(content)

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        for offset, target, nbytes in ranges.tolist():
            if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
                raise SnapshotError(f"{nbytes} bytes at {offset} are outside the memory")
            into[target : target + nbytes] = self.content[offset : offset + nbytes]

    def mapped(self) -> memoryview | None:
        return None

    def close(self) -> None:
        pass


def published() -> Snapshot:
    """Versions 1 to 5; the log holds the records of 3, 4 and 5 and wraps."""
    snapshot = Snapshot.create(100, 3, LOG_NBYTES)
    snapshot.begin(1)
    snapshot.commit(np.arange(3, dtype=np.uint64))
    for version in range(2, 6):
        snapshot.begin(version)
        draft = Draft.begin(snapshot, version, version - 1, 2, 3, 5)
        assert draft is not None
        first, second = draft.reserve(50), draft.reserve(20)
        assert first is not None and second is not None
        draft.append(first, bytes([version]) * 50)
        draft.append(second, bytes([version]) * 20)
        draft.finish(
            np.array([first, second], np.uint64),
            np.array([0, 2], np.uint32),
            np.array([7, 8], np.uint64),
            np.array([50 << 7 | 3, 0, 0, 20 << 7 | 3, 0], np.uint32),
            35,
        )
        snapshot.publish_record(draft.position)
        snapshot.commit(np.arange(3, dtype=np.uint64) + version)
    return snapshot


def image(snapshot: Snapshot) -> bytearray:
    return bytearray(os.pread(snapshot.fileno(), snapshot.parts.nbytes, 0))


def put(content: bytearray, offset: int, value: int) -> None:
    struct.pack_into("<Q", content, offset, value)


def read_everything(content: bytearray) -> str:
    """All that a reader asks for; the kind of the answer."""
    try:
        remote = Remote(Forged(content), "publisher", DEADLINE)
        state = remote.state(DEADLINE)
        remote.newest(DEADLINE)
        chain = remote.chain(2, 5, DEADLINE)
        if chain is None:
            return "gone"
        for entry in chain:
            sizes = np.array([[0, entry.record.payload_nbytes]])
            if remote.stage(entry, sizes, DEADLINE) is None:
                return "gone"
        remote.digests(state, DEADLINE)
    except (SnapshotError, VersionError) as error:
        assert "publisher" in str(error)
        return type(error).__name__
    return "read"


def test_what_is_honest_is_read() -> None:
    assert read_everything(image(published())) == "read"


def test_mutations_end_in_an_answer_or_an_error() -> None:
    good = image(published())
    end = published().parts.data_offset
    random = np.random.default_rng(0)
    kinds: dict[str, int] = {}
    for _ in range(4000):
        content = bytearray(good)
        for _ in range(random.integers(1, 5)):
            if random.random() < 0.3:  # a word of the header, or of a record
                word = 8 * int(random.integers(0, end // 8))
                wild = [0, 1, 8, LOG_NBYTES, 2**31, 2**63, 2**64 - 1, int(random.integers(2**63))]
                put(content, word, wild[random.integers(len(wild))])
            else:
                content[random.integers(0, 1400)] = random.integers(256)
        kind = read_everything(content)
        kinds[kind] = kinds.get(kind, 0) + 1
    assert kinds.keys() >= {"read", "SnapshotError"}


@pytest.mark.parametrize("last", [0, 4, 13, 2**62, 2**64 - 8, 2**64 - 2])
def test_a_position_where_no_record_is(last: int) -> None:
    content = image(published())
    put(content, WORDS_OFFSET + 16, last)
    assert read_everything(content) in ("gone", "SnapshotError")


@pytest.mark.parametrize("lap", [0, LOG_NBYTES, 8 * LOG_NBYTES])
def test_records_that_lead_nowhere_end_the_walk(lap: int) -> None:
    """A record that names itself, or one further on, as the one before it."""
    snapshot = Snapshot.create(8, 1, LOG_NBYTES)
    snapshot.begin(1)
    snapshot.commit(np.zeros(1, np.uint64))
    for version in (5, 6):
        # The log's last record is published before a second one is written with it as previous.
        draft = Draft.begin(snapshot, version, version - 1, 1, 1, 1)
        assert draft is not None
        draft.finish(
            np.zeros(1, np.uint64),
            np.zeros(1, np.uint32),
            np.zeros(1, np.uint64),
            np.zeros(1, np.uint32),
            0,
        )
        snapshot.publish_record(draft.position + lap)
    content = image(snapshot)
    # Both say that the record before lies at the place of the first; the first says so of itself.
    start = snapshot.parts.log_offset
    size = RECORD_HEADER_NBYTES + 24
    second = bytes(content[start + size : start + 2 * size])
    assert Record.parse(second).previous == lap
    content[start : start + size] = second
    put(content, WORDS_OFFSET + 16, lap)
    remote = Remote(Forged(content), "publisher", DEADLINE)
    with pytest.raises(SnapshotError, match="the log is malformed"):
        remote.chain(1, 6, DEADLINE)


def only_record(log_nbytes: int, payload_nbytes: int, tensor: int = 0) -> Snapshot:
    """Version 2 on 1, the first record of the log."""
    snapshot = Snapshot.create(8, 1, log_nbytes)
    snapshot.begin(1)
    snapshot.commit(np.zeros(1, np.uint64))
    snapshot.begin(2)
    draft = Draft.begin(snapshot, 2, 1, 1, 1, 1)
    assert draft is not None and draft.reserve(payload_nbytes) is not None
    zeros, one = np.zeros(1, np.uint64), np.array([tensor], np.uint32)
    draft.finish(zeros, one, zeros, np.zeros(1, np.uint32), 0)
    snapshot.publish_record(draft.position)
    snapshot.commit(np.zeros(1, np.uint64))
    return snapshot


def test_a_record_that_grows_between_two_looks_is_refused() -> None:
    snapshot, larger = only_record(LOG_NBYTES, 8), only_record(100 * LOG_NBYTES, 50 * LOG_NBYTES)
    start, end = snapshot.parts.log_offset, RECORD_HEADER_NBYTES + 24
    other = image(larger)[larger.parts.log_offset :][:end]

    class Growing(Forged):
        def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
            super().read(ranges, into, deadline)
            if ranges[0, 0] == start:
                self.content[start : start + end] = other

    remote = Remote(Growing(image(snapshot)), "publisher", DEADLINE)
    with pytest.raises(SnapshotError, match=r"publisher: .* bytes in a log of 1000"):
        remote.record(0, DEADLINE)
    assert Remote(Forged(image(snapshot)), "publisher", DEADLINE).record(0, DEADLINE) is not None


def test_a_tensor_that_no_layout_has_is_refused() -> None:
    remote = Remote(Forged(image(only_record(LOG_NBYTES, 8, tensor=1))), "publisher", DEADLINE)
    with pytest.raises(SnapshotError, match=r"publisher: .* digest of tensor 1 of 1"):
        remote.chain(1, 2, DEADLINE)


def test_a_version_that_no_publisher_counts_to_is_refused() -> None:
    content = image(only_record(LOG_NBYTES, 8))
    put(content, WORDS_OFFSET + 8, 1 << 63)
    remote = Remote(Forged(content), "publisher", DEADLINE)
    with pytest.raises(SnapshotError, match=r"publisher: .* versions are below 2"):
        remote.newest(DEADLINE)
