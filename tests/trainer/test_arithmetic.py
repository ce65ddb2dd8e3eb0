"""The task: right scratchpads, documented habits, a held-out set that no training can touch."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rewards.arithmetic import check
from kimisys.trainer.arithmetic import (
    ArithmeticConfig,
    arithmetic_task,
    carries,
    split_of,
    task,
    write_out,
)
from kimisys.trainer.task import Demonstration, Problem, Task, TaskError, load_task

TASK = task()
FIRST_PROBLEMS = ["202+414=", "719+590=", "630+120="]
FIRST_HELD_OUT = ["977+541=", "632+180=", "983+757="]

same_length = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*[st.integers(10 ** (n - 1), 10**n - 1)] * 2)
)


def summands(shown: Problem | Demonstration) -> tuple[int, int]:
    first, second = re.fullmatch(r"(\d+)\+(\d+)=", shown.prompt).groups()
    return int(first), int(second)


def small(**changed: float) -> Task:
    sizes = {"problems": 8, "held_out": 4, "demonstrations": 2000}
    return arithmetic_task(ArithmeticConfig(**{**sizes, **changed}))


def adds_up(column: str) -> bool:
    """Whether `a+b=c`, or `a+b=c+1=d`, is right."""
    left, *totals = column.split("=")
    right = [int(total.removesuffix("+1")) for total in totals]
    return (
        sum(map(int, left.split("+"))) == right[0] and [right[0] + 1] * len(right[1:]) == right[1:]
    )


def test_the_scratchpad_reads_as_documented() -> None:
    assert write_out(583, 767) == "3+7=10,8+6=14+1=15,5+7=12+1=13#1350"
    assert write_out(122, 126) == "2+6=8,2+2=4,1+1=2#248"
    assert write_out(5, 5) == "5+5=10#10"


@settings(deadline=None)
@given(same_length)
def test_without_slips_every_column_and_the_answer_are_right(pair: tuple[int, int]) -> None:
    scratchpad, _, answer = write_out(*pair).partition("#")
    assert answer == str(sum(pair))
    assert all(adds_up(column) for column in scratchpad.split(","))


@settings(deadline=None)
@given(same_length)
def test_carries_are_the_columns_of_ten_and_more(pair: tuple[int, int]) -> None:
    scratchpad = write_out(*pair).partition("#")[0]
    totals = [int(column.rpartition("=")[2]) for column in scratchpad.split(",")]
    assert carries(*pair) == sum(total >= 10 for total in totals)


def test_problems_are_distinct_right_and_as_hard_as_they_have_carries() -> None:
    assert (len(TASK.problems), len(TASK.held_out)) == (1024, 512)
    for problems in (TASK.problems, TASK.held_out):
        assert len({problem.prompt for problem in problems}) == len(problems)
        for problem in problems:
            assert int(problem.answer) == sum(summands(problem))
            assert problem.difficulty == carries(*summands(problem))
            assert TASK.check(problem, write_out(*summands(problem)), True) == 1.0
            assert TASK.check(problem, write_out(*summands(problem)), False) == 0.0
        assert {problem.difficulty for problem in problems} == {0.0, 1.0, 2.0, 3.0}


def test_held_out_and_trained_on_are_disjoint() -> None:
    pairs = {frozenset(summands(problem)) for problem in TASK.held_out}
    assert all(split_of(*summands(problem)) == "held_out" for problem in TASK.held_out)
    assert len(TASK.demonstrations) == 300 * 64
    for trained in (*TASK.problems, *TASK.demonstrations):
        assert split_of(*summands(trained)) == "train"
        assert frozenset(summands(trained)) not in pairs  # not even with the summands exchanged


@settings(deadline=None)
@given(st.integers(100, 999), st.integers(100, 999))
def test_exchanged_summands_share_a_split(first: int, second: int) -> None:
    assert split_of(first, second) == split_of(second, first)


def test_one_problem_in_ten_is_held_out_and_no_run_moves_it() -> None:
    held_out = sum(split_of(a, b) == "held_out" for a in range(100, 300) for b in range(500, 600))
    assert held_out / 20_000 == pytest.approx(0.1, abs=0.01)
    assert [problem.prompt for problem in TASK.held_out[:3]] == FIRST_HELD_OUT
    assert [problem.prompt for problem in TASK.problems[:3]] == FIRST_PROBLEMS


def test_every_call_gives_the_same_task_and_more_problems_append() -> None:
    again = load_task("kimisys.trainer.arithmetic:task")
    assert again == TASK
    more = arithmetic_task(ArithmeticConfig(problems=1100, held_out=600, demonstrations=64))
    assert more.problems[:1024] == TASK.problems
    assert more.held_out[:512] == TASK.held_out
    assert more.demonstrations == TASK.demonstrations[:64]


def test_demonstrations_forget_carries_and_nothing_else() -> None:
    """Each column adds up and each digit is taken over; a right answer is what no slip spoiled."""
    possible = slips = 0
    for shown in small(repeated_columns=0.0).demonstrations:
        scratchpad, _, answer = shown.completion.partition("#")
        columns = scratchpad.split(",")
        assert all(adds_up(column) for column in columns)
        totals = [column.rpartition("=")[2] for column in columns]
        assert answer == totals[-1] + "".join(total[-1] for total in reversed(totals[:-1]))
        slipped = 0
        for total, following in zip(totals[:-1], columns[1:], strict=True):
            carried = following.count("=") == 2
            assert not carried or int(total) >= 10
            possible += int(total) >= 10
            slipped += int(total) >= 10 and not carried
        slips += slipped
        problem = Problem(shown.prompt, str(sum(summands(shown))))
        assert check(problem, shown.completion, finished=True) == float(not slipped)
    assert slips / possible == pytest.approx(ArithmeticConfig().forgotten_carries, abs=0.03)


def test_demonstrations_write_columns_twice_and_nothing_else() -> None:
    """Without repetitions each demonstration is the scratchpad."""
    columns = repetitions = 0
    for shown in small(forgotten_carries=0.0).demonstrations:
        once, _, answer = write_out(*summands(shown)).partition("#")
        written, _, given_answer = shown.completion.partition("#")
        assert given_answer == answer
        for column, found in zip(once.split(","), written.split(","), strict=True):
            assert found in (column, f"{column}={column}")
            columns += 1
            repetitions += found != column
    assert repetitions / columns == pytest.approx(ArithmeticConfig().repeated_columns, abs=0.03)


def test_both_habits_are_in_the_demonstrations() -> None:
    for habits in ({}, {"forgotten_carries": 0.0}, {"repeated_columns": 0.0}):
        shown = small(**habits).demonstrations
        right = [
            check(Problem("", str(sum(summands(one)))), one.completion, finished=True)
            for one in shown
        ]
        longer = [len(one.completion) > len(write_out(*summands(one))) for one in shown]
        assert any(right)
        assert all(right) == ("forgotten_carries" in habits)
        assert any(longer) == ("repeated_columns" not in habits)


def test_the_limit_holds_the_longest_completion_exactly() -> None:
    assert TASK.max_completion_tokens == len(
        "9+9=18=9+9=18" + 2 * ",9+9=18+1=19=9+9=18+1=19" + "#1998<"
    )
    hesitant = small(repeated_columns=1.0, forgotten_carries=0.0)
    longest = max(len(shown.completion) for shown in hesitant.demonstrations)
    assert longest <= hesitant.max_completion_tokens - 1
    assert hesitant.max_completion_tokens == TASK.max_completion_tokens


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_other_sizes(digits: int) -> None:
    other = small(digits=digits, forgotten_carries=0.0, demonstrations=50)
    for shown in other.demonstrations:
        assert all(len(str(summand)) == digits for summand in summands(shown))
        problem = Problem(shown.prompt, str(sum(summands(shown))))
        assert other.check(problem, shown.completion, True) == 1.0


def test_too_few_problems_and_bad_configurations_are_refused() -> None:
    with pytest.raises(TaskError, match=r"additions of 1 digits gave .* held_out split, 50 were"):
        small(digits=1, held_out=50)
    with pytest.raises(TaskError, match=r"train split, 1024 were asked for; use more digits"):
        small(digits=1, problems=1024)
    for name in ("digits", "problems", "held_out"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            ArithmeticConfig(**{name: 0})
    with pytest.raises(ValueError, match="demonstrations is -1"):
        ArithmeticConfig(demonstrations=-1)
    for name in ("forgotten_carries", "repeated_columns"):
        for probability in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=name):
                ArithmeticConfig(**{name: probability})
