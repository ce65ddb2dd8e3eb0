"""k1.5's length reward against loops over prompts and samples, and its schedule."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rl.length_reward import LengthRewardSchedule, length_rewards

no_deadline = settings(deadline=None, max_examples=100)
Samples = list[tuple[int, bool, int]]  # length, correct, group

samples = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 6), st.integers(0, 2**40)), st.booleans(), st.integers(-2, 3)
    ),
    max_size=24,
)


def by_loops(rows: Samples) -> list[Fraction]:
    """The report's formula in exact arithmetic, prompt by prompt."""
    members = defaultdict(list)
    for length, _, group in rows:
        members[group].append(length)
    rewards = []
    for length, correct, group in rows:
        least, most = min(members[group]), max(members[group])
        if least == most:
            rewards.append(Fraction(0))
            continue
        shortness = Fraction(1, 2) - Fraction(length - least, most - least)
        rewards.append(shortness if correct else min(Fraction(0), shortness))
    return rewards


def run(rows: Samples, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return length_rewards(
        torch.tensor([length for length, _, _ in rows], dtype=dtype),
        torch.tensor([correct for _, correct, _ in rows], dtype=torch.bool),
        torch.tensor([group for _, _, group in rows], dtype=torch.int64),
    )


@no_deadline
@given(samples)
def test_agrees_with_the_exact_reference(rows: Samples) -> None:
    got = run(rows)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([float(reward) for reward in by_loops(rows)], abs=1e-7)


@no_deadline
@given(samples)
def test_wrong_answers_never_gain_and_short_right_ones_gain_most(rows: Samples) -> None:
    got = run(rows)
    assert bool((got.abs() <= 0.5).all())
    for (_, correct, _), reward in zip(rows, got.tolist(), strict=True):
        assert correct or reward <= 0.0
    # of one prompt's right answers, a longer one never earns more
    right = sorted(
        (group, length, -reward)
        for (length, correct, group), reward in zip(rows, got.tolist(), strict=True)
        if correct
    )
    for (group, _, loss), (next_group, _, next_loss) in pairwise(right):
        assert group != next_group or loss <= next_loss


@no_deadline
@given(samples, st.randoms(use_true_random=False))
def test_order_and_labels_do_not_matter(rows: Samples, source) -> None:
    order = list(range(len(rows)))
    source.shuffle(order)
    moved = [(rows[i][0], rows[i][1], 1000 - 7 * rows[i][2]) for i in order]
    assert run(moved).tolist() == [run(rows).tolist()[i] for i in order]


def test_reads_as_the_report() -> None:
    got = run([(10, True, 0), (20, True, 0), (30, True, 0), (10, False, 0), (30, False, 0)])
    assert got.tolist() == [0.5, 0.0, -0.5, 0.0, -0.5]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_equal_lengths_give_exactly_zero(rows: int, correct: bool) -> None:
    assert run([(9, correct, 4)] * rows).tolist() == [0.0] * rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_lengths_do_not_wrap_around(dtype: torch.dtype) -> None:
    assert run([(0, True, 0), (127, True, 0)], dtype).tolist() == [0.5, -0.5]


def test_wrong_arguments_are_named() -> None:
    lengths, correct = torch.tensor([3, 4]), torch.tensor([True, False])
    groups = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lengths must be integer, got torch\.float32"):
        length_rewards(torch.tensor([3.0, float("nan")]), correct, groups)
    with pytest.raises(ValueError, match=r"lengths\[1\] is -4"):
        length_rewards(lengths * torch.tensor([1, -1]), correct, groups)
    with pytest.raises(ValueError, match="one dimension"):
        length_rewards(lengths[None], correct[None], groups[None])
    with pytest.raises(ValueError, match="correct must be bool"):
        length_rewards(lengths, correct.float(), groups)
    with pytest.raises(ValueError, match=r"correct must be bool \(2,\)"):
        length_rewards(lengths, correct[:1], groups)
    with pytest.raises(ValueError, match=r"groups has shape \(1,\) and lengths \(2,\)"):
        length_rewards(lengths, correct, groups[:1])
    with pytest.raises(ValueError, match="groups must be integer"):
        length_rewards(lengths, correct, groups.double())


def test_the_weight_is_zero_first_and_constant_afterwards() -> None:
    schedule = LengthRewardSchedule(weight=0.2, start_step=10)
    assert [schedule.weight_at(step) for step in range(1, 31)] == [0.0] * 9 + [0.2] * 21
    assert LengthRewardSchedule(weight=0.2, start_step=0).weight_at(0) == 0.2


def test_schedules_out_of_range_are_refused() -> None:
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight is"):
            LengthRewardSchedule(weight, 0)
    with pytest.raises(ValueError, match="start_step is -1"):
        LengthRewardSchedule(0.1, -1)
