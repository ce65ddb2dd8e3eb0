"""Samples by prompt: one label for all samples of a prompt; any labels, in any order."""

import torch
from torch import Tensor


def group_members(groups: Tensor, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The dense index of each sample's group, int64 [n], and each group's size, int64 [prompts].

    groups: integer [n]. name, shape: of the values that it labels. Raises ValueError when the
    shape or dtype of `groups` is wrong.
    """
    check_vector("groups", groups, floating=False)
    if groups.shape != shape:
        raise ValueError(
            f"groups has shape {tuple(groups.shape)} and {name} {tuple(shape)}; "
            "each takes one value per response"
        )
    _, member, size = torch.unique(groups, return_inverse=True, return_counts=True)
    return member, size


def check_vector(name: str, value: Tensor, *, floating: bool) -> None:
    """Raise ValueError unless `value` is [n] and, as `floating` says, of real or integer dtype."""
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(value.shape)}")
    if value.is_floating_point() != floating or value.dtype == torch.bool:
        wanted = "floating point" if floating else "integer"
        raise ValueError(f"{name} must be {wanted}, got {value.dtype}")
