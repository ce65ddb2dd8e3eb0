"""The pictures of a run's rollouts: who ran what, how busy the engines were, stale tokens, and
lengths dispatched against lengths trained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from kimisys.trainer.gantt import Bars, draw_gantt, running
from kimisys.trainer.plot import Chart, History, draw_lines
from kimisys.trainer.rollout_records import Rollouts

_SHOWN = 3  # steps in the Gantt picture: more are mush
_BINS = 120


def _rollouts(history: History) -> Rollouts:
    assert history.rollouts is not None  # History.has("rollouts") was asked
    return history.rollouts


def draw_engines(axes: Axes, history: History) -> None:
    """A lane for each sequence of an engine, over the last steps; a new colour is a new version."""
    segments = _rollouts(history).segments
    last = segments["step"].max()
    shown = segments[segments["step"] > last - _SHOWN]
    bars = Bars.of(shown)
    draw_gantt(axes, bars, sorted(set(segments["engine"].tolist())))
    axes.set_xlim(bars.start.min(), max(bars.end.max(), bars.start.min() + 1e-6))


def draw_utilisation(axes: Axes, history: History) -> None:
    """For each engine how many sequences it ran, as a share of the most that it ever ran."""
    bars = Bars.of(_rollouts(history).segments)
    first, last = float(bars.start.min()), float(bars.end.max())
    edges = np.linspace(first, max(last, first + 1e-6), _BINS + 1)
    for engine in sorted(set(bars.engine.tolist())):
        busy = running(bars, engine, edges)
        axes.stairs(busy, edges, label=f"engine {engine}", linewidth=1.2)
    axes.set_ylim(bottom=0)


def draw_lengths(axes: Axes, history: History) -> None:
    """How many trajectories had which length: of all that finished, and of those trained."""
    rollouts = _rollouts(history)
    longest = max(2, int(max(rollouts.dispatched.max(initial=1), rollouts.trained.max(initial=1))))
    edges = np.linspace(0, longest + 1, min(longest + 1, 40) + 1)
    for label, lengths in (("finished", rollouts.dispatched), ("trained", rollouts.trained)):
        axes.stairs(share(lengths, edges), edges, label=label)
    axes.set_ylim(bottom=0)


def draw_share(axes: Axes, history: History) -> None:
    """The engines' utilisation and the share of completions that several versions wrote."""
    labels = {"utilisation": "engines are busy", "continued": "completions of several versions"}
    draw_lines(**labels)(axes, history)
    axes.set_ylim(0, 1.04)


def share(
    lengths: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Of `lengths` between each two of `edges`, in per cent."""
    return 100 * np.histogram(lengths, edges)[0] / max(1, len(lengths))


ROLLOUTS = (
    Chart(
        "Who ran what",
        "The last steps: a row is an engine, a lane in it a sequence that it runs, and a new "
        "colour a new version of the weights. Blank is idle. A bar that ends early and goes on in "
        "the next colour is a partial rollout.",
        "engine",
        "rollouts",
        draw_engines,
        "seconds of the run",
    ),
    Chart(
        "Sequences that run",
        "On each engine, in the mean of short spans of time. A line that falls slowly before it "
        "jumps up is an engine that waits for its longest answers.",
        "sequences",
        "rollouts",
        draw_utilisation,
        "seconds of the run",
    ),
    Chart(
        "Utilisation",
        "The share of the engines' time in which they ran something. What is missing to 1 is idle: "
        "waiting for the longest answers, and with --deployment hybrid the training.",
        "share of engine time",
        "utilisation",
        draw_share,
    ),
    Chart(
        "Staleness",
        "How many versions behind the weights that were trained a token is that they learn from: "
        "the mean, and the stalest. --max-staleness bounds it.",
        "versions",
        "staleness_mean",
        draw_lines(staleness_mean="mean", staleness_max="stalest token"),
    ),
    Chart(
        "Lengths finished and trained",
        "The share of trajectories of each length. A line of trained ones that lies to the left "
        "of those finished means that long answers are lost before they teach.",
        "per cent of trajectories",
        "rollouts",
        draw_lengths,
        "tokens",
    ),
)
