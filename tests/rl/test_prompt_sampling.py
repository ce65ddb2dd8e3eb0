"""Curriculum and prioritised sampling: the law of the draws, resuming, and the edges."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimisys.rl.prompt_sampling import (
    LEAST_WEIGHT,
    UNSEEN_SUCCESS_RATE,
    SuccessRates,
    curriculum_pool,
    draw,
)

no_deadline = settings(deadline=None, max_examples=100)
DRAWS = 4000
KNOWN_DRAW = [3, 12, 10, 8, 0, 2]

rates_of = st.lists(st.floats(0, 1), min_size=1, max_size=12)
difficulties_of = st.lists(
    st.one_of(st.integers(0, 3).map(float), st.floats(-1e6, 1e6)), min_size=1, max_size=30
)
fractions = st.floats(0, 1)


def everything(problems: int) -> Tensor:
    return torch.ones(problems, dtype=torch.bool)


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def bound(categories: int) -> float:
    """What chi-square exceeds once in 100,000 times (Wilson and Hilferty's approximation). The
    seeds are fixed, so a test that passes does so every time."""
    free = categories - 1
    return free * (1 - 2 / (9 * free) + 4.265 * (2 / (9 * free)) ** 0.5) ** 3


# --- the draw -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates", [[0.0, 0.25, 0.5, 0.75, 1.0], [0.3] * 6, [1.0] * 4, [1.0, 0.0]], ids=str
)
def test_the_first_drawn_is_problem_i_in_proportion_to_its_weight(rates: list[float]) -> None:
    success = torch.tensor(rates)
    first = [int(draw(success, everything(len(rates)), 1, 5, step)) for step in range(DRAWS)]
    weights = (1 - success.double()).clamp(min=LEAST_WEIGHT)
    observed = torch.bincount(torch.tensor(first), minlength=len(rates)).double()
    assert chi_square(observed, DRAWS * weights / weights.sum()) < bound(len(rates))


def test_the_next_drawn_is_one_of_those_left_in_proportion_to_its_weight() -> None:
    success = torch.tensor([0.0, 0.4, 0.7, 0.9])
    weights = 1 - success.double()
    pairs, expected = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for step in range(DRAWS):
        first, second = draw(success, everything(4), 2, 6, step).tolist()
        pairs[first, second] += 1
    for i in range(4):
        left = weights.clone()
        left[i] = 0.0
        expected[i] = DRAWS * weights[i] / weights.sum() * left / left.sum()
    assert pairs.diagonal().sum() == 0
    off = ~torch.eye(4).bool()
    assert chi_square(pairs[off], expected[off]) < bound(12)


def test_the_bound_tells_another_law_apart() -> None:
    """Uniform draws held against prioritised expectations: the tests above can fail."""
    success = torch.tensor([0.0, 0.25, 0.5, 0.75])
    first = [int(draw(torch.zeros(4), everything(4), 1, 5, step)) for step in range(DRAWS)]
    observed = torch.bincount(torch.tensor(first), minlength=4).double()
    weights = 1 - success.double()
    assert chi_square(observed, DRAWS * weights / weights.sum()) > 3 * bound(4)


@no_deadline
@given(rates_of, st.data())
def test_draws_are_admitted_and_repeats_are_spread_evenly(
    rates: list[float], data: st.DataObject
) -> None:
    admitted = data.draw(st.lists(st.booleans(), min_size=len(rates), max_size=len(rates)))
    admitted[data.draw(st.integers(0, len(rates) - 1))] = True
    count = data.draw(st.integers(1, 30))
    drawn = draw(torch.tensor(rates), torch.tensor(admitted), count, 1, 2)
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert all(admitted[i] for i in drawn.tolist())
    times = torch.bincount(drawn, minlength=len(rates))[torch.tensor(admitted)]
    assert int(times.max()) - int(times.min()) <= 1


@no_deadline
@given(rates_of, st.integers(-(2**70), 2**70), st.integers(0, 10**9), st.integers(1, 12))
def test_a_draw_is_a_function_of_its_arguments(
    rates: list[float], seed: int, step: int, count: int
) -> None:
    success = torch.tensor(rates, dtype=torch.float64)
    before = success.clone()
    once = draw(success, everything(len(rates)), count, seed, step)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert draw(success, everything(len(rates)), count, seed, step).tolist() == once.tolist()
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    assert torch.equal(success, before)


def test_a_draw_is_the_same_in_every_process_and_version() -> None:
    success = torch.linspace(0, 1, 16, dtype=torch.float64)
    assert draw(success, everything(16), 6, seed=1, step=7).tolist() == KNOWN_DRAW


@pytest.mark.parametrize("other", [(2, 7), (1, 8), (1 + 2**32, 7), (7, 1), (-1, 7)], ids=str)
def test_another_seed_or_step_is_another_draw(other: tuple[int, int]) -> None:
    success = torch.full((512,), 0.5)
    drawn = draw(success, everything(512), 64, 1, 7).tolist()
    assert draw(success, everything(512), 64, *other).tolist() != drawn


def test_a_problem_keeps_its_luck_when_others_change() -> None:
    """Only the problems whose rate or admission changed move; the others keep their order."""
    success = torch.full((64,), 0.5)
    order = draw(success, everything(64), 64, 1, 1).tolist()
    success[10], admitted = 0.0, everything(64)
    admitted[11] = False
    kept = [i for i in order if i not in (10, 11)]
    assert [i for i in draw(success, admitted, 63, 1, 1).tolist() if i != 10] == kept


def test_when_all_are_solved_all_are_still_drawn_alike() -> None:
    solved, unsolved = torch.ones(32), torch.zeros(32)
    for step in range(5):
        drawn = draw(solved, everything(32), 8, 1, step).tolist()
        assert drawn == draw(unsolved, everything(32), 8, 1, step).tolist()


def test_wrong_draws_are_refused_by_name() -> None:
    rates = torch.tensor([0.0, 0.5])
    with pytest.raises(ValueError, match=r"none of 2 problems is admitted.*curriculum_pool"):
        draw(rates, torch.zeros(2, dtype=torch.bool), 1, 0, 0)
    with pytest.raises(ValueError, match="none of 0 problems"):
        draw(torch.zeros(0), everything(0), 1, 0, 0)
    with pytest.raises(ValueError, match="count is 0"):
        draw(rates, everything(2), 0, 0, 0)
    with pytest.raises(ValueError, match=r"admitted must be bool \(2,\)"):
        draw(rates, everything(3), 1, 0, 0)
    with pytest.raises(ValueError, match="admitted must be bool"):
        draw(rates, torch.tensor([0, 1]), 1, 0, 0)
    for bad in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match=r"success_rates\[1\] is"):
            draw(torch.tensor([0.0, bad]), everything(2), 1, 0, 0)


# --- the success rates ----------------------------------------------------------------------


def test_rates_start_unseen_and_follow_what_is_recorded() -> None:
    tracked = SuccessRates(3)
    assert tracked.rates.tolist() == [UNSEEN_SUCCESS_RATE] * 3
    tracked.record(torch.tensor([2, 0]), torch.tensor([1.0, 0.0]))
    tracked.record(torch.tensor([2]), torch.tensor([1.0]))
    assert tracked.rates.tolist() == [0.25, 0.5, 0.875]
    tracked.rates[0] = 9.0
    assert tracked.rates.tolist()[0] == 0.25


@no_deadline
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=20), st.randoms())
def test_recording_agrees_with_loops_and_its_order_does_not_matter(
    visits: list[tuple[int, int]], source: random.Random
) -> None:
    expected = [UNSEEN_SUCCESS_RATE] * 6
    for problem in range(6):
        seen = [right / 8 for visited, right in visits if visited == problem]
        if seen:
            expected[problem] = (expected[problem] + sum(seen) / len(seen)) / 2
    for _ in range(2):
        tracked = SuccessRates(6)
        tracked.record(
            torch.tensor([problem for problem, _ in visits], dtype=torch.int64),
            torch.tensor([right / 8 for _, right in visits], dtype=torch.float32),
        )
        assert tracked.rates.tolist() == pytest.approx(expected, abs=1e-12)
        source.shuffle(visits)


def simulate(tracked: SuccessRates, steps: range) -> list[list[int]]:
    """A run whose k = 8 samples of problem i at a step are right as a hash of both says."""
    draws = []
    for step in steps:
        admitted = curriculum_pool(torch.arange(40.0), step / 30)
        drawn = draw(tracked.rates, admitted, 6, 11, step)
        right = torch.tensor([(7 * i + 3 * step) % 9 / 8 for i in drawn.tolist()])
        tracked.record(drawn, right)
        draws.append(drawn.tolist())
    return draws


@pytest.mark.parametrize("interrupted", [0, 1, 13, 29])
def test_a_resumed_run_draws_what_the_undisturbed_run_draws(interrupted: int) -> None:
    undisturbed, saved = SuccessRates(40), SuccessRates(40)
    draws = simulate(undisturbed, range(30))
    before = simulate(saved, range(interrupted))
    resumed = SuccessRates.from_state(json.loads(json.dumps(saved.state())))
    assert before + simulate(resumed, range(interrupted, 30)) == draws
    assert resumed.state() == undisturbed.state()


def test_wrong_records_are_refused_by_name_and_note_nothing() -> None:
    tracked = SuccessRates(2)
    one = torch.tensor([1])
    for indices, rates, message in (
        (torch.tensor([2]), torch.tensor([1.0]), "there are 2 problems"),
        (torch.tensor([0, -1]), torch.tensor([1.0, 1.0]), "reach from -1 to 0"),
        (one, torch.tensor([1.0, 0.0]), "indices has shape"),
        (one, torch.tensor([float("nan")]), r"rates\[0\] is nan"),
        (one, torch.tensor([1.5]), r"rates\[0\] is 1.5"),
        (one, one, "rates must be floating point"),
        (one.double(), torch.tensor([1.0]), "indices must be integer"),
    ):
        with pytest.raises(ValueError, match=message):
            tracked.record(indices, rates)
    assert tracked.state() == [UNSEEN_SUCCESS_RATE] * 2
    with pytest.raises(ValueError, match="at least one problem"):
        SuccessRates(0)
    with pytest.raises(ValueError, match=r"state\[1\] is nan"):
        SuccessRates.from_state([0.5, float("nan")])
    with pytest.raises(ValueError, match="at least one problem"):
        SuccessRates.from_state([])


# --- the curriculum -------------------------------------------------------------------------


@no_deadline
@given(difficulties_of, fractions, fractions, st.floats(0.01, 1), fractions)
def test_the_pool_only_grows_from_the_easy_end(
    values: list[float], one: float, other: float, start: float, full_at: float
) -> None:
    difficulties = torch.tensor(values, dtype=torch.float64)
    earlier, later = (
        curriculum_pool(difficulties, at, start, full_at) for at in sorted((one, other))
    )
    assert bool((later | ~earlier).all())
    assert int(earlier.sum()) >= start * len(values)
    # nothing that is left out is as easy as anything admitted: ties share one fate
    assert not bool((~earlier).any()) or (
        difficulties[earlier].max() < difficulties[~earlier].min()
    )


@no_deadline
@given(difficulties_of, fractions, st.floats(0.01, 1))
def test_everything_is_admitted_from_the_stated_fraction_on(
    values: list[float], full_at: float, start: float
) -> None:
    difficulties = torch.tensor(values, dtype=torch.float64)
    for progress in (full_at, (full_at + 1) / 2, 1.0):
        assert bool(curriculum_pool(difficulties, progress, start, full_at).all())


def test_the_pool_opens_linearly() -> None:
    difficulties = torch.arange(100.0).flip(0)
    sizes = [int(curriculum_pool(difficulties, p / 8).sum()) for p in range(9)]
    assert sizes == [25, 44, 63, 82, 100, 100, 100, 100, 100]
    assert curriculum_pool(torch.tensor([2.0, 0.0, 1.0, 0.0]), 0.0).tolist() == [
        False, True, False, True,
    ]  # fmt: skip


def test_wrong_curricula_are_refused_by_name() -> None:
    values = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="difficulties is empty"):
        curriculum_pool(values[:0], 0.5)
    with pytest.raises(ValueError, match="difficulties must be floating point"):
        curriculum_pool(values.long(), 0.5)
    with pytest.raises(ValueError, match=r"difficulties\[1\] is nan"):
        curriculum_pool(torch.tensor([0.0, float("nan")]), 0.5)
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="progress is"):
            curriculum_pool(values, progress)
    with pytest.raises(ValueError, match="start is 0"):
        curriculum_pool(values, 0.5, start=0.0)
    with pytest.raises(ValueError, match="full_at is 2"):
        curriculum_pool(values, 0.5, full_at=2.0)
