"""AdamW's moments as a layout in Hugging Face coordinates: where a parameter lies, its moments lie.

So they are saved, loaded and moved between layouts by the same plans as the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from kimisys.adapters.megatron.layout import tensor_bytes
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch.optim.AdamW's names of the first and the second moment."""


def optimizer_layout(weights: Layout, trained: Collection[str]) -> Layout:
    """The moments of a rank whose `model_layout` is `weights`; of several ranks: merge theirs.

    trained: names of the parameters among the layout's buffers. Others are buffers to Megatron too,
    such as a router's bias, and have no moments.
    Tensor "exp_avg.NAME" for each tensor NAME that the rank trains a part of, and so for
    "exp_avg_sq" and for buffers; dtype, fragments and padding are those of the weights, since torch
    keeps moments in their dtype.
    """
    names = set(trained)
    held = [f for f in weights.fragments if f.buffer in names]
    of_tensors = {f.tensor for f in held}
    tensors, buffers, fragments, padding = [], [], [], []
    for moment in MOMENTS:
        tensors += [
            Tensor(f"{moment}.{t.name}", t.dtype, t.shape)
            for t in weights.tensors
            if t.name in of_tensors
        ]
        buffers += [
            Buffer(b.rank, f"{moment}.{b.name}", b.nbytes)
            for b in weights.buffers
            if b.name in names
        ]
        fragments += [
            Fragment(
                f"{moment}.{f.tensor}",
                f.region,
                f.rank,
                f"{moment}.{f.buffer}",
                f.byte_offset,
                f.byte_strides,
            )
            for f in held
        ]
        padding += [
            Padding(p.rank, f"{moment}.{p.buffer}", p.byte_offset, p.nbytes)
            for p in weights.padding
            if p.buffer in names
        ]
    return Layout(tensors, buffers, fragments, padding, weights.places)


def optimizer_buffers(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter], rank: int
) -> dict[tuple[int, str], np.ndarray]:
    """The memory of all moments as bytes, {(rank, "exp_avg.PARAMETER"): uint8[nbytes], ...}: views
    that write through. Moments that do not exist yet are made, as the zeros they begin with."""
    return {
        (rank, f"{moment}.{name}"): tensor_bytes(name, _state(optimizer, parameter)[moment])
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }


def steps_taken(optimizer: torch.optim.AdamW) -> int:
    """Steps since the moments were zero: what AdamW's bias correction counts."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_steps_taken(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Make AdamW believe that it has taken `steps`; for moments that were loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _state(optimizer, parameter)["step"].fill_(steps)


def _state(optimizer: torch.optim.AdamW, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """A parameter's state in the form that AdamW gives it at its first step."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
