"""Log-probabilities of tokens over a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def target_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """log softmax(logits)[target], the softmax running over the vocabularies of all ranks of
    `group`.

    logits: floating [b, t, rows], this rank's equal share of the padded vocabulary, in order of
    rank. targets: int64[b, t], in 0..vocab_size-1. Padded entries (at vocab_size and past it) have
    probability zero. Returns float32[b, t], equal on all ranks, and differentiable. Full logits are
    never gathered: ranks exchange two numbers and a maximum for each position, forward, and nothing
    backward.
    """
    result: torch.Tensor = _TargetLogProbs.apply(logits, targets, vocab_size, group)
    return result


def gathered_log_probs(
    logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """log softmax over the whole vocabulary, float32[b, t, vocab_size], on every rank. For small
    probes: this one does gather the logits. Not differentiable."""
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    if group.size() == 1:
        parts = [logits]
    else:
        dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, -1)[..., :vocab_size].float().log_softmax(-1)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        rows = logits.shape[-1]
        start = group.rank() * rows
        real = min(max(vocab_size - start, 0), rows)
        local = logits[..., :real].float()

        # a rank may hold nothing but padding
        top = local.amax(-1) if real else local.new_full(targets.shape, -torch.inf)
        _all_reduce(top, dist.ReduceOp.MAX, group)
        shifted = local - top.unsqueeze(-1)
        weights = shifted.exp()
        here = (targets >= start) & (targets < start + real)
        index = (targets - start).clamp_(0, max(real - 1, 0)).unsqueeze_(-1)

        totals = torch.zeros(2, *targets.shape)
        totals[0] = weights.sum(-1)
        if real:
            totals[1] = shifted.gather(-1, index).squeeze(-1).masked_fill_(~here, 0.0)
        _all_reduce(totals, dist.ReduceOp.SUM, group)

        ctx.save_for_backward(weights.div_(totals[0].unsqueeze(-1)), index, here)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return totals[1] - totals[0].log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, index, here = ctx.saved_tensors
        real = probabilities.shape[-1]
        grad_logits = grad.new_zeros(ctx.shape)
        if real:
            share = grad_logits[..., :real]
            torch.mul(probabilities, grad.neg().unsqueeze(-1), out=share)
            share.scatter_add_(-1, index, (grad * here).unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None


def _all_reduce(tensor: torch.Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
