"""Snapshots: shared memory with a sealed size, a header that is checked, a sequence lock."""

from __future__ import annotations

import fcntl
import gc
import os
import struct
from collections.abc import Callable

import numpy as np
import pytest

from kimisys.broadcast import Snapshot
from kimisys.errors import SnapshotError, VersionError

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def publish(snapshot: Snapshot, version: int, fill: int) -> None:
    snapshot.begin(version)
    np.asarray(memoryview(snapshot))[:] = fill
    snapshot.commit(np.array([version], np.uint64))


def test_reader_sees_what_was_committed() -> None:
    writer = Snapshot.create(100, 1)
    reader = Snapshot.open(writer.fileno())
    assert (reader.nbytes, reader.digest_count) == (100, 1)
    with pytest.raises(VersionError, match="no version yet"):
        reader.published()
    publish(writer, 3, 7)
    offer = reader.published()
    assert offer.version == 3 and offer.digests.tolist() == [3]
    assert bytes(memoryview(reader)) == b"\x07" * 100
    reader.confirm(offer)


def test_reader_cannot_write() -> None:
    writer = Snapshot.create(100, 1)
    reader = Snapshot.open(writer.fileno())
    assert writer.writable and not reader.writable
    assert memoryview(reader).readonly
    with pytest.raises(SnapshotError, match="read-only"):
        reader.begin(1)
    with pytest.raises(PermissionError):
        os.pwrite(writer.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(writer.fileno(), 0)


def test_half_written_and_overwritten_snapshots_are_refused() -> None:
    writer = Snapshot.create(8, 1)
    publish(writer, 1, 1)
    reader = Snapshot.open(writer.fileno())
    offer = reader.published()
    writer.begin(2)
    with pytest.raises(SnapshotError, match="being written, or its publisher failed or died"):
        reader.published()
    with pytest.raises(SnapshotError, match="version 1 was overwritten"):
        reader.confirm(offer)
    writer.commit(np.array([0], np.uint64))
    with pytest.raises(SnapshotError, match="version 1 was overwritten"):
        reader.confirm(offer)


def test_versions_increase() -> None:
    writer = Snapshot.create(8, 1)
    publish(writer, 5, 1)
    for version in (5, 4, 0, -1):
        with pytest.raises(VersionError):
            writer.begin(version)
    assert writer.published().version == 5


def test_commit_needs_begin_and_all_digests() -> None:
    writer = Snapshot.create(8, 1)
    with pytest.raises(SnapshotError, match="begin"):
        writer.commit(np.array([0], np.uint64))
    writer.begin(1)
    with pytest.raises(SnapshotError, match="1 digests, got 2"):
        writer.commit(np.array([0, 0], np.uint64))


def test_views_keep_the_memory_alive() -> None:
    writer = Snapshot.create(4096, 1)
    publish(writer, 1, 9)
    view = np.asarray(memoryview(Snapshot.open(writer.fileno())))
    del writer
    gc.collect()
    assert view.sum() == 9 * 4096


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = Snapshot.create(10, 1)
    reader = Snapshot.open(writer.fileno())
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del writer, reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def forged(change: Callable[[bytearray], None], seals: int = SEALS) -> int:
    """A descriptor of a memory file like a snapshot of 4096 bytes and 2 digests, then changed."""
    good = Snapshot.create(4096, 2)
    content = bytearray(os.pread(good.fileno(), 8192, 0))
    change(content)
    file = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(file, content)
    if seals:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def word(index: int, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into("<Q", content, 8 * index, value)


@pytest.mark.parametrize(
    ("change", "seals", "message"),
    [
        (word(0, 1), SEALS, "mark of a kimisys snapshot"),
        (word(1, 99), SEALS, "format 99"),
        (word(2, 8193), SEALS, "promises"),  # words 2 to 8: all bytes, then the parts
        (word(3, 264), SEALS, "promises"),
        (word(4, 5000), SEALS, "promises"),
        (word(4, 2**61), SEALS, "promises"),
        (word(5, 0), SEALS, "promises"),
        (word(6, 8192), SEALS, "promises"),
        (word(6, 2**64 - 64), SEALS, "promises"),
        (word(7, 4097), SEALS, "promises"),
        (word(8, 8192), SEALS, "promises"),
        (word(8, 2**64 - 4096), SEALS, "promises"),
        (lambda content: content.clear(), SEALS, "shorter than its header"),
        (lambda content: None, 0, "sealed size"),
        (lambda content: None, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, "sealed size"),
    ],
)
def test_hostile_memory_is_refused(
    change: Callable[[bytearray], None], seals: int, message: str
) -> None:
    file = forged(change, seals)
    try:
        with pytest.raises(SnapshotError, match=message):
            Snapshot.open(file)
    finally:
        os.close(file)


def test_other_descriptors_are_refused(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(SnapshotError, match="descriptor"):
        Snapshot.open(-1)
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(SnapshotError, match="sealed size"):
            Snapshot.open(file)
    finally:
        os.close(file)
