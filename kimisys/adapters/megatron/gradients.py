"""Gradients of a tensor- and pipeline-parallel model as one vector: whole, measured and clipped the
same on every rank.

A parameter is either sharded (each rank of a stage holds its own part: its gradient is whole) or
replicated. Replicated parameters mostly see the same activations on every rank and so get the same
gradient; those that see only the rank's own heads (the family names them) get a part of it, and the
parts are summed. A tied embedding has a copy on the first and one on the last stage, each of which
sees a part of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kimisys.adapters.megatron.core import parallel_state


@dataclass(frozen=True)
class Groups:
    """Whom a rank meets. tensor: the shards of its stage. model: all ranks of its replica.
    embedding: the first and the last stage; None on a stage between them."""

    tensor: dist.ProcessGroup
    model: dist.ProcessGroup
    embedding: dist.ProcessGroup | None

    @classmethod
    def of_this_rank(cls) -> Groups:
        return cls(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_model_parallel_group(),
            parallel_state.get_embedding_group(check_initialized=False),
        )


def is_sharded(parameter: torch.Tensor) -> bool:
    """True when Megatron split the parameter over the tensor-parallel ranks."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_tied_copy(parameter: torch.Tensor) -> bool:
    """True for a tied embedding of which two stages hold a copy, on either of them."""
    return bool(getattr(parameter, "shared_embedding", False))


def _is_counted_elsewhere(parameter: torch.Tensor) -> bool:
    """True for the last stage's copy of a tied embedding (Megatron's own mark of it)."""
    return bool(getattr(parameter, "shared", False))


def complete_gradients(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    is_partial: Callable[[str], bool],
    groups: Groups,
) -> None:
    """Sum what ranks hold in parts: over the tensor-parallel group the gradients of the parameters
    that `is_partial` names, over the two stages that of a tied embedding. A message for each."""
    parts = [p.grad for name, p in parameters if is_partial(name) and p.grad is not None]
    _sum(parts, groups.tensor)
    tied = [p.grad for _, p in parameters if is_tied_copy(p) and p.grad is not None]
    _sum(tied, groups.embedding)


def _sum(parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    if not parts or group is None or group.size() == 1:
        return
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    for part, whole in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(whole.view_as(part))


def gradient_norm(parameters: Sequence[torch.nn.Parameter], groups: Groups) -> float:
    """The L2 norm of the whole model's gradient: shards of all ranks and stages, replicated
    parameters and a tied embedding once."""
    squares = torch.zeros(2, dtype=torch.float64)  # sharded, replicated
    for parameter in parameters:
        if parameter.grad is not None and not _is_counted_elsewhere(parameter):
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double().square()
            squares[0 if is_sharded(parameter) else 1] += square
    squares[1] /= groups.tensor.size()
    if groups.model.size() > 1:
        dist.all_reduce(squares, group=groups.model)
    return float(squares.sum().sqrt())


def clip_gradients(parameters: Sequence[torch.nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale all gradients so that their norm, now `norm`, is at most `max_norm`."""
    if norm > max_norm:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / norm)


def replica_difference(parameters: Sequence[torch.nn.Parameter], groups: Groups) -> float:
    """The largest difference between two ranks' copies of a parameter, of those that the ranks of a
    stage replicate and of a tied embedding; 0.0 when they agree. The same on every rank."""
    spread = torch.stack(
        [
            _spread([p for p in parameters if not is_sharded(p)], groups.tensor),
            _spread([p for p in parameters if is_tied_copy(p)], groups.embedding),
        ]
    )
    if groups.model.size() > 1:
        dist.all_reduce(spread, dist.ReduceOp.MAX, group=groups.model)
    return float(spread.amax())


def _spread(copies: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None) -> torch.Tensor:
    """The largest difference between two ranks' `copies`: float32, a scalar."""
    flat = [p.detach().reshape(-1).float() for p in copies]
    if not flat or group is None or group.size() == 1:
        return torch.zeros(())
    highest = torch.cat(flat)
    lowest = highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    return (highest - lowest).abs().max()
