"""The curve that people would rather look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kimisys.trainer.metrics import StepMetrics, Summary


def plot_run(path: Path, steps: Sequence[StepMetrics], summary: Summary) -> None:
    """Pass rate in training and on the held-out problems, and the time of each phase, as one
    PNG."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")  # not pyplot: no display, no state
    rate: Axes
    time: Axes
    rate, time = figure.subplots(1, 2)
    numbers = [s.step for s in steps]
    rate.plot(
        numbers, [s.pass_rate for s in steps], color="tab:blue", label="training, temperature 1"
    )
    ends = [0, summary.steps]
    for before, after, mark, label in (
        (summary.pass_rate_before, summary.pass_rate_after, "C1o", "held out, temperature 1"),
        (summary.greedy_before, summary.greedy_after, "C2s", "held out, greedy"),
    ):
        marks = [(x, y) for x, y in zip(ends, (before, after), strict=True) if y is not None]
        xs, ys = zip(*marks, strict=True)
        rate.plot(xs, ys, mark, label=label, markersize=9, fillstyle="none", mew=2)
    rate.set(xlabel="RL step", ylabel="pass rate", ylim=(0, 1.02), title="Pass rate")
    rate.legend(loc="best")
    for axes in (rate, time):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.grid(alpha=0.3)
    phases = ("rollout_seconds", "score_seconds", "train_seconds", "sync_seconds")
    series = [[getattr(s, phase) for s in steps] for phase in phases]
    time.stackplot(numbers, series, labels=[p.removesuffix("_seconds") for p in phases], alpha=0.85)
    time.set(xlabel="RL step", ylabel="seconds", title="Where a step's time goes")
    time.set_ylim(0, 1.4 * time.get_ylim()[1])
    time.legend(loc="upper center", ncols=len(phases))
    figure.savefig(path, dpi=110)
