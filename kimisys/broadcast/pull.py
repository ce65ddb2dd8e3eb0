"""What both ways of pulling have in common: reading, landing and counting, for one engine rank."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimisys._core.broadcast import Scatter, Staged, digest
from kimisys.broadcast.agreement import Digests, OvertakenError, Ranks
from kimisys.broadcast.remote import Entry, Remote
from kimisys.broadcast.rounds import Round
from kimisys.broadcast.transport import Meter
from kimisys.broadcast.wire import Deadline
from kimisys.errors import DigestError, VersionError

Buffers = Mapping[tuple[int, str], Any]
"""(rank, buffer name) to any C-contiguous, writable buffer of the layout's size."""

_WINDOW_NBYTES = 64 << 20
"""Read at once where a publisher's memory is not mapped here."""
_EVERYTHING = 1 << 62


@dataclass
class Held:
    """What the destination holds.

    Attributes:
        version: verified there; None when it may hold anything.
        digests: of that version, uint64[tensors].
        steps: by deltas, since everything was digested.
        suspect: something did not fit: the next pull is full.
    """

    version: int | None = None
    digests: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    steps: int = 0
    suspect: bool = True


@dataclass(frozen=True)
class Way:
    """How this rank's elements are reached and counted: alone, or together with other ranks.

    Attributes:
        scatter: from the trainer ranks' memory to this rank's buffers.
        rounds: of the digests.
        tensors: names, in the order of the digests.
        who: names this rank in errors.
    """

    scatter: Scatter
    rounds: Sequence[Round]
    tensors: Sequence[str]
    who: str

    @functools.cached_property
    def full_nbytes(self) -> int:
        """Of data that a full pull reads."""
        windows = [self.scatter.windows(r, None, _EVERYTHING) for r in self.scatter.ranks]
        return sum(int(w.ranges[:, 1].sum()) for each in windows for w in each)

    @property
    def shape(self) -> tuple[int, int]:
        """Of sums: (rounds, tensors)."""
        return len(self.rounds), len(self.tensors)

    def compare(self, sums: Digests, expected: Digests, where: str, what: str, remedy: str) -> int:
        """Tensors compared. Raises DigestError, naming those whose sums are not as expected."""
        index = {name: i for i, name in enumerate(self.tensors)}
        wrong: set[str] = set()
        names: set[str] = set()
        for each, row in zip(self.rounds, sums, strict=True):
            names.update(each.names)
            wrong.update(n for n in each.names if row[index[n]] != expected[index[n]])
        if wrong:
            raise DigestError(f"{where} at {self.who}: {what} in {listed(sorted(wrong))}; {remedy}")
        return len(names)


@dataclass
class Tally:
    """What a pull has read, written and spent so far."""

    changed: int = 0
    referred_nbytes: int = 0
    digests_checked: int = 0
    verified_fully: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    touched: set[tuple[int, str]] = field(default_factory=set)
    replay: list[list[Staged]] | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass(frozen=True)
class Source:
    """A trainer rank that publishes, as one subscriber reads it."""

    remote: Remote
    meter: Meter


