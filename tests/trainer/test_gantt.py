"""Lanes and loads of the Gantt picture, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from kimisys.trainer.gantt import COLOURS, Bars, draw_gantt, lanes, running

# engine, start, duration: small integers, so that ends and starts coincide often
BARS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=30
)


def bars_of(rows: list[tuple[int, int, int]]) -> Bars:
    table = np.array(rows)
    start = table[:, 1].astype(np.float64)
    return Bars(table[:, 0], start, start + table[:, 2], np.arange(len(rows)))


@given(BARS)
def test_no_two_bars_overlap_and_no_lane_is_wasted(rows: list[tuple[int, int, int]]) -> None:
    bars = bars_of(rows)
    lane = lanes(bars)
    moments = np.arange(0.5, 30)
    for engine in range(3):
        mine = bars.engine == engine
        for one in np.unique(lane[mine]):
            there = mine & (lane == one)
            at = (bars.start[there, None] < moments) & (moments < bars.end[there, None])
            assert at.sum(axis=0).max() == 1
        if mine.any():
            at = (bars.start[mine, None] < moments) & (moments < bars.end[mine, None])
            assert lane[mine].max() + 1 == at.sum(axis=0).max()


@given(BARS)
def test_loads_are_those_counted_at_fine_moments(rows: list[tuple[int, int, int]]) -> None:
    bars = bars_of(rows)
    edges = np.linspace(0, 30, 7)  # five seconds each
    for engine in range(3):
        mine = bars.engine == engine
        moments = np.arange(0.5, 30)  # bars begin and end at whole seconds
        at = (bars.start[mine, None] < moments) & (moments < bars.end[mine, None])
        expected = at.sum(axis=0).reshape(6, 5).mean(axis=1)
        assert running(bars, engine, edges) == pytest.approx(expected)


def test_an_engine_without_bars_runs_nothing() -> None:
    assert running(bars_of([(0, 1, 1)]), 1, np.array([0.0, 1.0, 2.0])).tolist() == [0, 0]


@pytest.mark.parametrize("few", [False, True])
def test_bars_lie_in_their_engines_row_in_their_colour(few: bool) -> None:
    bars = bars_of([(0, 0, 2), (2, 1, 3), (2, 2, 3), (2, 5, 1)])
    axes = Figure().subplots()
    draw_gantt(axes, bars, [0, 2], few=few)
    (drawn,) = axes.collections
    for number, path in enumerate(drawn.get_paths()):
        corners = path.vertices[:4]
        row = 0 if bars.engine[number] == 0 else 1
        assert row < corners[:, 1].min() < corners[:, 1].max() < row + 1
        assert corners[:, 0].min() == bars.start[number]
        assert corners[:, 0].max() == bars.end[number]
    colours = [tuple(colour) for colour in drawn.get_facecolors()]
    assert colours == [to_rgba(colour) for colour in COLOURS[:4]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
