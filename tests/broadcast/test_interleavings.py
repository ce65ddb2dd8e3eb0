"""All interleavings of a reader with a writer, in a small world.

The writer is the real one, cut into its steps; the memory is kept as it is after each. The reader
is the real one too: each of its one-sided reads, cut into pieces of a cache line, may fall between
any two steps. Whatever a reader accepts must be one version, bit for bit. Mutants of the protocol
show that the same check can fail.

Two reads at different steps that return the same bytes leave the reader in the same state, and the
earlier one leaves more steps to come: so only the first step of each value is followed. Nothing is
lost by that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kimisys._core.broadcast import HEADER_NBYTES, WORDS_OFFSET, Draft, Snapshot
from kimisys.broadcast.remote import Entry, Remote, State
from kimisys.broadcast.transport import Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError, VersionError

CHUNKS = 2
CHUNK_NBYTES = 8
LOG_NBYTES = 360  # two records: one chunk makes 176 bytes, two 184
LINE = 64
FOREVER = Deadline(3600)

Data = tuple[bytes, ...]
"""What each chunk holds: the version that changed it last, eight times."""


def touches(version: int) -> list[int]:
    """The chunks that a version changes: all, or one."""
    return list(range(CHUNKS)) if version % 3 == 0 else [version % CHUNKS]


def content(version: int) -> bytes:
    return bytes([version]) * CHUNK_NBYTES


@dataclass
class World:
    """The memory after each step of a writer, and what each version is."""

    snapshot: Snapshot = field(
        default_factory=lambda: Snapshot.create(CHUNKS * CHUNK_NBYTES, 1, LOG_NBYTES)
    )
    images: list[bytes] = field(default_factory=list)
    versions: dict[int, Data] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=lambda: [bytes(CHUNK_NBYTES)] * CHUNKS)

    def run(self, steps: Iterator[None]) -> None:
        self.keep()
        for _ in steps:
            self.keep()

    def keep(self) -> None:
        self.images.append(os.pread(self.snapshot.fileno(), self.snapshot.parts.nbytes, 0))

    def write(self, chunk: int, version: int) -> None:
        begin = chunk * CHUNK_NBYTES
        memoryview(self.snapshot)[begin : begin + CHUNK_NBYTES] = content(version)
        self.chunks[chunk] = content(version)

    def commit(self, version: int) -> None:
        self.versions[version] = tuple(self.chunks)
        self.snapshot.commit(np.array([1000 + version], np.uint64))


def publish_full(world: World, version: int) -> Iterator[None]:
    world.snapshot.begin(version)
    yield
    for chunk in range(CHUNKS):
        world.write(chunk, version)
        yield
    world.snapshot.restart_log()
    yield
    world.commit(version)
    yield


def publish(
    world: World, version: int, abandoned: bool = False, late: bool = False
) -> Iterator[None]:
    """One publish by its steps; given up before the tables when ``abandoned``. A mutant is ``late``
    in making the sequence odd."""
    if late:
        for chunk in touches(version):
            world.write(chunk, version)
            yield
    world.snapshot.begin(version)
    yield
    draft = Draft.begin(world.snapshot, version, version - 1, CHUNKS, 1, CHUNKS)
    assert draft is not None
    yield
    offsets, descriptors = [0] * CHUNKS, [0] * CHUNKS
    for chunk in touches(version):
        world.write(chunk, version)
        yield
        offset = draft.reserve(CHUNK_NBYTES)
        assert offset is not None
        yield
        draft.append(offset, content(version))
        offsets[chunk], descriptors[chunk] = offset, CHUNK_NBYTES << 7 | 3
        yield
    if abandoned:
        return
    draft.finish(
        np.array(offsets, np.uint64),
        np.array([0], np.uint32),
        np.array([1], np.uint64),
        np.array(descriptors, np.uint32),
        len(touches(version)),
    )
    yield
    world.snapshot.publish_record(draft.position)
    yield
    world.commit(version)
    yield


def history(late: bool = False) -> World:
    """A full publish, three deltas, the fourth abandoned: the log holds two records."""

    def steps() -> Iterator[None]:
        yield from publish_full(world, 1)
        for version in (2, 3, 4):
            yield from publish(world, version, late=late)
        yield from publish(world, 5, abandoned=True)

    world = World()
    world.run(steps())
    return world


def healing() -> World:
    """A delta, an abandoned one, the full publish after it, and a delta."""

    def steps() -> Iterator[None]:
        yield from publish_full(world, 1)
        yield from publish(world, 2)
        yield from publish(world, 3, abandoned=True)
        yield from publish_full(world, 4)
        yield from publish(world, 5)

    world = World()
    world.run(steps())
    return world


class Interleaved:
    """A memory whose reads fall where a script says; beyond its end, as early as they can."""

    def __init__(self, world: World, script: tuple[int, ...]) -> None:
        self.nbytes = world.snapshot.parts.nbytes
        self.others: list[tuple[int, ...]] = []  # scripts that go another way beyond this one's end
        self._world = world
        self._script = script
        self._taken: list[int] = []

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        for offset, target, nbytes in ranges.tolist():
            for begin in range(0, nbytes, LINE):
                size = min(LINE, nbytes - begin)
                into[target + begin : target + begin + size] = self._piece(offset + begin, size)

    def _piece(self, offset: int, size: int) -> bytes:
        images = self._world.images
        done = len(self._taken)
        if done < len(self._script):
            step = self._script[done]
        else:
            step = self._taken[-1] if self._taken else 0
            seen = {images[step][offset : offset + size]}
            for later in range(step + 1, len(images)):
                value = images[later][offset : offset + size]
                if value not in seen:
                    seen.add(value)
                    self.others.append((*self._taken, later))
        self._taken.append(step)
        return images[step][offset : offset + size]

    def mapped(self) -> memoryview | None:
        return None

    def close(self) -> None:
        pass


class Unchanging(Interleaved):
    """For the header, which nobody overwrites."""

    def _piece(self, offset: int, size: int) -> bytes:
        return self._world.images[0][offset : offset + size]


Reader = Callable[[Remote], tuple[int, Data] | None]
"""Reads a version: its number and data, or None. Any SnapshotError or VersionError is a refusal."""


@dataclass
class Outcome:
    paths: int = 0
    accepted: int = 0
    torn: int = 0


def explore(world: World, read: Reader, kind: type[Remote] = Remote) -> Outcome:
    """Runs the reader through all interleavings with the writer of ``world``."""
    outcome = Outcome()
    remote = kind(Unchanging(world, ()), "publisher", FOREVER)
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        memory = Interleaved(world, scripts.pop())
        remote.memory = memory
        remote._record_nbytes = 128  # as a reader that has read no record yet
        outcome.paths += 1
        try:
            found = read(remote)
        except (SnapshotError, VersionError):
            found = None
        scripts += memory.others
        if found is not None:
            outcome.accepted += 1
            version, data = found
            outcome.torn += data != world.versions.get(version)
    return outcome


def parts_of(raw: bytes) -> Data:
    return tuple(raw[i : i + CHUNK_NBYTES] for i in range(0, len(raw), CHUNK_NBYTES))


def read_data(remote: Remote) -> Data:
    raw = bytearray(CHUNKS * CHUNK_NBYTES)
    ranges = [
        [remote.data_offset(chunk * CHUNK_NBYTES), chunk * CHUNK_NBYTES, CHUNK_NBYTES]
        for chunk in range(CHUNKS)
    ]
    remote.memory.read(np.array(ranges, np.int64), memoryview(raw), FOREVER)
    return parts_of(bytes(raw))


def replay(remote: Remote, entries: list[Entry] | None, data: Data) -> Data | None:
    """The data with the records' changes; None if one of them was overwritten."""
    if entries is None:
        return None
    chunks = list(data)
    for entry in entries:
        record = entry.record
        changed = np.flatnonzero(record.descriptors)
        begins = record.chunk_offsets[changed].astype(np.int64)
        staged = remote.stage(entry, np.stack([begins, begins + CHUNK_NBYTES], axis=1), FOREVER)
        if staged is None:
            return None
        for chunk, bits in zip(changed.tolist(), parts_of(staged.tobytes()), strict=True):
            chunks[chunk] = bits
    return tuple(chunks)