class Pull:
    """One rank's part of one pull.

    Args:
        sources: all trainer ranks that publish, by rank.
        way: how this rank's elements are reached and counted.
        ranks: those of the engine, to stay in step with.
        held: what the destination holds; kept up to date.
        destinations, threads: see Subscriber.pull.
        deadline: for all waits for publishers.
    """

    def __init__(
        self,
        sources: Mapping[int, Source],
        way: Way,
        ranks: Ranks,
        held: Held,
        destinations: Buffers,
        threads: int,
        deadline: Deadline,
    ) -> None:
        self.tally = Tally()
        self.sources, self.way, self.ranks, self.held = sources, way, ranks, held
        self.deadline = deadline
        self.threads = threads
        self._destinations = destinations

    def check(self) -> None:
        """Raises BufferMismatchError, LayoutError unless the destination can be written."""
        self.way.scatter.measure([], self._destinations, self.threads)

    def newest(self, rank: int, asked: int | None) -> int:
        """The newest version that a trainer rank has, at least that asked for.

        Waits while it is being written. Raises VersionError if the rank does not have it.
        """
        remote = self.sources[rank].remote
        with self.tally.phase("read"):
            newest = remote.newest(self.deadline)
            if newest is None or (asked is not None and newest < asked):
                newest = remote.settled(self.deadline).version
        if newest is None:
            raise VersionError(
                f"{remote.who}: it has published no version yet; publish on every rank before the "
                "pull"
            )
        if asked is not None and newest < asked:
            raise VersionError(
                f"{remote.who}: it has version {newest}, asked was {asked}; publish {asked} on "
                "every rank before the pull, or pull what is published"
            )
        return newest

    def chain(self, rank: int, base: int, version: int) -> list[Entry]:
        """Raises OvertakenError when the log has no such chain any more."""
        if base == version:
            return []
        source = self.sources[rank].remote
        chain = source.chain(base, version, self.deadline)
        if chain is None:
            raise OvertakenError(f"{source.who}: no chain from {base} to {version} in its log")
        return chain

    def stage(self, rank: int, entry: Entry) -> Staged:
        """Brings what is needed of a record into private memory. Raises OvertakenError."""
        source = self.sources[rank].remote
        ranges = self.way.scatter.payload(rank, entry.record)
        ranges[:, 1] += ranges[:, 0]
        payload = source.stage(entry, ranges, self.deadline)
        if payload is None:
            raise OvertakenError(f"{source.who}: version {entry.record.version} left its log")
        return self.way.scatter.stage(rank, entry.record, payload)

    def measure(self, staged: Sequence[Staged]) -> Digests:
        """What this would add to the digests, uint64[rounds, tensors]; references left out."""
        with self.tally.phase("measure"):
            return self.way.scatter.measure(staged, self._destinations, self.threads)

    def apply(self, staged: list[Staged]) -> None:
        """Writes what was staged; references left out."""
        with self.tally.phase("apply"):
            scatter = self.way.scatter
            self.tally.changed += scatter.apply(staged, self._destinations, self.threads)
            self.tally.touched |= scatter.touched(staged)

    def refer(self, staged: Sequence[Staged], version: int, subtract: bool) -> Digests:
        """Lands the blocks that a step has by reference, from data that must be ``version``.

        Raises OvertakenError when the data is, or became meanwhile, of another version.
        """
        sums = [np.zeros(self.way.shape, np.uint64)]
        for each in staged:
            if not each.references.size:
                continue
            remote = self.sources[each.rank].remote
            state = remote.state(self.deadline)
            there = state.version == version and not state.writing
            if there:
                with self.tally.phase("land"):
                    sums.append(self._land(each.rank, each.references, subtract))
            if not there or remote.state(self.deadline).sequence != state.sequence:
                raise OvertakenError(f"{remote.who}: blocks of version {version} are overwritten")
        return total(sums)

    def land(self) -> Digests:
        """Writes all needed blocks. Returns the sums of what was written."""
        with self.tally.phase("land"):
            scatter = self.way.scatter
            scatter.fill_padding(self._destinations)
            zero = np.zeros(self.way.shape, np.uint64)
            return total([zero, *(self._land(rank, None, False) for rank in scatter.ranks)])

    def digest(self) -> Digests:
        """The sums of all that the destination holds."""
        with self.tally.phase("verify"):
            return np.stack(
                [digest(each.layout, self._destinations, self.threads) for each in self.way.rounds]
            )

    def _land(self, rank: int, blocks: Any, subtract: bool) -> Digests:
        source = self.sources[rank]
        mapped = source.remote.memory.mapped()
        begin = source.remote.parts.data_offset
        sums = [np.zeros(self.way.shape, np.uint64)]
        limit = _EVERYTHING if mapped is not None else _WINDOW_NBYTES
        for window in self.way.scatter.windows(rank, blocks, limit):
            ranges = window.ranges
            if blocks is not None:
                self.tally.referred_nbytes += int(ranges[:, 1].sum())
            if mapped is not None:
                image = mapped[begin + window.begin : begin + window.end]
                source.meter.nbytes_read += int(ranges[:, 1].sum())
            else:
                image = memoryview(bytearray(window.end - window.begin))
                columns = [begin + ranges[:, 0], ranges[:, 0] - window.begin, ranges[:, 1]]
                source.remote.memory.read(np.stack(columns, axis=1), image, self.deadline)
            sums.append(
                self.way.scatter.land(
                    rank,
                    window.blocks,
                    image,
                    window.begin,
                    self._destinations,
                    subtract,
                    self.threads,
                )
            )
        return total(sums)


def total(sums: Iterable[Digests]) -> Digests:
    """The sum mod 2^64 of arrays of one shape; at least one."""
    return np.add.reduce(list(sums), axis=0, dtype=np.uint64)


def increment(entries: Iterable[Entry], tensors: int) -> Digests:
    """What publishers say that their records add to the digests, uint64[tensors]."""
    sums = np.zeros(tensors, np.uint64)
    for entry in entries:
        np.add.at(sums, entry.record.tensors, entry.record.increments)
    return sums


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message, not too many."""
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
