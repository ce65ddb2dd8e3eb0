"""Finished groups become rows: each token with the version and the log-probability that it was
sampled with, and the weight that --loss-mask gives it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_groups import group, trajectory

from kimisys.rollout import Group
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.learning import NO_VERSION, Experience, experience
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.arithmetic()
A, B, C = TOKENIZER.encode("123")
EOS = TOKENIZER.eos_id


def ends_in_three(problem: Problem, text: str, finished: bool) -> float:
    return float(finished and text.endswith("3"))


def task(problems: int) -> Task:
    asked = [Problem(f"{i}+1=", "3", difficulty=i) for i in range(problems)]
    return Task(asked, [Problem("9+9=", "18")], ends_in_three, 64)


def learned(*groups: Group) -> Experience:
    made = task(len(groups))
    return experience(groups, made.problems, made, TOKENIZER, 1.0)


def two_groups() -> Experience:
    """Rows: continued and right; of one version; cut off; ended in a loop; made before."""
    return learned(
        group(
            7,
            [A, B],
            trajectory((3, [A, B]), (4, [C, EOS])),
            trajectory((4, [C, EOS])),
            trajectory((3, [A]), (4, [A]), reason="length"),
        ),
        group(
            9,
            [A],
            trajectory((2, [A]), (4, [B, B]), reason="repetition"),
            trajectory((2, [C, EOS])),
        ),
    )


def test_rows_are_judged_in_the_order_of_groups_and_samples() -> None:
    found = two_groups()
    answers = found.answers
    assert answers.groups.tolist() == [0, 0, 0, 1, 1]
    assert answers.outcomes.tolist() == [1, 1, 0, 0, 1]
    assert answers.lengths.tolist() == [4, 2, 2, 3, 2]
    assert found.repeated.tolist() == [False, False, False, True, False]
    assert found.made_by.tolist() == [2, 1, 2, 2, 1]
    assert found.batch.tokens[0].tolist() == [A, B, A, B, C, EOS]


def test_each_token_has_the_version_and_log_probability_that_it_was_sampled_with() -> None:
    found = two_groups()
    n = NO_VERSION
    assert found.versions.tolist() == [
        [n, 3, 3, 4, 4],
        [n, 4, 4, n, n],
        [n, 3, 4, n, n],
        [2, 4, 4, n, n],
        [2, 2, n, n, n],
    ]
    next_token = found.batch.tokens[:, 1:]
    expected = np.where(found.batch.mask > 0, -found.versions - next_token / 100, 0)
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-6)
    assert np.array_equal(found.batch.mask > 0, found.versions != n)


def config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"loss_mask": "all"}, [[0, 1, 1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1]]),
        ({"loss_mask": "current"}, [[0, 0, 0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1]]),
        (
            {"loss_mask": "recent", "mask_versions": 1},
            [[0, 1, 1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0]],
        ),
        (
            {"loss_mask": "recent", "mask_versions": 0},
            [[0, 0, 0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0]],
        ),
    ],
)
def test_the_mask_of_each_policy(changes: dict[str, Any], rows: list[list[float]]) -> None:
    found = two_groups()
    weights = found.weights(config(**changes), found.log_probs, version=4)
    padded = [row + [0] * (weights.shape[1] - len(row)) for row in rows]
    assert weights.tolist() == padded
    figures = found.figures(4, weights)
    assert figures["trained_tokens"] == sum(map(sum, rows))
    assert figures["masked_tokens"] + figures["trained_tokens"] == figures["tokens"] == 13


def test_old_tokens_count_by_their_ratio_and_no_more_than_the_cap() -> None:
    found = two_groups()
    now = found.log_probs + np.float32(np.log(1.5)) * (found.batch.mask > 0)
    now[0, 1] = 0.0  # three nats likelier now
    weights = found.weights(config(loss_mask="weighted", mask_cap=2.0), now, version=4)
    np.testing.assert_allclose(weights[0], [0, 2.0, 1.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(weights[4, :2], [1.5, 1.5], rtol=1e-6)


def test_the_gap_is_measured_where_the_trained_version_made_the_token() -> None:
    found = two_groups()
    theirs = found.log_probs.copy()
    theirs[0, 1] += 0.5  # of version 3
    theirs[1, 1] -= 0.7  # of version 4
    of_current = int(((found.versions == 4) & (found.batch.mask > 0)).sum())
    assert found.gap(theirs, 4) == pytest.approx(0.7 / of_current, rel=1e-5)
    assert found.gap(theirs, 4, stale=True) == pytest.approx(0.5 / (13 - of_current), rel=1e-5)
    assert found.gap(theirs, 5) is None


def test_the_figures_of_a_batch() -> None:
    found = two_groups()
    figures = found.figures(4, found.batch.mask)
    assert figures["staleness_mean"] == pytest.approx((3 * 1 + 3 * 2) / 13)
    assert (figures["staleness_max"], figures["groups"]) == (2, 2)
    assert (figures["continued"], figures["early_stopped"]) == (pytest.approx(0.6), 1)
    assert figures["difficulty"] == 0.5


def test_a_loop_costs_its_penalty() -> None:
    found = two_groups()
    none = np.zeros(5, np.float32)
    assert found.rewards(none, 0.0).tolist() == [1, 1, 0, 0, 1]
    assert found.rewards(none + 0.25, 0.5).tolist() == [1.25, 1.25, 0.25, -0.25, 1.25]


@given(st.data())
def test_whatever_the_segments_tokens_and_versions_stay_together(data: st.DataObject) -> None:
    """Against the plain concatenation of what each engine reported."""
    piece = st.tuples(st.integers(0, 5), st.lists(st.sampled_from([A, B, C]), max_size=4))
    rows = st.lists(piece, min_size=1, max_size=4).filter(lambda row: any(ids for _, ids in row))
    groups = data.draw(st.lists(st.lists(rows, min_size=1, max_size=3), min_size=1, max_size=3))
    made = [group(i, [A] * (i + 1), *(trajectory(*row) for row in g)) for i, g in enumerate(groups)]
    found = learned(*made)
    flat = [row for g in groups for row in g]
    for row, pieces in enumerate(flat):
        chosen = found.batch.mask[row] > 0
        assert found.batch.tokens[row, 1:][chosen].tolist() == [t for _, ids in pieces for t in ids]
        assert found.versions[row][chosen].tolist() == [v for v, ids in pieces for _ in ids]
        likely = [-v - t / 100 for v, ids in pieces for t in ids]
        np.testing.assert_allclose(found.log_probs[row][chosen], likely, rtol=1e-6)
