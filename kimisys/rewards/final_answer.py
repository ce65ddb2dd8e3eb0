"""The checker of problem files: the final answer counts, the way to it does not."""

from kimisys.rewards.arithmetic import ANSWER_MARKER, Answered


def check(problem: Answered, completion: str, finished: bool) -> float:
    """1.0 if the text behind the last `#` is the answer, else 0.0; white space around both is off.

    completion: the decoded text without its end-of-sequence token. finished: whether that token
    closed it; what the token limit cut off is worth nothing, whatever it says. `####`, as some data
    sets write it, ends in the same marker. Without a marker the whole completion is the answer.
    An answer that holds a `#` itself cannot be told from a marker and is never right.
    """
    if not finished:
        return 0.0
    answer = completion.rpartition(ANSWER_MARKER)[2]
    return 1.0 if answer.strip() == problem.answer.strip() else 0.0
