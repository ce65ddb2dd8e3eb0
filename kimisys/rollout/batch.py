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
