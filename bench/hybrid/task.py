"""Long-tailed completions on a toy model: additions whose scratchpad begins with a countdown.

    kimisys train --task bench/hybrid/task.py:task

A prompt names a number beside its sum, `58+76,004=`; the completion counts down from it before it
adds column by column: `004,003,002,001,8+6=14,5+7=12+1=13#134`. Counting down is learned at once,
so completions are about as long as the numbers make them: the logarithm of a completion's length is
normal with standard deviation 1 around log MEDIAN, cut below by the addition itself and above by
LONGEST. All samples of a prompt are about equally long. Whether the sum is right does not depend on
the length, and the demonstrations forget carries, as those of the reference task do: RL has to
unlearn that.
"""

import math
import random

from kimisys.rewards.arithmetic import check
from kimisys.trainer.arithmetic import carries, split_of, write_out
from kimisys.trainer.problem_file import Split
from kimisys.trainer.task import Demonstration, Problem, Task

MEDIAN = 64  # tokens of a completion
LONGEST = 512
SIGMA = 1.0
_COUNT = 4  # tokens of one count, `004,`
_ADDITION = 20  # tokens of an addition of two digits, in the mean, with the end of the sequence
_FORGOTTEN_CARRIES = 0.7


def task() -> Task:
    """1,024 problems, 256 held-out ones, 9,600 demonstrations; always the same."""
    return Task(
        problems=_problems("train", 1024),
        held_out=_problems("held_out", 256),
        check=check,
        max_completion_tokens=LONGEST + 2 * _COUNT,
        demonstrations=_demonstrations(9600),
    )


def _problems(split: Split, count: int) -> list[Problem]:
    source = random.Random(f"hybrid {split}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        first, second, number = _drawn(source, split)
        prompt = _prompt(first, second, number)
        found[prompt] = Problem(prompt, str(first + second), float(carries(first, second)))
    return list(found.values())


def _demonstrations(count: int) -> list[Demonstration]:
    source = random.Random("hybrid demonstrations")
    shown = []
    for _ in range(count):
        first, second, number = _drawn(source, "train")
        countdown = "".join(f"{n:03d}," for n in range(number, 0, -1))
        addition = write_out(first, second, _FORGOTTEN_CARRIES, 0.0, source)
        shown.append(Demonstration(_prompt(first, second, number), countdown + addition))
    return shown


def _drawn(source: random.Random, split: Split) -> tuple[int, int, int]:
    """Two summands of the split and a number to count down from."""
    while True:
        first, second = source.randrange(10, 100), source.randrange(10, 100)
        if split_of(first, second) == split:
            tokens = min(LONGEST, MEDIAN * math.exp(SIGMA * source.gauss(0.0, 1.0)))
            return first, second, max(0, round((tokens - _ADDITION) / _COUNT))


def _prompt(first: int, second: int, number: int) -> str:
    return f"{first}+{second},{number:03d}="
