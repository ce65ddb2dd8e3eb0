"""What a looping response costs, as a pure function on tensors.

Source: Kimi k1.5 technical report (arXiv 2501.12599), section "Partial Rollouts": repetition is
detected, generation stops early, and it may be penalised on top. Detection is that of
`kimisys.rollout.RepetitionDetector`, while the tokens come; this is the penalty. The report gives
no size for it: it is the trainer's to choose, in the unit of the rewards.
"""

import torch
from torch import Tensor

from kimisys.rl.groups import check_vector


def repetition_penalty(rewards: Tensor, repeated: Tensor, penalty: float) -> Tensor:
    """The rewards, less `penalty` where the response was stopped because it looped.

    rewards: float [n]. repeated: bool [n]. penalty: finite and at least 0; at 0 the rewards come
    back as they are, and a loop costs what its missing answer costs. Returns [n] in the dtype of
    `rewards`, a new tensor. Raises ValueError when a shape, a dtype or the penalty is wrong.
    """
    check_vector("rewards", rewards, floating=True)
    if repeated.dtype != torch.bool or repeated.shape != rewards.shape:
        raise ValueError(
            f"repeated must be bool {tuple(rewards.shape)}, as rewards is, "
            f"got {repeated.dtype} {tuple(repeated.shape)}"
        )
    if not 0.0 <= penalty < float("inf"):  # NaN too
        raise ValueError(f"penalty is {penalty}; it must be finite and at least 0")
    return rewards - penalty * repeated.to(rewards.dtype)
