"""`python -m bench.schedules.plot RECORD.json PICTURE.svg`: the study as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.schedules.study import ATLEAST_ONLINE, ATLEAST_PARTIAL, ATMOST_OFFLINE
from kimisys.trainer.simulate_plot import STYLE

_PANELS = (
    ("default / best online baseline", ATLEAST_ONLINE, "tokens/s, default\n/ best online baseline"),
    ("default / best offline schedule", ATMOST_OFFLINE, "seconds, default\n/ best offline found"),
    (
        "partial / group_round_robin",
        ATLEAST_PARTIAL,
        "trained tokens/s, partial\n/ group round-robin",
    ),
)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The three ratios of every case with their confidence intervals; dashed: the goals."""
    cases = record["cases"]
    with rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(11, 1.2 + 0.28 * len(cases)), layout="constrained")
        panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for axes, (name, goal, title) in zip(panels, _PANELS, strict=True):
            _panel(axes, cases, name, goal)
            axes.set_title(title, fontsize=9)
        rows = np.arange(len(cases))
        panels[0].set_yticks(rows, [case["name"] for case in cases])
        panels[0].set_ylim(len(cases) - 0.5, -0.5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Axes, cases: list[dict[str, Any]], name: str, goal: float) -> None:
    means = [case["figures"][name]["mean"] for case in cases]
    halves = [case["figures"][name]["half"] for case in cases]
    rows = np.arange(len(cases))
    axes.barh(rows, means, color="#6c9fd0", height=0.62)
    axes.errorbar(means, rows, xerr=halves, fmt="none", ecolor="#1f3a5c", capsize=2, lw=1)
    axes.axvline(goal, color="#c8504f", linestyle="--", linewidth=1.2)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#d5dae0")
    axes.set_axisbelow(True)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
