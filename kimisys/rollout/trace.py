"""A recorded run: the events that a scheduler was told, what it decided, and the same again.

A file begins with a line that names the format and its version, the length and CRC-32 of a JSON
header (the Config), and the header. Chunks follow, in the machine's byte order: "EVTS", the number
of EVENTs and of ACTIONs, a CRC-32 over the rest, the scheduler's digest after them, the EVENTs, the
ACTIONs. It is a record for study; what a crash may not lose is not its business.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Writes a run down. Raises SchedulerError if the file cannot be made; a file that is there
    already is replaced."""

    def __init__(self, path: Path, config: Config) -> None:
        header = json.dumps(config.fields()).encode()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise SchedulerError(
                f"cannot write the trace {path}: {error.strerror}; give another path, or none"
            ) from error
        self._file.write(_MAGIC + _HEADER.pack(len(header), zlib.crc32(header)) + header)
        self._events: list[bytes] = []
        self._actions: list[bytes] = []
        self._count = 0
        self._digest = 0

    def add(self, events: np.ndarray, actions: np.ndarray, digest: int) -> None:
        """EVENT[n] were handled together, ACTION[m] came of it; digest: the scheduler's then."""
        self._events.append(events.tobytes())
        if len(actions):
            self._actions.append(actions.tobytes())
        self._count += len(events)
        self._digest = digest
        if self._count >= _CHUNK_EVENTS:
            self.flush()

    def flush(self) -> None:
        """All that was added is in the file."""
        if self._count:
            events, actions = b"".join(self._events), b"".join(self._actions)
            self._events, self._actions, self._count = [], [], 0
            counts = len(events) // EVENT.itemsize, len(actions) // ACTION.itemsize
            body = events + actions
            check = zlib.crc32(body, zlib.crc32(struct.pack("=IIQ", *counts, self._digest)))
            self._file.write(_CHUNK.pack(_MARK, *counts, check, self._digest) + body)
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


@dataclass(frozen=True, eq=False)
class _Chunk:
    events: np.ndarray
    actions: np.ndarray
    digest: int


@dataclass(frozen=True, eq=False)
class Recording:
    """A trace as it was read. events: EVENT[n]. actions: ACTION[m]. unread: bytes at the end that
    are not a whole chunk."""

    config: Config
    chunks: list[_Chunk]
    unread: int

    @property
    def events(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, EVENT), *(c.events for c in self.chunks)])

    @property
    def actions(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, ACTION), *(c.actions for c in self.chunks)])


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
        end = middle + actions * ACTION.itemsize
        if end > len(data):
            raise _damaged(path, offset, f"{end - len(data)} bytes of the chunk are missing")
        counts = struct.pack("=IIQ", events, actions, digest)
        if zlib.crc32(data[start:end], zlib.crc32(counts)) != check:
            raise _damaged(path, offset, "the CRC-32 of the chunk is another")
        yield (
            _Chunk(
                np.frombuffer(data, EVENT, events, start),
                np.frombuffer(data, ACTION, actions, middle),
                digest,
            ),
            end,
        )
        offset = end


@dataclass(frozen=True)
class Difference:
    """Where a replay first decides otherwise.

    event: its number in the trace. recorded, replayed: what each did at it; error: the replaying
    scheduler refused it.
    """

    event: int
    recorded: list[Action]
    replayed: list[Action]
    error: str = ""


@dataclass(frozen=True, eq=False)
class Replay:
    """events: EVENT[n], those of the trace. actions: ACTION[m], those of the replay, up to the
    first difference. equal: every decision is the recorded one."""

    events: np.ndarray
    actions: np.ndarray
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
    done: list[np.ndarray] = [np.zeros(0, ACTION)]
    handled = 0
    for number, chunk in enumerate(recording.chunks):
        try:
            actions = scheduler.handle(chunk.events)
            equal = actions.tobytes() == chunk.actions.tobytes()
        except SchedulerError:
            equal = False
        if not equal or scheduler.digest() != chunk.digest:
            before = recording.chunks[:number]
            same, difference = _find(scheduler.config, before, chunk, handled)
            return Replay(
                recording.events, np.concatenate([*done, same]), False, difference, recording.unread
            )
        done.append(actions)
        handled += len(chunk.events)
    return Replay(recording.events, np.concatenate(done), True, None, recording.unread)


def _find(
    config: Config, before: list[_Chunk], chunk: _Chunk, handled: int
) -> tuple[np.ndarray, Difference]:
    """The chunk again, event by event. `handled` events were before it."""
    scheduler = Scheduler(config)
    for other in before:
        scheduler.handle(other.events)
    agreed = 0
    for number in range(len(chunk.events)):
        error = ""
        try:
            actions = scheduler.handle(chunk.events[number : number + 1])
        except SchedulerError as refusal:
            actions, error = np.zeros(0, ACTION), str(refusal)
        recorded = chunk.actions[agreed : agreed + len(actions)]
        last = number + 1 == len(chunk.events)
        if error or recorded.tobytes() != actions.tobytes() or last:
            # Nothing says how many of the recorded actions belong to this event alone.
            rest = chunk.actions[agreed:] if last else recorded
            return chunk.actions[:agreed], Difference(
                handled + number, as_actions(rest), as_actions(actions), error
            )
        agreed += len(actions)
    raise AssertionError("the last event of the chunk returns")
