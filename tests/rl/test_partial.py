"""The weights of tokens of partial rollouts against float64 loops, and k1.5's loss with them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.errors import KimisysError
from kimisys.rl.partial import Completions, TokenWeightsError, implementations, token_weights
from kimisys.rl.policy_loss import (
    group_advantages,
    policy_loss,
    sample_weights,
    sequence_log_probs,
)

no_deadline = settings(deadline=None, max_examples=100)


@st.composite
def rollouts(draw: st.DrawFn) -> Completions:
    """Rows of a prompt, segments of rising versions and padding; what is no token is nonsense."""
    rows, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    version = int(rng.integers(0, 6))
    mask = np.zeros((rows, tokens), bool)
    versions = np.full((rows, tokens), -7)
    now = rng.choice([np.nan, np.inf, -np.inf, 3.0], (rows, tokens))
    then = rng.choice([np.nan, np.inf, -np.inf, 3.0], (rows, tokens))
    for row in range(rows):
        start = int(rng.integers(0, tokens))
        count = int(rng.integers(0, tokens - start + 1))
        made = slice(start, start + count)
        mask[row, made] = True
        versions[row, made] = np.sort(rng.integers(0, version + 1, count))
        now[row, made] = -rng.exponential(2.0, count)
        then[row, made] = now[row, made] + rng.normal(0, draw(st.sampled_from([0.01, 2.0])), count)
    kind = draw(st.sampled_from([torch.bool, torch.float32, torch.int64]))
    return Completions(
        torch.tensor(mask).to(kind),
        torch.tensor(versions),
        version,
        torch.tensor(now),
        torch.tensor(then),
    )


def by_loops(name: str, given: Completions, staleness: int, truncation: float) -> np.ndarray:
    """The definitions, token by token, in float64."""
    assert given.log_probs is not None and given.behaviour_log_probs is not None
    weights = np.zeros(given.mask.shape)
    for row in range(weights.shape[0]):
        made = [t for t in range(weights.shape[1]) if given.mask[row, t]]
        newest = max((int(given.versions[row, t]) for t in made), default=0)
        for t in made:
            version = int(given.versions[row, t])
            now, then = float(given.log_probs[row, t]), float(given.behaviour_log_probs[row, t])
            weights[row, t] = {
                "all": 1.0,
                "current": float(version == newest),
                "recent": float(given.version - version <= staleness),
                "weighted": 1.0
                if version == given.version
                else min(truncation, math.exp(now) / math.exp(then)),
            }[name]
    return weights


@pytest.mark.parametrize("name", implementations())
@no_deadline
@given(rollouts(), st.integers(0, 4), st.sampled_from([1.0, 1.3, 2.0, 10.0]))
def test_weights_are_those_of_the_loops(
    name: str, made: Completions, staleness: int, truncation: float
) -> None:
    got = token_weights(name, made, staleness=staleness, truncation=truncation)
    assert got.dtype == torch.float32 and not got.requires_grad
    np.testing.assert_allclose(got, by_loops(name, made, staleness, truncation), rtol=1e-6)


@pytest.mark.parametrize("name", implementations())
@no_deadline
@given(rollouts(), st.integers(0, 2**32 - 1))
def test_the_loss_with_weights_is_that_of_the_loops(
    name: str, made: Completions, seed: int
) -> None:
    """k1.5's loss and its gradient by token, with Σ_t w_t·log π(y_t) in place of log π(y)."""
    rng = np.random.default_rng(seed)
    rows, tau = made.mask.shape[0], 0.3
    groups, rewards = rng.integers(0, 2, rows), rng.normal(size=rows)
    theta = np.where(made.made, -rng.exponential(2.0, made.mask.shape), np.nan)
    weights = by_loops(name, made, 1, 2.0)
    assert made.log_probs is not None
    loss, gradient = 0.0, np.zeros(made.mask.shape)
    labels = sorted(set(groups.tolist()))
    for label in labels:
        members = np.flatnonzero(groups == label)
        for j in members:
            picked = [t for t in range(theta.shape[1]) if weights[j, t] > 0]
            log_prob = math.fsum(weights[j, t] * theta[j, t] for t in picked)
            reference = math.fsum(weights[j, t] * float(made.log_probs[j, t]) for t in picked)
            advantage = rewards[j] - rewards[members].mean()
            scale = 1 / len(members) / len(labels)
            loss += scale * (-log_prob * advantage + tau / 2 * (log_prob - reference) ** 2)
            for t in picked:
                slope = -advantage + tau * (log_prob - reference)
                gradient[j, t] = scale * slope * weights[j, t]

    values = torch.tensor(theta, requires_grad=True)
    got_weights = token_weights(name, made, staleness=1, truncation=2.0)
    result = policy_loss(
        sequence_log_probs(values, got_weights),
        sequence_log_probs(made.log_probs, got_weights),
        group_advantages(torch.tensor(rewards), torch.tensor(groups)),
        sample_weights(torch.tensor(groups)).double(),
        tau,
    )
    (got,) = torch.autograd.grad(result.loss, values)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-5)


