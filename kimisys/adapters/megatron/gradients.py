"""Gradients of a tensor-parallel model as one vector: whole, measured and clipped the same on every
rank.

A parameter is either sharded (each rank holds its own part: its gradient is whole) or replicated.
Replicated parameters mostly see the same activations on every rank and so get the same gradient;
those that see only the rank's own heads (the family names them) get a part of it, and the parts are
summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist


def is_sharded(parameter: torch.Tensor) -> bool:
    """True when Megatron split the parameter over the tensor-parallel ranks."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def sum_partial_gradients(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    is_partial: Callable[[str], bool],
    group: dist.ProcessGroup,
) -> None:
    """Sum over `group` the gradients of the parameters that `is_partial` names. One message."""
    if group.size() == 1:
        return
    parts = [p.grad for name, p in parameters if is_partial(name) and p.grad is not None]
    if not parts:
        return
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=group)
    for part, whole in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        part.copy_(whole.view_as(part))


def gradient_norm(parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup) -> float:
    """The L2 norm of the whole model's gradient: shards of all ranks, replicated parameters
    once."""
    squares = torch.zeros(2, dtype=torch.float64)  # sharded, replicated
    for parameter in parameters:
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double().square()
            squares[0 if is_sharded(parameter) else 1] += square
    if group.size() > 1:
        squares[1] /= group.size()
        dist.all_reduce(squares, group=group)
    return float(squares.sum().sqrt())


def clip_gradients(parameters: Sequence[torch.nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale all gradients so that their norm, now `norm`, is at most `max_norm`."""
    if norm > max_norm:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / norm)


def replica_difference(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup) -> float:
    """The largest difference between two ranks' copies of a replicated parameter; 0.0 when they
    agree."""
    replicas = [p.detach().reshape(-1).float() for p in parameters if not is_sharded(p)]
    if not replicas or group.size() == 1:
        return 0.0
    highest = torch.cat(replicas)
    lowest = highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    return float((highest - lowest).abs().max())
