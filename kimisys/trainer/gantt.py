"""The Gantt picture of engines: who ran what, and under which weights."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba

COLOURS = ("#2f6db3", "#e08a2e", "#3a9b74", "#c8504f", "#7d5fb2", "#5bb0c9")
"""Of weight versions, in turn; to be read on light and on dark ground."""
_GAP = 0.18  # of an engine's row: what keeps it apart from the next


@dataclass(frozen=True)
class Bars:
    """Segments as they ran, an entry each: engine, seconds from start to end, weight version."""

    engine: npt.NDArray[np.int64]
    start: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    version: npt.NDArray[np.int64]

    @classmethod
    def of(cls, spans: npt.NDArray[Any]) -> Bars:
        """Of a structured array with these fields."""
        return cls(
            spans["engine"].astype(np.int64),
            spans["start"].astype(np.float64),
            spans["end"].astype(np.float64),
            spans["version"].astype(np.int64),
        )


def lanes(bars: Bars) -> npt.NDArray[np.int64]:
    """For each bar the lowest lane of its engine that no earlier bar still fills; int64."""
    lane = np.zeros(len(bars.start), np.int64)
    for engine in np.unique(bars.engine):
        mine = np.flatnonzero(bars.engine == engine)
        mine = mine[np.lexsort((bars.end[mine], bars.start[mine]))]
        free: list[int] = []
        running: list[tuple[float, int]] = []
        used = 0
        for bar in mine:
            while running and running[0][0] <= bars.start[bar]:
                heapq.heappush(free, heapq.heappop(running)[1])
            if free:
                lane[bar] = heapq.heappop(free)
            else:
                lane[bar], used = used, used + 1
            heapq.heappush(running, (float(bars.end[bar]), int(lane[bar])))
    return lane


def running(bars: Bars, engine: int, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How many of the engine's bars run in the mean between each two of `edges` (seconds)."""
    mine = bars.engine == engine
    times = np.concatenate([bars.start[mine], bars.end[mine]])
    steps = np.repeat([1, -1], int(mine.sum()))
    order = np.argsort(times, kind="stable")
    times, level = times[order], np.cumsum(steps[order])
    if not len(times):
        return np.zeros(len(edges) - 1)
    # the integral of a step function at the edges, by its value at each step
    area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times))])
    return np.diff(np.interp(edges, times, area)) / np.diff(edges)


def draw_gantt(
    axes: Axes,
    bars: Bars,
    engines: Sequence[int],
    *,
    colour: npt.NDArray[np.int64] | None = None,
    few: bool = False,
) -> None:
    """A row for each engine, in it a lane for each sequence that runs there, coloured by version.

    colour: numbers of colours to take instead. few: segments are drawn apart from each other, and
    as vectors; otherwise as pixels, also within a vector file.
    """
    lane = lanes(bars)
    most = int(lane.max(initial=0)) + 1
    place = {engine: number for number, engine in enumerate(engines)}
    row = np.array([place[int(engine)] for engine in bars.engine], np.float64)
    height = (1 - _GAP) / most
    bottom = row + _GAP / 2 + lane * height
    top = bottom + height * (0.9 if few else 1.0)
    corners = np.stack(
        [
            np.stack([bars.start, bottom], axis=1),
            np.stack([bars.end, bottom], axis=1),
            np.stack([bars.end, top], axis=1),
            np.stack([bars.start, top], axis=1),
        ],
        axis=1,
    )
    palette = np.array([to_rgba(one) for one in COLOURS])
    axes.add_collection(
        PolyCollection(
            list(corners),
            facecolors=palette[(bars.version if colour is None else colour) % len(palette)],
            edgecolors="white" if few else "none",
            linewidths=0.5 if few else 0,
            antialiaseds=few,
            rasterized=not few,
        )
    )
    axes.set_ylim(len(engines), 0)
    axes.set_xlim(0, max(1e-9, float(bars.end.max(initial=0.0))))
    every = max(1, len(engines) // 8)
    axes.set_yticks(np.arange(0, len(engines), every) + 0.5, [str(e) for e in engines[::every]])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
