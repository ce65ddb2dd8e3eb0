"""k1.5's loss against a float64 reference, finite differences and its own symmetries."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.rl.policy_loss import (
    group_advantages,
    policy_loss,
    sample_weights,
    sequence_log_probs,
)

no_deadline = settings(deadline=None, max_examples=50)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, np.ndarray | float]:
    """One optimizer step in float64: groups of unequal size, shuffled, labelled by any integers."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    labels = draw(st.permutations(range(-3, 10)))[: len(sizes)]
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(labels, sizes))
    n = len(groups)
    binary = draw(st.booleans())
    return {
        "groups": groups,
        "rewards": rng.integers(0, 2, n).astype(float) if binary else rng.normal(size=n),
        "log_probs": -rng.exponential(5.0, n),
        "reference": -rng.exponential(5.0, n),
        "tau": draw(st.sampled_from([0.0, 0.01, 0.1, 1.0, 3.0])),
    }


def reference_loss(step: dict) -> tuple[float, np.ndarray]:
    """The loss and its gradient by loops over prompts and samples, as the report writes them."""
    members = defaultdict(list)
    for j, group in enumerate(step["groups"]):
        members[int(group)].append(j)
    loss, gradient = 0.0, np.zeros(len(step["groups"]))
    for samples in members.values():
        k, prompts = len(samples), len(members)
        mean_reward = math.fsum(step["rewards"][j] for j in samples) / k
        for j in samples:
            advantage = step["rewards"][j] - mean_reward
            log_ratio = step["log_probs"][j] - step["reference"][j]
            ascent = step["log_probs"][j] * advantage - step["tau"] / 2 * log_ratio**2
            loss -= ascent / k / prompts
            gradient[j] = -(advantage - step["tau"] * log_ratio) / k / prompts
    return loss, gradient


def run(step: dict, dtype: torch.dtype = torch.float64):
    """Loss record and gradient of the implementation."""
    log_probs = torch.tensor(step["log_probs"], dtype=dtype, requires_grad=True)
    groups = torch.tensor(step["groups"])
    result = policy_loss(
        log_probs,
        torch.tensor(step["reference"], dtype=dtype),
        group_advantages(torch.tensor(step["rewards"], dtype=dtype), groups),
        sample_weights(groups).to(dtype),
        step["tau"],
    )
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return result, gradient.numpy()


@no_deadline
@given(steps())
def test_agrees_with_the_float64_reference(step):
    loss, gradient = reference_loss(step)
    result, got = run(step)
    scale = 1 + np.abs(step["log_probs"]).max() ** 2
    assert result.loss.item() == pytest.approx(loss, abs=1e-6 * scale)
    np.testing.assert_allclose(got, gradient, rtol=1e-6, atol=1e-6)
    assert (result.surrogate + result.penalty).item() == pytest.approx(result.loss.item())


@no_deadline
@given(steps())
def test_float32_is_the_same_to_rounding(step):
    loss, gradient = reference_loss(step)
    result, got = run(step, torch.float32)
    scale = 1 + np.abs(step["log_probs"]).max() ** 2
    assert result.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-5 * scale)
    np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5 * scale)


@no_deadline
@given(steps())
def test_gradient_agrees_with_finite_differences(step):
    _, gradient = run(step)
    epsilon = 1e-4
    for j in range(len(gradient)):
        sides = []
        for sign in (1, -1):
            moved = step["log_probs"].copy()
            moved[j] += sign * epsilon
            sides.append(run({**step, "log_probs": moved})[0].loss.item())
        assert (sides[0] - sides[1]) / (2 * epsilon) == pytest.approx(gradient[j], abs=1e-7)


def test_gradient_through_a_model_agrees_with_finite_differences():
    """From logits to the loss, with prompts, padding and responses of unequal length."""
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    tokens = torch.randint(0, 5, (4, 6))
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0] * 6]
    ).bool()
    groups = torch.tensor([7, 7, 3, 3])
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), groups)
    weights = sample_weights(groups).double()
    reference = torch.tensor([-4.0, -7.0, -2.0, 0.0], dtype=torch.float64)

    def loss(at: torch.Tensor) -> torch.Tensor:
        token_log_probs = at.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        log_probs = sequence_log_probs(token_log_probs, mask)
        return policy_loss(log_probs, reference, advantages, weights, 0.3).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), raise_exception=True)


@no_deadline
@given(steps())
def test_at_the_start_of_an_iteration_it_is_reinforce_with_a_baseline(step):
    """At π_θ = π_i the penalty has no gradient, which leaves the advantage over k and prompts."""
    step = {**step, "reference": step["log_probs"], "tau": 2.0}
    result, gradient = run(step)
    assert result.penalty.item() == 0
    assert result.divergence.item() == 0
    np.testing.assert_allclose(gradient, run({**step, "tau": 0.0})[1])
    for label in set(step["groups"]):
        assert gradient[step["groups"] == label].sum() == pytest.approx(0, abs=1e-6)


