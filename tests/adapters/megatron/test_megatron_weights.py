"""A mask that carries weights, on one rank; against transformers it is tested with the policy."""

from __future__ import annotations

import pytest
import torch
from megatron_ranks import TINY

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.model import Model, build_model
from kimisys.adapters.megatron.policy import LossShare, Policy


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int64[6, 12]; mask bool[6, 11], with an empty row and rows of several lengths."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 29, (6, 12), generator=generator)
    ends = torch.tensor([11, 4, 8, 0, 11, 6])
    return tokens, (torch.arange(11) < ends[:, None]) & (torch.arange(11) >= 2)


def stepped(model: Model, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The log-probs that the loss of a step got, float32[6], and the model's weights after it; the
    model then has those from before again."""
    tokens, _ = sample()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    seen = torch.full((6,), torch.nan)

    def loss(values: torch.Tensor, rows: torch.Tensor) -> LossShare:
        seen[rows] = values.detach()
        return LossShare((values * torch.linspace(-1, 1, 6)[rows]).sum())

    Policy(model, micro_batch_tokens=30).policy_step(tokens, mask, loss, 1e-2)
    after = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return seen, after


def test_a_mask_of_ones_and_zeros_weighs_nothing() -> None:
    """To the bit: the loss gets the sums of the selected log-probs, and what the step makes of the
    weights does not depend on the mask's dtype."""
    tokens, mask = sample()
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.float32)
        scored = Policy(model, micro_batch_tokens=30).token_log_probs(tokens, mask)
        wanted, after = stepped(model, mask)
        assert wanted.equal(scored.sum(1))
        assert any(not a.equal(b) for a, b in zip(model.parameters(), after, strict=True))
        for kind in (torch.float32, torch.float64, torch.int64):
            seen, others = stepped(model, mask.to(kind))
            assert seen.equal(wanted)
            assert all(a.equal(b) for a, b in zip(after, others, strict=True))


def test_what_weighs_nothing_is_left_out() -> None:
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.float32)
        tokens, mask = sample()
        scored = Policy(model, micro_batch_tokens=30).token_log_probs(tokens, mask)
        weights = torch.rand(6, 11, generator=torch.Generator().manual_seed(5)) * mask
        weights[4, 5:] = 0.0
        seen, _ = stepped(model, weights)
    torch.testing.assert_close(seen, (scored * weights).sum(1))
    assert seen[3] == 0


@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
def test_a_weight_that_makes_no_sense_is_refused(weight: float) -> None:
    mask = sample()[1].float()
    mask[1, 2] = weight
    with runtime.offline(1, 1, 0, 1):
        model = build_model(TINY, torch.float32)
        with pytest.raises(ValueError, match=r"mask\[1, 2\] is .* finite and at least 0"):
            stepped(model, mask)
