"""The penalty of a looping response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimisys.rl.policy_loss import group_advantages
from kimisys.rl.repetition import repetition_penalty

responses = st.lists(st.tuples(st.floats(-10, 10), st.booleans()), max_size=20)


@given(responses, st.floats(0, 5))
def test_each_loop_pays_and_no_other_does(rows: list[tuple[float, bool]], penalty: float) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    repeated = torch.tensor([loops for _, loops in rows], dtype=torch.bool)
    got = repetition_penalty(rewards, repeated, penalty)
    assert got.tolist() == [reward - penalty if loops else reward for reward, loops in rows]
    assert got.data_ptr() != rewards.data_ptr() or not rows


def test_among_wrong_answers_the_loop_is_the_worst() -> None:
    """Without a penalty a group of wrong answers teaches nothing; with it, not to loop."""
    rewards, groups = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    repeated = torch.tensor([False, True, False, False])
    assert not group_advantages(repetition_penalty(rewards, repeated, 0.0), groups).any()
    advantages = group_advantages(repetition_penalty(rewards, repeated, 1.0), groups)
    assert advantages.tolist() == [0.25, -0.75, 0.25, 0.25]


def test_wrong_arguments_are_named() -> None:
    rewards, repeated = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="rewards must be floating point"):
        repetition_penalty(repeated, repeated, 1.0)
    with pytest.raises(ValueError, match=r"repeated must be bool \(2,\)"):
        repetition_penalty(rewards, repeated[:1], 1.0)
    with pytest.raises(ValueError, match="repeated must be bool"):
        repetition_penalty(rewards, rewards, 1.0)
    for penalty in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="penalty is"):
            repetition_penalty(rewards, repeated, penalty)
