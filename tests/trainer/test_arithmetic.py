"""The task: right scratchpads, documented slips, a held-out set that no training can touch."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rewards.arithmetic import check
from kimisys.trainer.arithmetic import (
    ArithmeticConfig,
    ArithmeticTask,
    Problem,
    split_of,
    write_out,
)

TASK = ArithmeticTask()
FIRST_HELD_OUT = ["397+793=", "351+494=", "432+771="]


def summands(problem: Problem) -> tuple[int, int]:
    first, second = re.fullmatch(r"(\d+)\+(\d+)=", problem.prompt).groups()
    return int(first), int(second)


def adds_up(column: str) -> bool:
    """Whether `a+b=c`, or `a+b=c+1=d`, is right."""
    left, *totals = column.split("=")
    right = [int(total.removesuffix("+1")) for total in totals]
    return (
        sum(map(int, left.split("+"))) == right[0] and [right[0] + 1] * len(right[1:]) == right[1:]
    )


def trained_on(seed: int) -> list[Problem]:
    rl = [problem for step in range(20) for problem in TASK.problems(seed, step, 64)]
    return rl + TASK.sft_examples(seed, 2000)


def test_the_scratchpad_reads_as_documented() -> None:
    assert write_out(583, 767) == "3+7=10,8+6=14+1=15,5+7=12+1=13#1350"
    assert write_out(122, 126) == "2+6=8,2+2=4,1+1=2#248"
    assert write_out(5, 5) == "5+5=10#10"


@settings(deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.integers(10 ** (n - 1), 10**n - 1)] * 2)))
def test_without_slips_every_column_and_the_answer_are_right(pair: tuple[int, int]) -> None:
    scratchpad, _, answer = write_out(*pair).partition("#")
    assert answer == str(sum(pair))
    assert all(adds_up(column) for column in scratchpad.split(","))


def test_held_out_and_trained_on_are_disjoint() -> None:
    held_out = TASK.held_out(512)
    assert len({problem.prompt for problem in held_out}) == 512
    pairs = {frozenset(summands(problem)) for problem in held_out}
    assert all(split_of(*summands(problem)) == "held_out" for problem in held_out)
    for seed in (1, 2, 3):
        trained = trained_on(seed)
        assert all(split_of(*summands(problem)) == "train" for problem in trained)
        # not even with the summands exchanged
        assert pairs.isdisjoint(frozenset(summands(problem)) for problem in trained)


@settings(deadline=None)
@given(st.integers(100, 999), st.integers(100, 999))
def test_exchanged_summands_share_a_split(first: int, second: int) -> None:
    assert split_of(first, second) == split_of(second, first)


def test_one_problem_in_ten_is_held_out_and_no_run_moves_it() -> None:
    held_out = sum(split_of(a, b) == "held_out" for a in range(100, 300) for b in range(500, 600))
    assert held_out / 20_000 == pytest.approx(0.1, abs=0.01)
    assert [problem.prompt for problem in TASK.held_out(3)] == FIRST_HELD_OUT


def test_the_held_out_set_grows_by_appending() -> None:
    assert TASK.held_out(600)[:512] == TASK.held_out(512)


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert TASK.problems(1, 7, 64) == ArithmeticTask().problems(1, 7, 64)
    assert TASK.sft_examples(1, 64) == ArithmeticTask().sft_examples(1, 64)
    draws = [TASK.problems(1, 7, 64), TASK.problems(1, 8, 64), TASK.problems(2, 7, 64)]
    draws.append(TASK.sft_examples(1, 64))
    prompts = [frozenset(problem.prompt for problem in draw) for draw in draws]
    assert len(set(prompts)) == len(prompts)


def test_rl_and_held_out_problems_are_written_out_right() -> None:
    for problem in TASK.problems(1, 1, 200) + TASK.held_out(200):
        assert int(problem.answer) == sum(summands(problem))
        assert check(problem, problem.completion, finished=True) == 1.0
        assert problem.demonstration == problem.prompt + problem.completion


def test_demonstrations_forget_carries_and_nothing_else() -> None:
    """Each column adds up and each digit is taken over; a right answer is what no slip spoiled."""
    carries = slips = 0
    for problem in TASK.sft_examples(1, 2000):
        assert int(problem.answer) == sum(summands(problem))
        scratchpad, _, answer = problem.completion.partition("#")
        columns = scratchpad.split(",")
        assert all(adds_up(column) for column in columns)
        totals = [column.rpartition("=")[2] for column in columns]
        assert answer == totals[-1] + "".join(total[-1] for total in reversed(totals[:-1]))
        slipped = 0
        for total, following in zip(totals[:-1], columns[1:], strict=True):
            carried = following.count("=") == 2
            assert not carried or int(total) >= 10
            carries += int(total) >= 10
            slipped += int(total) >= 10 and not carried
        slips += slipped
        assert check(problem, problem.completion, finished=True) == float(not slipped)
    assert slips / carries == pytest.approx(ArithmeticConfig().forgotten_carries, abs=0.03)


def test_limits_hold_exactly() -> None:
    problems = TASK.sft_examples(1, 3000)
    assert {len(problem.prompt) for problem in problems} == {TASK.max_prompt_tokens}
    longest = write_out(999, 999)
    assert max(len(problem.completion) for problem in problems) <= len(longest)
    assert TASK.max_completion_tokens == len(longest) + 1


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_other_sizes(digits: int) -> None:
    task = ArithmeticTask(ArithmeticConfig(digits=digits, forgotten_carries=0.0))
    for problem in task.sft_examples(1, 50):
        assert all(len(str(summand)) == digits for summand in summands(problem))
        assert check(problem, problem.completion, finished=True) == 1.0


def test_too_few_held_out_problems_and_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="additions of 1 digits gave"):
        ArithmeticTask(ArithmeticConfig(digits=1)).held_out(50)
    with pytest.raises(ValueError, match="digits is 0"):
        ArithmeticConfig(digits=0)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="forgotten_carries"):
            ArithmeticConfig(forgotten_carries=probability)
