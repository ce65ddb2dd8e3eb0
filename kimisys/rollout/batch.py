"""What the trainer gets."""

from __future__ import annotations

from dataclasses import dataclass

from kimisys.rollout.buffer import Group


@dataclass(frozen=True, eq=False)
class Dropped:
    """A group that will not be trained.

    reason: "stale", "failures" or "empty". error: what a segment of it failed with last; "": none.
    """

    group: Group
    reason: str
    error: str


@dataclass(frozen=True, eq=False)
class Batch:
    """What an iteration gave.

    number: of the iteration, from 0.
    groups: handed over, in the order of their offers.
    dropped: since the batch before.
    tokens: of output, made since the batch before, whichever group they belong to.
    seconds: from the scheduler's hearing that the trainer is ready to the batch.
    version: the newest that is published; -1: none.
    """

    number: int
    groups: list[Group]
    dropped: list[Dropped]
    tokens: int
    seconds: float
    version: int


class Gathering:
    """The batch that is being made."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.dropped: list[Dropped] = []
        self.tokens = 0
        self.asked: int | None = None  # microseconds: since when the trainer is ready
        self._number = 0

    def finish(self, now: int, version: int) -> Batch:
        """now: microseconds. What comes next belongs to the next batch."""
        seconds = 0.0 if self.asked is None else (now - self.asked) / 1e6
        batch = Batch(self._number, self.groups, self.dropped, self.tokens, seconds, version)
        self.groups, self.dropped, self.tokens, self.asked = [], [], 0, None
        self._number += 1
        return batch
