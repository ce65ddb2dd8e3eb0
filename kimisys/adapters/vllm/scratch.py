"""Memory in which weights are turned before they are packed."""

from __future__ import annotations

import torch

from kimisys.reshard import transpose


class Scratch:
    """One piece of memory for one weight after another.

    oneDNN packs a matrix [out, in] element by element when `in` lies dense, and four to seven times
    faster when `out` does: turning it first pays, the more as the reader finds it in the caches.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.int16)

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """The same elements [out, in], of two bytes each, with `out` dense; valid until the next
        call."""
        rows, columns = weight.shape
        if self._memory.numel() < weight.numel():
            self._memory = torch.empty(weight.numel(), dtype=torch.int16)
        turned = self._memory[: weight.numel()].view(columns, rows)
        transpose(
            weight.detach().contiguous().view(torch.int16).numpy(),
            turned.numpy(),
            torch.get_num_threads(),
        )
        return turned.view(weight.dtype).t()
