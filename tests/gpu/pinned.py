"""Landing buffers in pinned memory: page-locked host memory that plans write and the GPU reads."""

from __future__ import annotations

import numpy as np
import torch

from kimisys.reshard import Layout

Tensors = dict[tuple[int, str], torch.Tensor]
Arrays = dict[tuple[int, str], np.ndarray]


def pinned(layout: Layout) -> Tensors:
    """A uint8 tensor in page-locked memory for each buffer of the layout, filled with ones."""
    tensors = {
        (b.rank, b.name): torch.ones(b.nbytes, dtype=torch.uint8).pin_memory()
        for b in layout.buffers
    }
    assert all(tensor.is_pinned() for tensor in tensors.values())
    return tensors


def arrays(tensors: Tensors) -> Arrays:
    """The same memory, as plans and digests take it."""
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def through(device: torch.device, landed: Tensors) -> Arrays:
    """Up to the device, queued, and back into other memory, once the device has it all."""
    there = {key: tensor.to(device, non_blocking=True) for key, tensor in landed.items()}
    torch.cuda.synchronize()
    return {key: tensor.cpu().numpy() for key, tensor in there.items()}
