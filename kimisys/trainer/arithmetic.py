"""The task that ships with the project: additions with a written-out scratchpad, made from a seed.

A problem is `583+767=`. The scratchpad adds column by column, the ones first, and then adds
the carry of the column before; the answer follows the marker:

    583+767=3+7=10,8+6=14+1=15,5+7=12+1=13#1350

Demonstrations (for SFT) are those of a careless pupil, who forgets a carry more often than not and
goes on consistently: `3+7=10,8+6=14,5+7=12#1240`. Imitation copies the habit. RL sees no
demonstration, only whether the final answer is right, and has to unlearn it: that is what the
reference run shows.

Split: a hash of the problem decides whether it is held out, so nothing that is trained on, by SFT
or by RL, is ever among the held-out problems. `123+456` and `456+123` share one fate.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from kimisys.rewards.arithmetic import ANSWER_MARKER

Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 10
_DRAWS_PER_HELD_OUT = 50 * HELD_OUT_ONE_IN


@dataclass(frozen=True)
class ArithmeticConfig:
    """What the problems and the demonstrations are like."""

    digits: int = 3
    """Digits of each summand; the first is not zero."""
    forgotten_carries: float = 0.7
    """The probability that a demonstration forgets a carry; at 0 all demonstrations are right."""

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits is {self.digits}; it must be at least 1")
        if not 0.0 <= self.forgotten_carries <= 1.0:
            raise ValueError(f"forgotten_carries is {self.forgotten_carries}; it is a probability")


@dataclass(frozen=True)
class Problem:
    """A prompt, its right answer, and one way to write it out, wrong if a carry was forgotten."""

    prompt: str
    answer: str
    completion: str

    @property
    def demonstration(self) -> str:
        """Prompt and completion, as one text without the closing <eos>."""
        return self.prompt + self.completion


class ArithmeticTask:
    """Problems, demonstrations and the held-out set, all of them functions of a seed."""

    def __init__(self, config: ArithmeticConfig | None = None) -> None:
        self._config = config or ArithmeticConfig()

    @property
    def max_prompt_tokens(self) -> int:
        """Characters of the longest prompt."""
        return 2 * self._config.digits + 2

    @property
    def max_completion_tokens(self) -> int:
        """Characters of the longest right completion, and its <eos>."""
        nines = 10**self._config.digits - 1
        return len(write_out(nines, nines)) + 1

    def problems(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` problems of the training split, without slips: what RL samples in one step."""
        return self._train(random.Random(f"rl {seed} {step}"), count, 0.0)

    def sft_examples(self, seed: int, count: int) -> list[Problem]:
        """`count` problems of the training split with demonstrations of the careless pupil."""
        forgotten = self._config.forgotten_carries
        return self._train(random.Random(f"sft {seed}"), count, forgotten)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` distinct held-out problems, without slips; the same in every run.

        Raises ValueError when problems of this size do not give that many.
        """
        source = random.Random("held out")
        found: dict[str, Problem] = {}
        for _ in range(_DRAWS_PER_HELD_OUT * count):
            if len(found) == count:
                break
            first, second = self._summands(source)
            if split_of(first, second) == "held_out":
                problem = _problem(first, second, 0.0, source)
                found.setdefault(problem.prompt, problem)
        if len(found) < count:
            raise ValueError(
                f"additions of {self._config.digits} digits gave {len(found)} held-out problems, "
                f"{count} were asked for; use more digits"
            )
        return list(found.values())

    def _train(self, source: random.Random, count: int, forgotten: float) -> list[Problem]:
        problems: list[Problem] = []
        while len(problems) < count:
            first, second = self._summands(source)
            if split_of(first, second) == "train":
                problems.append(_problem(first, second, forgotten, source))
        return problems

    def _summands(self, source: random.Random) -> tuple[int, int]:
        low, high = 10 ** (self._config.digits - 1), 10**self._config.digits
        return source.randrange(low, high), source.randrange(low, high)


def _problem(first: int, second: int, forgotten: float, source: random.Random) -> Problem:
    return Problem(
        prompt=f"{first}+{second}=",
        answer=str(first + second),
        completion=write_out(first, second, forgotten, source),
    )


def split_of(first: int, second: int) -> Split:
    """The split of `first` + `second`: a hash of the unordered pair; one in ten is held out."""
    pair = f"{min(first, second)}+{max(first, second)}".encode()
    digest = hashlib.blake2b(pair, digest_size=8, person=b"kimisys+").digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"


def write_out(
    first: int, second: int, forgotten: float = 0.0, source: random.Random | None = None
) -> str:
    """The scratchpad and the answer of `first` + `second`, numbers of equally many digits.

    forgotten: the probability that a carry is not taken into the next column, drawn from `source`.
    """
    columns, answer, carry = [], "", 0
    digits = list(zip(reversed(str(first)), reversed(str(second)), strict=True))
    for place, (a, b) in enumerate(digits):
        total = int(a) + int(b)
        column = f"{a}+{b}={total}"
        if carry:
            total += 1
            column += f"+1={total}"
        columns.append(column)
        last = place == len(digits) - 1
        answer = (str(total) if last else str(total % 10)) + answer
        carry = total // 10
        if carry and not last and source is not None and source.random() < forgotten:
            carry = 0
    return ",".join(columns) + ANSWER_MARKER + answer
