"""A recorded run: the events that a scheduler was told, what it decided, and the same again.

A file begins with a line that names the format and its version, the length and CRC-32 of a JSON
header (the Config), and the header. Chunks follow, in the machine's byte order: "EVTS", the number
of EVENTs and of ACTIONs, a CRC-32 over the rest, the scheduler's digest after them, the EVENTs, the
ACTIONs, and for each of these the index of the event in the chunk that it answers (int64). It is a
record for study; what a crash may not lose is not its business.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kimisys._core.rollout import ACTION, EVENT, Action, Config, Scheduler, as_actions
from kimisys.errors import SchedulerError

_MAGIC = b"kimisys rollout trace 1\n"
_HEADER = struct.Struct("=II")  # length, CRC-32
_CHUNK = struct.Struct("=4sIIIQ")  # mark, events, actions, CRC-32, digest
_MARK = b"EVTS"
_CHUNK_EVENTS = 4096


class Trace:
    """Writes a run down. Raises SchedulerError if the file cannot be made or written; one that is
    there already is replaced."""

    def __init__(self, path: Path, config: Config) -> None:
        header = json.dumps(config.fields()).encode()
        try:
            self._file = path.open(
                "wb", buffering=0
            )  # so that errors come at once, and closing has none
        except OSError as error:
            raise SchedulerError(
                f"cannot write the trace {path}: {error.strerror}; give another path, or none"
            ) from error
        self._path = path
        self._write(_MAGIC + _HEADER.pack(len(header), zlib.crc32(header)) + header)
        self._events: list[bytes] = []
        self._actions: list[bytes] = []
        self._answers: list[bytes] = []
        self._count = 0
        self._digest = 0

    def add(
        self, events: np.ndarray, actions: np.ndarray, answers: np.ndarray, digest: int
    ) -> None:
        """EVENT[n] were handled; ACTION[m] came of it, int64[m] their events' indices; digest: the
        scheduler's then."""
        self._events.append(events.tobytes())
        if len(actions):
            self._actions.append(actions.tobytes())
            self._answers.append((answers + self._count).tobytes())
        self._count += len(events)
        self._digest = digest
        if self._count >= _CHUNK_EVENTS:
            self.flush()

    def flush(self) -> None:
        """All that was added is in the file."""
        if self._count:
            body = b"".join([*self._events, *self._actions, *self._answers])
            counts = self._count, sum(map(len, self._actions)) // ACTION.itemsize
            self._events, self._actions, self._answers, self._count = [], [], [], 0
            check = zlib.crc32(body, zlib.crc32(struct.pack("=IIQ", *counts, self._digest)))
            self._write(_CHUNK.pack(_MARK, *counts, check, self._digest) + body)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise SchedulerError(
                f"cannot write the trace {self._path}: {error.strerror}; make room, or record none"
            ) from error


@dataclass(frozen=True, eq=False)
class _Chunk:
    events: np.ndarray
    actions: np.ndarray
    answers: np.ndarray
    digest: int


@dataclass(frozen=True, eq=False)
class Recording:
    """A trace as it was read. events: EVENT[n]. actions: ACTION[m], as they were decided then;
    answers: int64[m], the index of the event that each answers. unread: bytes at the end that are
    not a whole chunk."""

    config: Config
    chunks: list[_Chunk]
    unread: int

    @property
    def events(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, EVENT), *(c.events for c in self.chunks)])

    @property
    def actions(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, ACTION), *(c.actions for c in self.chunks)])

    @property
    def answers(self) -> np.ndarray:
        found, before = [np.zeros(0, np.int64)], 0
        for chunk in self.chunks:
            found.append(chunk.answers + before)
            before += len(chunk.events)
        return np.concatenate(found)


