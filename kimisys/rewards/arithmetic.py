"""The strict checker of the arithmetic task: 1 or 0 for the outcome, nothing for near misses."""

from typing import Protocol

ANSWER_MARKER = "#"


class Answered(Protocol):
    """A problem whose right answer is known, in its one accepted spelling."""

    @property
    def answer(self) -> str: ...


def check(problem: Answered, completion: str, finished: bool) -> float:
    """1.0 if the completion ends in the marker and exactly the answer, else 0.0.

    completion: the decoded text without its closing <eos>. finished: whether <eos> closed it; what
    the token limit cut off is worth nothing, whatever it says. The marker must occur exactly once:
    two answers are no answer. Behind it everything counts, so a space, a sign, a leading zero or a
    special token makes the answer wrong. The scratchpad before the marker is not judged.
    """
    if not finished:
        return 0.0
    _, *answers = completion.split(ANSWER_MARKER)
    return 1.0 if answers == [problem.answer] else 0.0
