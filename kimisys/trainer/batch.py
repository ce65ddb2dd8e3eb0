"""Token sequences of different lengths as one right-padded array, as the trainer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """tokens: int64[sequences, longest], right-padded. mask: float32[sequences, longest - 1], 1
    where the token that position predicts belongs to a completion."""

    tokens: np.ndarray
    mask: np.ndarray

    def rows(self, selected: Sequence[int] | np.ndarray) -> Batch:
        """The selected sequences, cut to the longest of them."""
        mask = self.mask[selected]
        used = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1 if mask.any() else 1
        return Batch(self.tokens[selected, : used + 1], mask[:, :used])

    def __len__(self) -> int:
        return len(self.tokens)


def make_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int
) -> Batch:
    """One row for each (prompt, completion) pair; the pads after it are never predicted."""
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), longest - 1), dtype=np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = [*prompt, *completion]
        mask[row, len(prompt) - 1 : end - 1] = 1.0
    return Batch(tokens, mask)
