"""`python -m bench.density.plot RECORD.json PICTURE.svg`: the study as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Cells = Sequence[dict[str, Any]]

GOAL = 0.05
_COLOURS = {
    (True, 1): "#e08a2e",
    (True, 4): "#c8504f",
    (False, 1): "#3a9b74",
    (False, 4): "#2f6db3",
}
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d5dae0",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 9.0,
    "svg.hashsalt": "kimisys",  # equal records give equal files
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Density and bytes of a sync against the learning rate, both as shares of the whole."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (reset, steps), cells in sorted(_lines(record["cells"]).items(), reverse=True):
            colour = _COLOURS.get((reset, steps))
            label = f"{steps} step{'s' * (steps > 1)}, optimizer {'reset' if reset else 'kept'}"
            rates = [cell["regime"]["learning_rate"] for cell in cells]
            left.plot(rates, _values(cells, "median"), "o", color=colour, label=label, ms=5)
            left.plot(rates, _values(cells, "predicted_from_moves"), "--", color=colour, lw=1)
            received = [cell["record_nbytes"] / cell["full_nbytes"] for cell in cells]
            right.plot(rates, received, "o-", color=colour, label=label, ms=4, lw=1.2)
        left.axhline(GOAL, color="#9aa4b0", lw=1)
        left.set_ylabel("weights whose bfloat16 bits change in a sync")
        left.set_title("Density (dashed: predicted from the moves)", fontsize=10)
        right.axhline(1.0, color="#9aa4b0", lw=1)
        right.set_ylabel("bytes of the delta / bytes of the weights")
        right.set_title("Bytes (1: every weight in full)", fontsize=10)
        for axes in (left, right):
            _finish(axes)
        left.legend(loc="lower right")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(cells: Cells) -> dict[tuple[bool, int], Cells]:
    """The bfloat16 cells by regime, each line by learning rate."""
    found: dict[tuple[bool, int], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["regime"]["learning_rate"]):
        regime = cell["regime"]
        if regime["wire_dtype"] == "bfloat16":
            found.setdefault((regime["reset"], regime["steps_per_sync"]), []).append(cell)
    return dict(found)


def _values(cells: Cells, name: str) -> list[float]:
    return [cell[name] for cell in cells]


def _finish(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="learning rate")
    axes.set_ylim(top=1.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
