"""How the ranks of one engine stay in step: whatever one of them meets, all decide alike.

All ranks sum one message, of one shape, at the same points of a pull. Beside the digests it has a
row of words for each rank, which only that rank fills: how its part went, and what it wishes. So a
rank that failed is heard where the others wait, and none of them takes a path alone.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimisys.errors import SnapshotError

Digests = npt.NDArray[np.uint64]

Combine = Callable[[Digests], Digests]
"""Sums a uint64[n] over the engine's ranks, mod 2^64 (as int64 the sum has the same bits)."""

WORDS = 3
"""Words that each rank may say, beside how its part went."""


class OvertakenError(SnapshotError):
    """What was being read is gone: another way, or a newer version, is to be taken."""


class PeerFailedError(SnapshotError):
    """Another rank of the same engine failed; its own error says why."""


class _Status(enum.IntEnum):
    DONE = 0
    OVERTAKEN = 1
    FAILED = 2


@dataclass(frozen=True)
class Part:
    """What one rank brings: up to WORDS words below 2^64, and its sums, uint64[rounds, tensors]."""

    words: Sequence[int] = ()
    sums: Digests | None = None


@dataclass(frozen=True)
class Answers:
    """What all ranks brought.

    Attributes:
        words: uint64[ranks, WORDS].
        sums: uint64[rounds, tensors], summed over the ranks.
        overtaken: whether any rank was; words and sums mean nothing then.
    """

    words: Digests
    sums: Digests
    overtaken: bool


class Ranks:
    """The ranks of one engine, as one of them speaks with the others in one pull.

    Args:
        ranks: all of them, in an order that all know. rank: this one.
        shape: of the sums, (rounds, tensors): the same on all ranks.
        combine: None for a rank that decides alone.
    """

    def __init__(
        self, ranks: Sequence[int], rank: int, shape: tuple[int, int], combine: Combine | None
    ) -> None:
        self._ranks = tuple(ranks) if combine is not None else (rank,)
        self._row = self._ranks.index(rank)
        self._shape = shape
        self._combine = combine

    def together(self, work: Callable[[], Part]) -> Answers:
        """Does this rank's part and waits for the others'.

        Raises what ``work`` raised, after the others were told (OvertakenError is no failure: it is
        in the answers); PeerFailedError when another rank failed; what ``combine`` raises.
        """
        part, status, failure = Part(), _Status.DONE, None
        try:
            part = work()
        except OvertakenError:
            status = _Status.OVERTAKEN
        except BaseException as error:
            status, failure = _Status.FAILED, error
        try:
            rows, sums = self._exchange(status, part)
        except BaseException as late:
            if failure is None:
                raise
            failure.add_note(str(late))  # this rank's own error tells more
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # it holds this frame: memory that it reaches would stay
        said = zip(self._ranks, rows[:, 0].tolist(), strict=True)
        failed = [rank for rank, status in said if status == _Status.FAILED]
        if failed:
            raise PeerFailedError(
                f"ranks {failed} of the engine failed in this pull, so rank "
                f"{self._ranks[self._row]} gives it up; their own errors say why"
            )
        return Answers(rows[:, 1:], sums, bool(rows[:, 0].any()))

    def _exchange(self, status: _Status, part: Part) -> tuple[Digests, Digests]:
        rows = np.zeros((len(self._ranks), 1 + WORDS), np.uint64)
        rows[self._row, 0] = status
        rows[self._row, 1 : 1 + len(part.words)] = part.words
        sums = np.zeros(self._shape, np.uint64) if part.sums is None else part.sums
        message = np.concatenate([rows.ravel(), sums.ravel()])
        if self._combine is not None:
            message = np.ascontiguousarray(self._combine(message)).view(np.uint64)
        return message[: rows.size].reshape(rows.shape), message[rows.size :].reshape(self._shape)
