"""Pulling everything, also while the publishers go on.

Publishers do not wait for readers: one may begin to write while its blocks are read, and they may
be at different versions. Then what landed is *healed*: an element that was read has its value of
the version at which the read began, or of a later one, so replaying the records from there on makes
every element exact at the last of them. What was healed is digested anew, all of it.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from kimisys.broadcast.agreement import Digests, OvertakenError, Part
from kimisys.broadcast.pull import Pull, increment, total
from kimisys.broadcast.remote import Entry, Remote, State
from kimisys.errors import SnapshotError, VersionError

_PAUSE = 0.0005
"""Seconds between two looks at a trainer rank that has yet to publish."""


@dataclass(frozen=True)
class _Stand:
    """Where a trainer rank was when its blocks were about to be read."""

    state: State
    version: int
    digests: Digests


class Full:
    """All blocks, at one version: that asked for, or, for None, one that all ranks reach."""

    def __init__(self, pull: Pull, version: int | None) -> None:
        self._pull, self._version = pull, version
        self._stands: dict[int, _Stand] = {}
        self._landed: Digests
        self._expected: Digests

    def run(self) -> None:
        """Fills the destination and verifies it; all ranks of the engine end at one version.

        Raises:
            VersionError: a publisher has another version, or went on to another meanwhile.
            SnapshotError: a publisher is writing, dead or gone, or overtook this again and again
            until the deadline; or another rank of the engine failed.
            DigestError: what landed is not what was published.
        """
        pull, held = self._pull, self._pull.held
        pull.tally.replay = None
        held.suspect = True
        while True:
            answers = pull.ranks.together(self._land)
            if answers.overtaken:
                continue
            version = int(answers.words[:, 0].max())
            answers = pull.ranks.together(functools.partial(self._complete, version))
            if not answers.overtaken:
                break
        pull.tally.digests_checked = pull.way.compare(
            answers.sums,
            self._expected,
            f"version {version}",
            "what landed is not what was published",
            "do not serve from this destination; pull again, or publish again in full",
        )
        pull.tally.verified_fully = True
        held.version, held.digests, held.steps, held.suspect = version, self._expected, 0, False

    def _land(self) -> Part:
        pull = self._pull
        self._look_at_the_clock(", ".join(self._remote(rank).who for rank in pull.sources))
        with pull.tally.phase("read"):
            self._stands = {rank: self._stand(rank) for rank in pull.sources}
        pull.held.version = None
        self._landed = pull.land()
        with pull.tally.phase("read"):
            reached = {rank: self._reached(rank) for rank in pull.sources}
        version = max(reached.values())
        if self._version is not None and version != self._version:
            rank = max(reached, key=lambda each: reached[each])
            raise VersionError(
                f"{self._remote(rank).who}: version {self._version} was overwritten by "
                f"{version} while it was read; pull {version}, or None for the newest"
            )
        return Part(words=(version,))

    def _complete(self, version: int) -> Part:
        """Heals what landed up to ``version``, which some trainer rank has reached."""
        pull = self._pull
        with pull.tally.phase("read"):
            chains = {rank: self._chain(rank, version) for rank in pull.sources}
        for rank in pull.way.scatter.ranks:
            for entry in chains[rank]:
                self._replay(rank, entry, version)
        entries = [entry for chain in chains.values() for entry in chain]
        digests = total(stand.digests for stand in self._stands.values())
        self._expected = digests + increment(entries, len(digests))
        return Part(sums=pull.digest() if entries else self._landed)

    def _replay(self, rank: int, entry: Entry, version: int) -> None:
        pull = self._pull
        with pull.tally.phase("read"):
            staged = pull.stage(rank, entry)
        if staged.references.size and entry.record.version != version:
            raise OvertakenError(f"blocks of version {entry.record.version} are of a later one")
        pull.apply([staged])
        pull.refer([staged], version, subtract=False)

    def _stand(self, rank: int) -> _Stand:
        remote, deadline = self._remote(rank), self._pull.deadline
        while True:
            if self._version is None:
                state = remote.settled(deadline)
            else:
                state = remote.readable(self._version, deadline)
            if state.version is None:
                raise VersionError(f"{remote.who}: it has published no version yet; publish one")
            try:
                return _Stand(state, state.version, remote.digests(state, deadline))
            except SnapshotError:
                self._look_at_the_clock(remote.who)
                if remote.state(deadline).sequence == state.sequence:
                    raise  # not because it began to write

    def _reached(self, rank: int) -> int:
        """The latest version of which what landed may have something."""
        remote, deadline, stand = self._remote(rank), self._pull.deadline, self._stands[rank]
        if remote.state(deadline).sequence == stand.state.sequence:
            return stand.version
        return remote.settled(deadline).version or 0

    def _chain(self, rank: int, version: int) -> list[Entry]:
        """From where this rank was read to ``version``, which it may have yet to publish."""
        remote, stand = self._remote(rank), self._stands[rank]
        if stand.version == version:
            return []
        while (remote.newest(self._pull.deadline) or 0) < version:
            self._look_at_the_clock(remote.who)
            time.sleep(_PAUSE)
        return self._pull.chain(rank, stand.version, version)

    def _remote(self, rank: int) -> Remote:
        return self._pull.sources[rank].remote

    def _look_at_the_clock(self, who: str) -> None:
        deadline = self._pull.deadline
        try:
            deadline.remaining()
        except TimeoutError as error:
            raise SnapshotError(
                f"{who}: no whole version could be read within {deadline.seconds:g} s: it overtook "
                "every attempt, or did not come to the version of the others; publish on every "
                "rank, less often, with a larger log, or wait longer"
            ) from error
