"""Kimi k1.5's policy loss, as pure functions on tensors.

Source: Kimi k1.5 technical report (arXiv 2501.12599), section "Policy Optimization". In iteration
i the policy π_i is both the sampler and the reference. For one prompt with k sampled responses
y_1 .. y_k, rewards r_j and their mean r̄, the report ascends

    (1/k) Σ_j [ ∇log π_θ(y_j)·(r_j - r̄) - (τ/2)·∇( log π_θ(y_j)/π_i(y_j) )² ]

and averages over prompts. `policy_loss` is the scalar that has the opposite gradient:

    (1/prompts) Σ_prompts (1/k) Σ_j [ -log π_θ(y_j)·(r_j - r̄) + (τ/2)·(log π_θ(y_j)/π_i(y_j))² ]

Log-probabilities are those of whole responses, summed over tokens: the method has no ratio per
token, no clipping and no value network, and it does not divide rewards by their spread.

Micro-batches: call `group_advantages` and `sample_weights` once over all that one optimizer step
sees and slice them with the samples; then the micro-batch losses, and their gradients, add up to
those of the whole step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimisys.rl.groups import check_vector, group_members


@dataclass(frozen=True)
class PolicyLoss:
    """One (micro-)batch's loss and the sums that describe it: scalars that add up as the loss does.

    `loss` carries the gradient and equals `surrogate` + `penalty`; the others are detached. With
    d = log π_θ(y) - log π_i(y) and w the sample weights: `surrogate` is -Σ w·log π_θ(y)·(r - r̄),
    `penalty` is (τ/2)·Σ w·d², and `divergence` is -Σ w·d, in nats per response. As y was sampled
    from π_i, `divergence` estimates KL(π_i ‖ π_θ), how far the iteration has moved already.
    """

    loss: Tensor
    surrogate: Tensor
    penalty: Tensor
    divergence: Tensor


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each reward minus the mean reward of its group: r_j - r̄.

    rewards: float [n]. groups: integer [n], one label for all samples of a prompt; any labels, in
    any order. Returns [n] in the dtype of `rewards`; a group of one, or one whose rewards are all
    equal, gives exactly zero. Raises ValueError when a shape or dtype is wrong or a reward is not
    finite.
    """
    check_vector("rewards", rewards, floating=True)
    member, size = group_members(groups, "rewards", rewards.shape)
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(
            f"rewards[{bad}] is {rewards[bad].item()}; a reward must be finite: see to its checker"
        )
    # measured from the least of the group, so that equal rewards give zero and no rounding error
    least = torch.zeros_like(size, dtype=rewards.dtype)
    least.scatter_reduce_(0, member, rewards, "amin", include_self=False)
    offset = rewards - least[member]
    total = torch.zeros_like(least).index_add_(0, member, offset)
    return offset - (total / size.to(rewards.dtype))[member]


def sample_weights(groups: Tensor) -> Tensor:
    """1 / (prompts · k) for each sample, k the size of its group: mean over k, then over prompts.

    groups: integer [n], as in `group_advantages`. Returns float32 [n], which sums to 1. Raises
    ValueError when the shape or dtype is wrong.
    """
    member, size = group_members(groups, "groups", groups.shape)
    return 1.0 / (size.to(torch.float32)[member] * max(size.numel(), 1))


def sequence_log_probs(token_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y|x): the sum of log π(y_t | x, y_<t) over the tokens of the response, and no others.

    token_log_probs: float [b, s]. response_mask: bool [b, s], true where the token was sampled
    (the closing <eos> included), false on prompt and padding; or float [b, s], the weights of
    `rl.partial`: the sum is then Σ_t w_t·log π(y_t | x, y_<t), w detached. Returns [b]. What the
    mask excludes, or a weight of 0, may be anything, NaN included: it reaches neither the value nor
    the gradient. Raises ValueError when a shape or dtype is wrong.
    """
    weighted = response_mask.is_floating_point()
    if response_mask.dtype != torch.bool and not weighted:
        raise ValueError(f"response_mask must be bool or float weights, got {response_mask.dtype}")
    if token_log_probs.dim() != 2 or token_log_probs.shape != response_mask.shape:
        raise ValueError(
            "token_log_probs and response_mask must both be [batch, tokens], got "
            f"{tuple(token_log_probs.shape)} and {tuple(response_mask.shape)}"
        )
    if weighted:
        counted = token_log_probs.masked_fill(response_mask == 0, 0.0)
        return (counted * response_mask.detach().to(counted.dtype)).sum(dim=1)
    return token_log_probs.masked_fill(~response_mask, 0.0).sum(dim=1)


def policy_loss(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    tau: float,
) -> PolicyLoss:
    """k1.5's loss of one (micro-)batch of responses; the formula is at the head of this file.

    log_probs: float [n], log π_θ(y|x) of each response, with gradient. reference_log_probs: float
    [n], log π_i(y|x). advantages, weights: float [n], the slice of what `group_advantages` and
    `sample_weights` gave for the WHOLE optimizer step. tau: τ, finite and at least 0, in reward
    per nat. The gradient flows into `log_probs` alone. Raises ValueError when a shape, a dtype or
    tau is wrong.
    """
    for name, value in (
        ("log_probs", log_probs),
        ("reference_log_probs", reference_log_probs),
        ("advantages", advantages),
        ("weights", weights),
    ):
        check_vector(name, value, floating=True)
        if value.shape != log_probs.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and log_probs {tuple(log_probs.shape)}; "
                "each takes one value per response"
            )
    if not 0.0 <= tau < float("inf"):
        raise ValueError(f"tau is {tau}; it must be finite and at least 0")

    scale = weights.detach()
    log_ratio = log_probs - reference_log_probs.detach()
    surrogate = -(scale * advantages.detach() * log_probs).sum()
    penalty = 0.5 * tau * (scale * log_ratio.square()).sum()
    return PolicyLoss(
        loss=surrogate + penalty,
        surrogate=surrogate.detach(),
        penalty=penalty.detach(),
        divergence=-(scale * log_ratio.detach()).sum(),
    )
