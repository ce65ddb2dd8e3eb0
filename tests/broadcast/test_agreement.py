"""The ranks of an engine decide alike, whatever one of them meets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from worlds import AllReduce, on_threads

from kimisys.broadcast.agreement import Answers, OvertakenError, Part, PeerFailedError, Ranks
from kimisys.errors import SnapshotError


def fail(error: Exception) -> Part:
    raise error


def rounds(ranks: int, works: Callable[[int], Callable[[], Part]], times: int = 1) -> dict:
    combine = AllReduce(ranks)

    def run(rank: int) -> list[Answers]:
        # Numbers of ranks need not begin at 0, nor be in a row.
        speak = Ranks([10 * r + 3 for r in range(ranks)], 10 * rank + 3, (2, 3), combine)
        return [speak.together(works(rank)) for _ in range(times)]

    return on_threads(list(range(ranks)), run)


def test_words_and_sums_reach_every_rank() -> None:
    sums = np.full((2, 3), 2**63, np.uint64)  # they wrap around
    found = rounds(3, lambda rank: lambda: Part((rank, 2**64 - 1 - rank), sums + rank), times=4)
    for answers in found.values():
        for each in answers:
            assert each.words[:, 0].tolist() == [0, 1, 2]
            assert each.words[:, 1].tolist() == [2**64 - 1 - r for r in range(3)]
            assert (each.sums == np.uint64(2**63 + 3)).all() and not each.overtaken


def test_one_that_fails_is_heard_by_all() -> None:
    lost = ValueError("lost")
    found = rounds(3, lambda rank: lambda: fail(lost) if rank == 1 else Part())
    assert found[1] is lost
    for rank in (0, 2):
        assert type(found[rank]) is PeerFailedError  # a SnapshotError
        assert f"ranks [13] of the engine failed in this pull, so rank {10 * rank + 3}" in str(
            found[rank]
        )


def test_one_that_is_overtaken_is_heard_by_all_and_nobody_fails() -> None:
    found = rounds(2, lambda rank: lambda: fail(OvertakenError("late")) if rank else Part())
    assert [answers[0].overtaken for answers in found.values()] == [True, True]


def test_failing_weighs_more_than_being_overtaken() -> None:
    found = rounds(2, lambda rank: lambda: fail(OvertakenError("x") if rank else KeyError("y")))
    assert isinstance(found[0], KeyError) and isinstance(found[1], SnapshotError)


def test_alone_nothing_is_combined() -> None:
    alone = Ranks([0, 1], 1, (1, 1), None)
    answers = alone.together(lambda: Part((7,), np.ones((1, 1), np.uint64)))
    assert answers.words.tolist() == [[7, 0, 0]] and answers.sums.tolist() == [[1]]
    assert alone.together(lambda: fail(OvertakenError(""))).overtaken
    with pytest.raises(KeyError):
        alone.together(lambda: fail(KeyError()))


def test_a_broken_combine_does_not_hide_why_this_rank_failed() -> None:
    def broken(message: np.ndarray) -> np.ndarray:
        raise TimeoutError("the others are gone")

    ranks = Ranks([0, 1], 0, (1, 1), broken)
    with pytest.raises(TimeoutError, match="gone"):
        ranks.together(Part)
    with pytest.raises(KeyError) as caught:
        ranks.together(lambda: fail(KeyError("mine")))
    assert caught.value.__notes__ == ["the others are gone"]