def test_a_sibling_that_was_finished_before_keeps_its_loss() -> None:
    """Row 0 was continued under version 5, row 1 ended under 3, row 2 in three versions."""
    made = Completions(
        mask=torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]]),
        versions=torch.tensor([[9, 4, 5, 5], [9, 3, 3, 9], [3, 4, 4, 5]]),
        version=5,
    )
    current = token_weights("current", made)
    assert current.tolist() == [[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]]
    recent = token_weights("recent", made, staleness=1)
    assert recent.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert token_weights("all", made).equal(made.mask.float())


def test_on_policy_all_policies_are_the_mask() -> None:
    """Without partial rollouts the names differ in nothing, to the bit."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 9, generator=rng) < 0.5
    now, then = torch.rand(4, 9, generator=rng), torch.rand(4, 9, generator=rng)
    made = Completions(mask, torch.full((4, 9), 2), 2, now, then)
    values = torch.randn(4, 9, generator=rng)
    for name in implementations():
        weights = token_weights(name, made, staleness=0)
        assert weights.equal(mask.float()), name
        assert sequence_log_probs(values, weights).equal(sequence_log_probs(values, mask)), name


def test_a_ratio_beyond_float_is_cut_and_reaches_no_gradient() -> None:
    now = torch.tensor([[0.0, -1e4, -1.0]], requires_grad=True)
    then = torch.tensor([[-1e4, 0.0, -1.5]])
    made = Completions(torch.ones(1, 3), torch.zeros(1, 3).long(), 1, now, then)
    weights = token_weights("weighted", made, truncation=3.0)
    assert weights.tolist() == [[3.0, 0.0, pytest.approx(math.exp(0.5))]]
    assert not weights.requires_grad


def test_weighted_sums_keep_nonsense_out() -> None:
    values = torch.tensor([[float("nan"), -1.0, -2.0, float("-inf")]], requires_grad=True)
    total = sequence_log_probs(values, torch.tensor([[0.0, 0.5, 2.0, 0.0]]))
    total.sum().backward()
    assert total.tolist() == [-4.5]
    assert values.grad is not None and values.grad.tolist() == [[0.0, 0.5, 2.0, 0.0]]


def test_wrong_arguments_are_named() -> None:
    mask, versions = torch.ones(2, 3), torch.zeros(2, 3).long()
    good = Completions(mask, versions, 1, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TokenWeightsError, match=r"no token weights 'new'; .*all, current, recent"):
        token_weights("new", good)
    with pytest.raises(TokenWeightsError, match="staleness is -1"):
        token_weights("recent", good, staleness=-1)
    for truncation in (0.5, math.nan, math.inf):
        with pytest.raises(TokenWeightsError, match="truncation is"):
            token_weights("weighted", good, truncation=truncation)
    with pytest.raises(TokenWeightsError, match="needs behaviour_log_probs"):
        token_weights("weighted", replace(good, behaviour_log_probs=None))
    with pytest.raises(TokenWeightsError, match=r"log_probs must be floating point \(2, 3\)"):
        token_weights("weighted", replace(good, log_probs=torch.zeros(2, 2)))
    then = torch.zeros(2, 3)
    then[1, 2] = -math.inf
    with pytest.raises(TokenWeightsError, match=r"behaviour_log_probs\[1, 2\] is -inf"):
        token_weights("weighted", replace(good, behaviour_log_probs=then))
    with pytest.raises(TokenWeightsError, match=r"mask must be \[rows, tokens\]"):
        Completions(mask[0], versions[0], 1)
    with pytest.raises(TokenWeightsError, match=r"mask\[0, 0\] is 0.5"):
        Completions(mask / 2, versions, 1)
    with pytest.raises(TokenWeightsError, match=r"versions must be int64 \(2, 3\)"):
        Completions(mask, versions[:1], 1)
    with pytest.raises(TokenWeightsError, match=r"versions\[0, 0\] is 2; .* 0 to 1"):
        Completions(mask, versions + 2, 1)
    assert issubclass(TokenWeightsError, KimisysError)
    with pytest.raises(ValueError, match="bool or float weights"):
        sequence_log_probs(mask, mask.long())