def test_the_minimum_is_the_reports_closed_form():
    """With r̄ for τ·log Z, the surrogate is least at log π_θ/π_i = (r - r̄)/τ."""
    groups = torch.zeros(4, dtype=torch.int64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([-3.0, -9.0, -1.0, -5.0], dtype=torch.float64)
    advantages, tau = group_advantages(rewards, groups), 0.25
    best = (reference + advantages / tau).requires_grad_()
    result = policy_loss(best, reference, advantages, sample_weights(groups).double(), tau)
    (gradient,) = torch.autograd.grad(result.loss, best)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64))


@no_deadline
@given(steps(), st.floats(-100, 100))
def test_a_constant_added_to_a_groups_rewards_changes_nothing(step, constant):
    shifted = step["rewards"] + constant * (step["groups"] == step["groups"][0])
    before, after = run(step), run({**step, "rewards": shifted})
    assert after[0].loss.item() == pytest.approx(before[0].loss.item(), abs=1e-9)
    np.testing.assert_allclose(after[1], before[1], atol=1e-9)


@no_deadline
@given(steps(), st.integers(0, 2**32 - 1))
def test_order_and_labels_do_not_matter(step, seed):
    order = np.random.default_rng(seed).permutation(len(step["groups"]))
    moved = {name: v[order] if isinstance(v, np.ndarray) else v for name, v in step.items()}
    moved["groups"] = moved["groups"] * 1000 - 5
    before, after = run(step), run(moved)
    assert after[0].loss.item() == pytest.approx(before[0].loss.item(), abs=1e-9)
    np.testing.assert_allclose(after[1], before[1][order], atol=1e-12)


@no_deadline
@given(steps(), st.integers(1, 6))
def test_micro_batches_add_up(step, size):
    groups = torch.tensor(step["groups"])
    advantages = group_advantages(torch.tensor(step["rewards"]), groups)
    weights = sample_weights(groups).double()
    reference = torch.tensor(step["reference"])
    log_probs = torch.tensor(step["log_probs"], requires_grad=True)
    totals = dict.fromkeys(("loss", "surrogate", "penalty", "divergence"), 0.0)
    for first in range(0, len(groups), size):
        part = slice(first, first + size)
        micro = policy_loss(
            log_probs[part], reference[part], advantages[part], weights[part], step["tau"]
        )
        micro.loss.backward()
        totals = {name: total + getattr(micro, name).item() for name, total in totals.items()}
    whole, gradient = run(step)
    for name, total in totals.items():
        assert total == pytest.approx(getattr(whole, name).item(), abs=1e-9)
    np.testing.assert_allclose(log_probs.grad.numpy(), gradient, atol=1e-12)


@no_deadline
@given(steps())
def test_weights_average_over_samples_and_then_over_prompts(step):
    weights = sample_weights(torch.tensor(step["groups"])).numpy()
    labels = set(step["groups"])
    for label in labels:
        assert weights[step["groups"] == label].sum() == pytest.approx(1 / len(labels))


@no_deadline
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), st.integers(1, 7))
def test_equal_rewards_give_exactly_no_advantage(values, k):
    groups = torch.arange(len(values)).repeat_interleave(k)
    rewards = torch.tensor(values, dtype=torch.float32).repeat_interleave(k)
    assert group_advantages(rewards, groups).abs().max() == 0


def test_the_gradient_reaches_nothing_but_log_probs():
    inputs = [torch.rand(3, requires_grad=True) for _ in range(4)]
    policy_loss(*inputs, tau=0.5).loss.backward()
    assert inputs[0].grad is not None
    assert [value.grad for value in inputs[1:]] == [None] * 3


def test_masked_tokens_reach_neither_value_nor_gradient():
    values = torch.tensor([[float("nan"), -1.0, -2.0, float("-inf")]], requires_grad=True)
    total = sequence_log_probs(values, torch.tensor([[False, True, True, False]]))
    total.sum().backward()
    assert total.tolist() == [-3.0]
    assert values.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_wrong_arguments_are_named():
    ones, groups = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="groups has shape"):
        group_advantages(ones, groups[:2])
    with pytest.raises(ValueError, match="groups must be integer"):
        group_advantages(ones, ones)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        group_advantages(torch.tensor([0.0, float("nan"), 1.0]), groups)
    with pytest.raises(ValueError, match="one dimension"):
        sample_weights(groups[None])
    with pytest.raises(ValueError, match="advantages has shape"):
        policy_loss(ones, ones, ones[:2], ones, 0.1)
    with pytest.raises(ValueError, match="weights must be floating point"):
        policy_loss(ones, ones, ones, groups, 0.1)
    for tau in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tau"):
            policy_loss(ones, ones, ones, ones, tau)
    with pytest.raises(ValueError, match="must be bool or float weights"):
        sequence_log_probs(ones[None], groups[None])
    with pytest.raises(ValueError, match="must both be"):
        sequence_log_probs(ones[None], torch.ones(1, 4).bool())