def near(world: World, base: int, version: int) -> Reader:
    def read(remote: Remote) -> tuple[int, Data] | None:
        entries = remote.chain(base, version, FOREVER)
        data = replay(remote, entries, world.versions[base])
        return None if data is None else (version, data)

    return read


def in_full(remote: Remote) -> tuple[int, Data] | None:
    state = remote.state(FOREVER)
    if state.writing or state.version is None:
        return None
    digests = remote.digests(state, FOREVER)
    data = read_data(remote)
    remote.confirm_data(state.sequence, FOREVER)
    if digests.tolist() != [1000 + state.version]:
        return state.version, ()
    return state.version, data


def healed(remote: Remote) -> tuple[int, Data] | None:
    """A full read that was overtaken, made exact by the records since."""
    before = remote.state(FOREVER)
    if before.writing or before.version is None:
        return None
    data: Data | None = read_data(remote)
    after = remote.state(FOREVER)
    if after.writing or after.version is None:
        return None
    if after.version != before.version:
        entries = remote.chain(before.version, after.version, FOREVER)
        data = replay(remote, entries, data or ())
    return None if data is None else (after.version, data)


NEAR = [(1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]


@pytest.mark.parametrize(("base", "version"), NEAR)
def test_a_chain_of_records_is_whole_or_refused(base: int, version: int) -> None:
    world = history()
    outcome = explore(world, near(world, base, version))
    assert outcome.torn == 0 and outcome.accepted > 0 and outcome.paths > outcome.accepted


@pytest.mark.parametrize("make", [history, healing])
@pytest.mark.parametrize("read", [in_full, healed])
def test_a_full_read_is_of_one_version_or_refused(make: Callable[[], World], read: Reader) -> None:
    outcome = explore(make(), read)
    assert outcome.torn == 0 and outcome.accepted > 0 and outcome.paths > outcome.accepted


@pytest.mark.parametrize(("base", "version"), [(1, 2), (4, 5)])
def test_records_around_an_abandoned_publish(base: int, version: int) -> None:
    world = healing()
    outcome = explore(world, near(world, base, version))
    assert outcome.torn == 0 and outcome.accepted > 0


def test_no_record_leads_over_a_full_publish() -> None:
    world = healing()
    assert explore(world, near(world, 2, 4)).accepted == 0
    assert explore(world, near(world, 2, 5)).accepted == 0


class BlindToTail(Remote):
    def intact(self, position: int, deadline: Deadline) -> bool:
        return True


class BlindToSequence(Remote):
    def confirm_data(self, sequence: int, deadline: Deadline) -> None:
        pass


def with_late_tail(world: World) -> World:
    """A writer that stores the tail after it has overwritten: with the commit."""
    words = slice(WORDS_OFFSET + 24, WORDS_OFFSET + 32)
    tail = world.images[0][words]
    sequences = slice(WORDS_OFFSET, WORDS_OFFSET + 8)
    for step, image in enumerate(world.images):
        committed = image[WORDS_OFFSET] % 2 == 0
        if committed and step and image[sequences] != world.images[step - 1][sequences]:
            tail = image[words]
        world.images[step] = image[: words.start] + tail + image[words.stop :]
    return world


def unhealed(remote: Remote) -> tuple[int, Data] | None:
    before = remote.state(FOREVER)
    if before.writing or before.version is None:
        return None
    data = read_data(remote)
    after = remote.state(FOREVER)
    return None if after.writing or after.version is None else (after.version, data)


def mutants() -> dict[str, Callable[[], Outcome]]:
    def torn(world: World, read: Reader, kind: type[Remote] = Remote) -> Callable[[], Outcome]:
        return lambda: explore(world, read, kind)

    world, late = history(), with_late_tail(history())
    return {
        "the tail is not looked at after a read": torn(world, near(world, 1, 2), BlindToTail),
        "the tail moves after the overwriting": torn(late, near(late, 1, 2)),
        "the sequence is not looked at again": torn(world, in_full, BlindToSequence),
        "the sequence turns odd after the first bytes": torn(history(late=True), in_full),
        "an overtaken read is not healed": torn(world, unhealed),
    }


@pytest.mark.parametrize("name", list(mutants()))
def test_a_mutant_of_the_protocol_is_caught(name: str) -> None:
    assert mutants()[name]().torn > 0


def test_the_words_are_where_the_mutants_think() -> None:
    world = history()
    parts = world.snapshot.parts
    assert HEADER_NBYTES <= parts.digest_offset < parts.log_offset < parts.data_offset
    state = Remote(Interleaved(world, ()), "publisher", FOREVER).state(FOREVER)
    assert state == State(0, None, None, 0)
