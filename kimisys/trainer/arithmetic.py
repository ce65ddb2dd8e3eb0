"""The task that ships with the project: additions with a written-out scratchpad.

A problem is `583+767=`. The scratchpad adds column by column, the ones first, and then adds
the carry of the column before; the answer follows the marker:

    583+767=3+7=10,8+6=14+1=15,5+7=12+1=13#1350

Demonstrations (for SFT) are those of a pupil with two habits. He is careless: he forgets a carry
more often than not and goes on consistently, `3+7=10,8+6=14,5+7=12#1240`. And he is hesitant: he
writes many a column twice, `3+7=10=3+7=10,8+6=14+1=15,5+7=12+1=13#1350`, which is right, but longer
than need be. Imitation copies both habits. RL sees no demonstration, only whether the final answer
is right and, with the length reward, how long it took; it has to unlearn the first habit for the
one and the second for the other: that is what the reference run shows.

Split: a hash of the problem decides whether it is held out, so nothing that is trained on, by SFT
or by RL, is ever among the held-out problems. `123+456` and `456+123` share one fate. All of it is
the same in every run; a run's seed decides what is drawn from it.
"""

import hashlib
import random
from dataclasses import dataclass

from kimisys.rewards.arithmetic import ANSWER_MARKER, check
from kimisys.trainer.problem_file import HELD_OUT_ONE_IN, Split
from kimisys.trainer.task import Demonstration, Problem, Task, TaskError

_DRAWS_PER_PROBLEM = 50 * HELD_OUT_ONE_IN


@dataclass(frozen=True)
class ArithmeticConfig:
    """What the problems and the demonstrations are like, and how many there are."""

    digits: int = 3
    """Digits of each summand; the first is not zero."""
    forgotten_carries: float = 0.7
    """The probability that a demonstration forgets a carry; at 0 all demonstrations are right."""
    repeated_columns: float = 0.4
    """The probability that a demonstration writes a column twice; at 0 none is longer than needed.
    """
    problems: int = 1024
    """Distinct problems that RL samples from."""
    held_out: int = 512
    """Distinct problems that pass rates are measured on."""
    demonstrations: int = 300 * 64
    """Demonstrations for SFT: each of the recipe's 300 steps of 64 sees new ones."""

    def __post_init__(self) -> None:
        for name, least in (("digits", 1), ("problems", 1), ("held_out", 1), ("demonstrations", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("forgotten_carries", "repeated_columns"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a probability")


def task() -> Task:
    """The task of the reference run."""
    return arithmetic_task(ArithmeticConfig())


def arithmetic_task(config: ArithmeticConfig) -> Task:
    """Problems, held-out problems and demonstrations as `config` says, always the same ones.

    A problem's difficulty is its number of carries, 0 to `digits`. Raises TaskError when there are
    not enough problems of this size.
    """
    nines = 10**config.digits - 1
    longest = write_out(nines, nines, repeated=1.0, source=random.Random(0))
    return Task(
        problems=_distinct(config.digits, "train", config.problems),
        held_out=_distinct(config.digits, "held_out", config.held_out),
        check=check,
        max_completion_tokens=len(longest) + 1,  # a token is a character; and <eos>
        demonstrations=_demonstrations(config),
    )


def _distinct(digits: int, split: Split, count: int) -> list[Problem]:
    """The first `count` distinct problems of `split`: more of them append to fewer."""
    source = random.Random(split)
    found: dict[str, Problem] = {}
    for _ in range(_DRAWS_PER_PROBLEM * count):
        if len(found) == count:
            break
        first, second = _summands(digits, source)
        if split_of(first, second) == split:
            prompt = _prompt(first, second)
            found[prompt] = Problem(prompt, str(first + second), float(carries(first, second)))
    if len(found) < count:
        raise TaskError(
            f"additions of {digits} digits gave {len(found)} problems of the {split} split, "
            f"{count} were asked for; use more digits"
        )
    return list(found.values())


def _demonstrations(config: ArithmeticConfig) -> list[Demonstration]:
    source = random.Random("demonstrations")
    shown: list[Demonstration] = []
    while len(shown) < config.demonstrations:
        first, second = _summands(config.digits, source)
        if split_of(first, second) == "train":
            text = write_out(
                first, second, config.forgotten_carries, config.repeated_columns, source
            )
            shown.append(Demonstration(_prompt(first, second), text))
    return shown


def _summands(digits: int, source: random.Random) -> tuple[int, int]:
    low, high = 10 ** (digits - 1), 10**digits
    return source.randrange(low, high), source.randrange(low, high)


def _prompt(first: int, second: int) -> str:
    return f"{first}+{second}="


def split_of(first: int, second: int) -> Split:
    """The split of `first` + `second`: a hash of the unordered pair; one in ten is held out."""
    pair = f"{min(first, second)}+{max(first, second)}".encode()
    digest = hashlib.blake2b(pair, digest_size=8, person=b"kimisys+").digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"


def carries(first: int, second: int) -> int:
    """The number of columns of `first` + `second` that carry, the leading one included."""
    # each carry takes ten from a column and puts one into the next: the digit sum loses nine
    digit_sum = sum(map(int, str(first))) + sum(map(int, str(second)))
    return (digit_sum - sum(map(int, str(first + second)))) // 9


def write_out(
    first: int,
    second: int,
    forgotten: float = 0.0,
    repeated: float = 0.0,
    source: random.Random | None = None,
) -> str:
    """The scratchpad and the answer of `first` + `second`, numbers of equally many digits.

    forgotten: the probability that a carry is not taken into the next column. repeated: the
    probability that a column is written twice. Both are drawn from `source`; without it there are
    no slips and no repetitions.
    """
    columns, answer, carry = [], "", 0
    digits = list(zip(reversed(str(first)), reversed(str(second)), strict=True))
    for place, (a, b) in enumerate(digits):
        total = int(a) + int(b)
        column = f"{a}+{b}={total}"
        if carry:
            total += 1
            column += f"+1={total}"
        twice = source is not None and source.random() < repeated
        columns.append(f"{column}={column}" if twice else column)  # one comma a place
        last = place == len(digits) - 1
        answer = (str(total) if last else str(total % 10)) + answer
        carry = total // 10
        if carry and not last and source is not None and source.random() < forgotten:
            carry = 0
    return ",".join(columns) + ANSWER_MARKER + answer
