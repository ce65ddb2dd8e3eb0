"""pass@k: the chance that at least one of k samples is right, estimated from n >= k samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(right: Sequence[int], samples: int, k: int) -> float:
    """The mean over problems of 1 - C(n - c, k) / C(n, k), which is unbiased (Chen et al. 2021,
    arXiv 2107.03374, section 2.1).

    right: c of each problem, the number of its right samples. samples: n, the same for all. k:
    within 1 to n. Raises ValueError for numbers that do not fit.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; with {samples} samples it lies within 1 to {samples}")
    if not right or not all(0 <= c <= samples for c in right):
        raise ValueError(f"right must hold, for each problem, a number within 0 to {samples}")
    return 1.0 - sum(comb(samples - c, k) for c in right) / (len(right) * comb(samples, k))
