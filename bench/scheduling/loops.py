"""The detector of loops again: every period at every token, by its definition."""

from __future__ import annotations

import numpy as np

from kimisys.rollout import RepetitionConfig


def first_loop(tokens: np.ndarray, config: RepetitionConfig) -> tuple[int, int] | None:
    """The first position at which the text loops, and its shortest period. Counts the equal tokens
    of every period's window as it moves on: O(max_period) for each token."""
    periods = np.arange(1, config.max_period + 1)
    pairs = np.maximum(config.min_tokens, config.min_repeats * periods) - periods
    needed = np.ceil(config.agreement * pairs - 1e-9)
    longest = int((pairs + periods).max())
    padded = np.concatenate([np.full(longest + 1, -1), tokens])
    count = np.zeros(len(periods), np.int64)
    for position in range(len(tokens)):
        here = position + longest + 1
        entered = padded[here] == padded[here - periods]
        last = padded[here - pairs]
        left = (last == padded[here - pairs - periods]) & (last >= 0)
        count += entered
        count -= left
        holds = (count >= needed) & (pairs + periods <= position + 1)
        if holds.any():
            return position + 1, int(periods[holds.argmax()])
    return None
