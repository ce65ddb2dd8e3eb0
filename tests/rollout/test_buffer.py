"""The replay buffer against a list of what was told, and its views."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimisys.errors import SchedulerError
from kimisys.rollout import Prompt, ReplayBuffer, Trajectory

Pieces = st.lists(
    st.tuples(
        st.integers(0, 1),  # sample
        st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=3), max_size=3),  # outputs
    ),
    max_size=12,
)


@given(Pieces)
def test_segments_add_up_to_what_was_made(pieces: list[tuple[int, list[list[int]]]]) -> None:
    buffer = ReplayBuffer()
    group = buffer.offer(Prompt(5, [1], 2, 1000))
    made: list[list[tuple[int, float, int]]] = [[], []]
    for number, (sample, outputs) in enumerate(pieces):
        buffer.begin(group, sample, engine=number % 3, version=number, start=float(number))
        for output in outputs:
            log_probs = [-0.5 * n for n in range(len(output))]
            buffer.extend(group, sample, output, log_probs)
            made[sample] += [(t, p, number) for t, p in zip(output, log_probs, strict=True)]
        assert buffer.end(group, sample, number + 0.5) == sum(map(len, outputs))
    for sample, trajectory in enumerate(buffer.group(group).trajectories):
        assert buffer.output(group, sample) == [t for t, _, _ in made[sample]]
        assert trajectory.token_ids.tolist() == [t for t, _, _ in made[sample]]
        assert trajectory.token_ids.dtype == np.int32
        assert trajectory.log_probs.tolist() == [p for _, p, _ in made[sample]]
        assert trajectory.log_probs.dtype == np.float32
        assert trajectory.versions.tolist() == [v for _, _, v in made[sample]]
        assert all(len(s.token_ids) for s in trajectory.segments)
        assert len(trajectory) == len(made[sample])


def test_views_follow_a_group_from_the_offer_to_the_trainer() -> None:
    buffer = ReplayBuffer()
    first, second = (buffer.offer(Prompt(key, [1, 2], 2, 9)) for key in (70, 71))
    assert [p.key for p in buffer.unfinished()] == [70, 71] and len(buffer) == 2
    assert buffer.begun() == [] and buffer.complete() == []
    buffer.begin(first, 0, 0, 3, 1.0)
    assert [g.id for g in buffer.begun()] == [first]
    buffer.extend(first, 0, [4, 5], [-1.0, -2.0])
    view = buffer.group(first)
    assert len(view.trajectories[0]) == 0  # shows when the segment has ended
    buffer.end(first, 0, 2.0, "stop")
    assert len(view.trajectories[0]) == 0 and not view.complete
    buffer.begin(first, 1, 1, 4, 2.0)
    buffer.end(first, 1, 2.5, "stop")
    assert buffer.begun() == [] and [g.id for g in buffer.complete()] == [first]
    whole = buffer.take(first)
    assert whole.complete and whole.tokens == 2
    assert [s.engine for s in whole.trajectories[0].segments] == [0]
    assert whole.trajectories[1].segments == ()  # it stopped before it made a token
    assert [p.key for p in buffer.unfinished()] == [71] and len(buffer) == 1
    buffer.batch([whole])
    assert [g.id for g in buffer.handed_over()] == [first]
    with pytest.raises(KeyError):
        buffer.group(first)
    assert second == 1


def test_two_segments_of_one_trajectory_at_once_are_refused() -> None:
    buffer = ReplayBuffer()
    group = buffer.offer(Prompt(0, [1], 1, 9))
    buffer.begin(group, 0, 2, 0, 0.0)
    with pytest.raises(SchedulerError, match="sample 0 of group 0 begins a segment on engine 3"):
        buffer.begin(group, 0, 3, 0, 0.0)


def test_an_empty_trajectory_has_arrays_too() -> None:
    empty = Trajectory(())
    assert len(empty.token_ids) == len(empty.log_probs) == len(empty.versions) == 0