def read_trace(path: Path, *, partial: bool = False) -> Recording:
    """Reads what `Trace` wrote.

    partial: stop before the first byte that is not a whole and undamaged chunk, as the writing of
    a run that died leaves them, instead of raising.
    Raises SchedulerError naming the offset of what is damaged or cut off; a damaged header always.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SchedulerError(f"cannot read the trace {path}: {error.strerror}") from error
    config, offset = _read_config(path, data)
    chunks = []
    try:
        for chunk, end in _read_chunks(path, data, offset):
            chunks.append(chunk)
            offset = end
    except SchedulerError:
        if not partial:
            raise
    return Recording(config, chunks, len(data) - offset)


def _damaged(path: Path, offset: int, what: str) -> SchedulerError:
    return SchedulerError(
        f"the trace {path} is damaged at byte {offset}: {what}; partial=True takes what is whole "
        "before it"
    )


def _read_config(path: Path, data: bytes) -> tuple[Config, int]:
    if not data.startswith(_MAGIC):
        raise SchedulerError(
            f"{path} does not begin with {_MAGIC!r}: it is no trace, or one of another version"
        )
    start = len(_MAGIC) + _HEADER.size
    if len(data) < start:
        raise SchedulerError(f"the trace {path} ends at byte {len(data)}, within its header")
    length, check = _HEADER.unpack_from(data, len(_MAGIC))
    header = data[start : start + length]
    if len(header) != length or zlib.crc32(header) != check:
        raise SchedulerError(f"the header of the trace {path}, at byte {start}, is damaged")
    fields: dict[str, Any] = json.loads(header)
    try:
        return Config(**fields), start + length
    except (TypeError, ValueError) as error:
        raise SchedulerError(
            f"the trace {path} was recorded with other fields of Config: {error}; replay it with "
            "the release that recorded it"
        ) from error


def _read_chunks(path: Path, data: bytes, offset: int) -> Iterator[tuple[_Chunk, int]]:
    """Each chunk with the offset after it."""
    while offset < len(data):
        if len(data) - offset < _CHUNK.size:
            raise _damaged(path, offset, "it ends within a chunk's head")
        mark, events, actions, check, digest = _CHUNK.unpack_from(data, offset)
        if mark != _MARK:
            raise _damaged(path, offset, f"{mark!r} is where a chunk begins")
        start = offset + _CHUNK.size
        middle = start + events * EVENT.itemsize
        last = middle + actions * ACTION.itemsize
        end = last + actions * 8
        if end > len(data):
            raise _damaged(path, offset, f"{end - len(data)} bytes of the chunk are missing")
        counts = struct.pack("=IIQ", events, actions, digest)
        if zlib.crc32(data[start:end], zlib.crc32(counts)) != check:
            raise _damaged(path, offset, "the CRC-32 of the chunk is another")
        yield (
            _Chunk(
                np.frombuffer(data, EVENT, events, start),
                np.frombuffer(data, ACTION, actions, middle),
                np.frombuffer(data, np.int64, actions, last),
                digest,
            ),
            end,
        )
        offset = end


@dataclass(frozen=True)
class Difference:
    """Where a replay first decides otherwise.

    event: its number in the trace. recorded, replayed: the first action in its answer that is not
    the same; None: there was none. error: why the replaying scheduler refused the event.
    """

    event: int
    recorded: Action | None
    replayed: Action | None
    error: str


@dataclass(frozen=True, eq=False)
class Replay:
    """What came of a replay.

    config: replayed with. events: EVENT[n], those of the trace.
    actions: ACTION[m], those of the replay, up to the first difference; answers: int64[m], the
        index of the event that each answers.
    equal: every decision is the recorded one.
    unread: bytes at the end of the file that are not a whole chunk.
    """

    config: Config
    events: np.ndarray
    actions: np.ndarray
    answers: np.ndarray
    equal: bool
    first_difference: Difference | None
    unread: int


def replay(path: Path, *, partial: bool = False, config: Config | None = None) -> Replay:
    """Tells a new Scheduler the events of a trace again and compares what it decides.

    partial: see `read_trace`. config: another than the recorded one, to see where it would have
    decided otherwise.
    """
    recording = read_trace(path, partial=partial)
    scheduler = Scheduler(config or recording.config)
    done = [np.zeros(0, ACTION)]
    answers = [np.zeros(0, np.int64)]
    handled = 0
    difference = None
    for chunk in recording.chunks:
        actions, indices, taken, error = _handle(scheduler, chunk.events)
        found = _compare(chunk, actions, indices, taken, error)
        if found is not None:
            agreed, first = found
            actions, indices = actions[:agreed], indices[:agreed]
            difference = replace(first, event=first.event + handled)
        elif config is None and scheduler.digest() != chunk.digest:
            last = handled + len(chunk.events) - 1
            difference = Difference(last, None, None, "the digests differ: another release's?")
        done.append(actions)
        answers.append(indices + handled)
        handled += len(chunk.events)
        if difference is not None:
            break
    return Replay(
        scheduler.config,
        recording.events,
        np.concatenate(done),
        np.concatenate(answers),
        difference is None,
        difference,
        recording.unread,
    )


def _handle(scheduler: Scheduler, events: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Actions, their events' indices, how many events were taken, why the next was refused."""
    try:
        return *scheduler.handle_each(events), len(events), ""
    except SchedulerError as error:
        refused: Any = error  # the scheduler's has what it decided before
        return refused.actions, refused.answers, refused.taken, str(error)


def _first(actions: np.ndarray, index: int) -> Action | None:
    return as_actions(actions[index : index + 1])[0] if index < len(actions) else None


def _compare(
    chunk: _Chunk, actions: np.ndarray, answers: np.ndarray, taken: int, error: str
) -> tuple[int, Difference] | None:
    """How many actions are the same, and the first event that has others, counted in the chunk;
    None: all are the same."""
    shared = min(len(actions), len(chunk.actions))
    unequal = (actions[:shared] != chunk.actions[:shared]) | (
        answers[:shared] != chunk.answers[:shared]
    )
    agreed = int(unequal.argmax()) if unequal.any() else shared
    if not error and agreed == len(actions) == len(chunk.actions):
        return None
    event = min(
        [taken] * bool(error)
        + [int(side[agreed]) for side in (answers, chunk.answers) if agreed < len(side)]
    )
    recorded, replayed = (
        _first(side, agreed) if agreed < len(indices) and indices[agreed] == event else None
        for side, indices in ((chunk.actions, chunk.answers), (actions, answers))
    )
    return agreed, Difference(event, recorded, replayed, error if event == taken else "")
