"""The picture of simulated policies: a Gantt of the engines for each, on one scale of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kimisys.rollout import Outcome
from kimisys.trainer.gantt import COLOURS, Bars, draw_gantt

_INK, _FAINT = "#3b4450", "#d5dae0"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "kimisys",  # equal simulations give equal files
}


def plot_policies(
    path: Path, runs: Sequence[tuple[str, Outcome]], engines: int, title: str
) -> None:
    """Write `path` (PNG): under the name of each policy who ran what on which engine, coloured by
    weight version; dotted lines end the batches."""
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 0.6 + 2.3 * len(runs)), layout="constrained")
        panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        last = 0.0
        for axes, (name, outcome) in zip(panels, runs, strict=True):
            bars = Bars.of(outcome.spans)
            draw_gantt(axes, bars, range(engines))
            for end in batch_ends(outcome):
                axes.axvline(end, color=_INK, linestyle=":", linewidth=1)
            axes.set(ylabel="engine")
            tokens = int(sum(outcome.tokens))
            axes.set_title(
                f"{name}: {tokens / outcome.seconds:,.0f} trained tokens/s", fontsize=10, loc="left"
            )
            last = max(last, outcome.seconds)
        panels[-1].set(xlim=(0, last), xlabel="seconds")
        newest = max(int(outcome.spans["version"].max(initial=0)) for _, outcome in runs)
        versions = range(min(newest + 1, len(COLOURS)))
        figure.legend(
            handles=[Patch(color=COLOURS[v], label=f"version {v}") for v in versions],
            loc="outside lower center",
            ncols=len(versions),
            frameon=False,
        )
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=100)


def batch_ends(outcome: Outcome) -> list[float]:
    """Seconds at which each batch was complete, training between them counted."""
    ends, now = [], 0.0
    for rolled, trained in zip(outcome.rollout_seconds, outcome.train_seconds, strict=True):
        ends.append(now + rolled)
        now += rolled + trained
    return ends
