"""Kimi k1.5's length reward, as a pure function on tensors, and when it counts.

Source: Kimi k1.5 technical report (arXiv 2501.12599), section "Length Penalty". Among the k samples
of a prompt, with lengths len_i,

    λ_i = 0.5 - (len_i - min_len) / (max_len - min_len)

is what a right answer earns, from 0.5 for the shortest to -0.5 for the longest; a wrong answer
earns min(0, λ_i): being short never pays for being wrong. When all k are equally long, all get 0.
The trainer adds weight · λ to the rewards; the weight is zero in a first phase, because
shortening before the answers are right holds the learning back, and constant afterwards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimisys.rl.groups import check_vector, group_members


@dataclass(frozen=True)
class LengthRewardSchedule:
    """Nothing before `start_step`, `weight` from it on.

    weight: reward per unit of λ, finite and at least 0; 0 switches the length reward off.
    start_step: the first step with length reward, at least 0. Raises ValueError for others.
    """

    weight: float
    start_step: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < float("inf"):  # NaN too
            raise ValueError(f"weight is {self.weight}; it must be finite and at least 0")
        if self.start_step < 0:
            raise ValueError(f"start_step is {self.start_step}; it must be at least 0")

    def weight_at(self, step: int) -> float:
        """The weight of the length reward in `step`."""
        return self.weight if step >= self.start_step else 0.0


def length_rewards(lengths: Tensor, correct: Tensor, groups: Tensor) -> Tensor:
    """λ of each sample, before any weight; the formula is at the head of this file.

    lengths: integer [n], tokens of each response, at least 0. correct: bool [n], whether its answer
    is right; what the token limit cut off is not. groups: integer [n], one label for all samples of
    a prompt; any labels, in any order. Returns float32 [n], within -0.5 to 0.5; a group of one
    gives zero. Raises ValueError when a shape or dtype is wrong or a length is negative.
    """
    check_vector("lengths", lengths, floating=False)
    member, size = group_members(groups, "lengths", lengths.shape)
    if correct.dtype != torch.bool or correct.shape != lengths.shape:
        raise ValueError(
            f"correct must be bool {tuple(lengths.shape)}, as lengths is, "
            f"got {correct.dtype} {tuple(correct.shape)}"
        )
    if bool((lengths < 0).any()):
        bad = int((lengths < 0).nonzero()[0])
        raise ValueError(f"lengths[{bad}] is {lengths[bad].item()}; a length is a count of tokens")

    wide = lengths.to(torch.int64)  # an 8-bit difference would wrap around
    least, most = torch.zeros_like(size), torch.zeros_like(size)
    least.scatter_reduce_(0, member, wide, "amin", include_self=False)
    most.scatter_reduce_(0, member, wide, "amax", include_self=False)
    spread = (most - least)[member]
    position = (wide - least[member]).double() / spread.clamp(min=1)
    shortness = torch.where(spread > 0, 0.5 - position, 0.0)
    return torch.where(correct, shortness, shortness.clamp(max=0.0)).float()
