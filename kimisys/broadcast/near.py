"""Pulling by deltas: step by step from the version that the destination holds.

Each step is staged in private memory and measured: what would it add to the digests of what is
there? Only when that is what the publishers announced, over all ranks of the engine, it is written.
So a damaged record, and a destination that has drifted, are found before anything has changed. Only
blocks by reference, which are not in the log, are written while they are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kimisys._core.broadcast import Staged
from kimisys.broadcast.agreement import Digests, OvertakenError, Part
from kimisys.broadcast.pull import Pull, increment
from kimisys.broadcast.remote import Entry


@dataclass(frozen=True)
class Step:
    """One version's records, by trainer rank, and what they add to the digests together."""

    version: int
    entries: Mapping[int, Entry]
    increment: Digests


class Near:
    """The chain from the version that is held to a later one."""

    def __init__(self, pull: Pull, version: int) -> None:
        self._pull = pull
        self._version = version
        self._steps: list[Step] = []
        self._staged: list[Staged] = []
        self.done = 0  # steps

    def run(self) -> bool:
        """Takes all steps. False when a rank was overtaken: what is held may be anything from the
        old version to the new one, or, where it is None, torn.

        Raises:
            DigestError: a step does not fit; nothing of it was written, or ``held.version`` is
            None. SnapshotError: a publisher is gone, a record is malformed, or another rank failed.
        """
        pull, held = self._pull, self._pull.held
        pull.tally.replay = []
        while held.version != self._version:
            suspect, held.suspect = held.suspect, True  # unless this goes well
            answers = pull.ranks.together(self._measure)
            if answers.overtaken:
                return False
            step = self._steps[self.done]
            pull.tally.digests_checked = pull.way.compare(
                answers.sums,
                step.increment,
                f"version {step.version}",
                "what came, or what is held, is not what was published",
                "nothing of it was written; the next pull is full"
                if held.version is not None
                else "do not serve from this destination before the next pull, which is full",
            )
            held.version = None
            pull.apply(self._staged)
            held.version = step.version
            held.digests = held.digests + step.increment
            held.steps += 1
            held.suspect = suspect
            self.done += 1
        return True

    def _measure(self) -> Part:
        pull = self._pull
        with pull.tally.phase("read"):
            if not self._steps:
                assert pull.held.version is not None
                self._steps = self._chain(pull.held.version)
            step = self._steps[self.done]
            self._staged = [pull.stage(r, step.entries[r]) for r in pull.way.scatter.ranks]
        referring = [each for each in self._staged if each.references.size]
        if referring and step.version != self._version:
            raise OvertakenError(f"blocks of version {step.version} are of a later one by now")
        sums = pull.measure(self._staged)
        if referring:
            pull.held.version = None  # written, and not verified yet
            pull.tally.replay = None
            sums += pull.refer(referring, step.version, subtract=True)
        elif pull.tally.replay is not None:
            pull.tally.replay.append(self._staged)
        return Part(sums=sums)

    def _chain(self, base: int) -> list[Step]:
        pull = self._pull
        chains = {rank: pull.chain(rank, base, self._version) for rank in pull.sources}
        versions = {tuple(e.record.version for e in chain) for chain in chains.values()}
        if len(versions) != 1:
            raise OvertakenError("the trainer ranks published different versions on the way")
        return [
            Step(
                entries[0].record.version,
                dict(zip(chains, entries, strict=True)),
                increment(entries, len(pull.way.tensors)),
            )
            for entries in zip(*chains.values(), strict=True)
        ]
