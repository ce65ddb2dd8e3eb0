"""A matrix of weights in two versions that differ at a stated density, both made beforehand."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bench.reshard import matrix

Bits = npt.NDArray[np.uint16]
Pattern = Literal["random", "clustered"]

COLUMNS = 4096
RUN = 8  # rows that change together, where changes are clustered
_TILE = 1 << 22  # elements drawn; the matrix repeats them


class Versions:
    """bfloat16 [total / 8192, 4096], normally distributed as weights are, in two versions.

    A changed element moves to one of its two neighbours, as a small step of an optimizer moves it:
    that is the easiest case for whoever compresses the XOR of old and new. Random changes hit
    each element with probability `density`; clustered ones hit runs of whole rows.

    Attributes:
        layout: of the matrix `w` at rank 0, in one buffer `w`.
        bits: both versions, uint16[elements].
        changed: elements in which they differ.
    """

    def __init__(self, total: int, density: float, pattern: Pattern, seed: int = 0) -> None:
        rows = total // (2 * COLUMNS)
        self.layout = matrix(rows, COLUMNS, "bfloat16", 0, 1, axis=0)
        elements = rows * COLUMNS
        generator = torch.Generator().manual_seed(seed)
        tile = torch.randn(min(_TILE, elements), generator=generator).mul_(0.02)
        first = np.resize(tile.bfloat16().view(torch.int16).numpy().view(np.uint16), elements)
        second = first.copy()
        rng = np.random.default_rng(seed)
        places = _random(elements, density, rng)
        if pattern == "clustered":
            places = _rows(rows, density, rng)
        second[places] += rng.choice(np.array([1, 0xFFFF], np.uint16), len(places))
        self.bits = (first, second)
        self.changed = len(places)
        self._live = 0

    @property
    def elements(self) -> int:
        return self.bits[0].size

    @property
    def nbytes(self) -> int:
        return self.bits[0].nbytes

    @property
    def density(self) -> float:
        """As it came: changed elements over all."""
        return self.changed / self.elements

    @property
    def live(self) -> Bits:
        """The version that is live now."""
        return self.bits[self._live]

    @property
    def old(self) -> Bits:
        """The other one."""
        return self.bits[1 - self._live]

    @property
    def buffers(self) -> dict[tuple[int, str], Bits]:
        """The live one, as a publisher wants it."""
        return {(0, "w"): self.live}

    def turn(self) -> None:
        """Makes the other version the live one."""
        self._live = 1 - self._live


def _random(elements: int, density: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Ascending places, each of all with probability `density`: drawn by their gaps."""
    enough = int(elements * density + 10 * (elements * density) ** 0.5 + 10)
    places = rng.geometric(density, enough).cumsum() - 1
    return places[: np.searchsorted(places, elements)]


def _rows(rows: int, density: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Ascending places: all of a share of the rows, RUN after RUN; at least one row."""
    count = max(1, round(rows * density))
    runs = -(-count // RUN)
    begins = RUN * np.sort(rng.choice(rows // RUN, runs, replace=False))
    chosen = (begins[:, None] + np.arange(RUN)).ravel()[:count]
    return (chosen[:, None] * COLUMNS + np.arange(COLUMNS)).ravel()
