"""Where the time of a sync goes, as stacked bars: `python -m bench.sync.plot RECORDS.json PICTURE`.

Drawn from the records that `python -m bench broadcast --json RECORDS.json` wrote; PICTURE ends with
.svg or .png.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {
    "publish": "#1f5a9c",
    "read": "#3f7fc0",
    "measure": "#5e9bd3",
    "apply": "#8ebbe3",
    "land": "#6fa8dc",
    "agree": "#bcd6ef",
    "verify": "#7f8fd0",
    "in place": "#4f9d8a",
    "gather": "#e08a2e",
    "to memory": "#f2c48d",
    "save": "#b5651d",
    "load": "#c8504f",
    "repack": "#b9c0c9",
    "calls and waiting": "#e4e8ec",
}
"""Of each phase, in the order in which they follow each other; packing last, as both sides have
it."""

_INK, _FAINT = "#3b4450", "#d5dae0"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _FAINT,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "kimisys",  # the same records make the same file
}

Parts = Mapping[str, Mapping[str, float]]
"""Milliseconds of each way's phases."""


def parts_of(records: list[dict[str, Any]]) -> dict[str, Parts]:
    """By case: the phases of each way. Raises ValueError when no record tells."""
    found: dict[str, Parts] = {}
    for record in records:
        if not record["correct"] or not record["parts"]:
            continue
        ways: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for name, milliseconds in record["parts"].items():
            way, _, phase = name.partition(": ")
            ways[way][phase] = milliseconds
        found[record["case"]] = ways
    if not found:
        raise ValueError(
            "no record says where its time goes; measure the syncs: python -m bench broadcast "
            "--only sync-tp1 sync-tp2 --json RECORDS.json"
        )
    return found


def plot(path: Path, records: list[dict[str, Any]]) -> None:
    """Draws a panel for each sync, on one scale, with a bar for each way."""
    found = parts_of(records)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 0.9 + 1.35 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (case, ways) in zip(panels, found.items(), strict=True):
            _bars(axes, case, ways)
        panels[-1].set_xlabel("milliseconds, medians of interleaved rounds")
        panels[-1].set_xlim(0, 1.1 * max(w["all"] for p in found.values() for w in p.values()))
        spent = [each for ways in found.values() for way in ways.values() for each in way.items()]
        there = {phase for phase, milliseconds in spent if milliseconds}
        patches = [Patch(color=c, label=phase) for phase, c in COLORS.items() if phase in there]
        figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(records[0]["machine"], fontsize=10)
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axes: Axes, case: str, ways: Parts) -> None:
    for row, (way, phases) in enumerate(ways.items()):
        if unknown := phases.keys() - COLORS.keys() - {"all"}:
            raise ValueError(f"{case}: no colour for the phases {sorted(unknown)} of {way}")
        left = 0.0
        for phase, color in COLORS.items():
            width = phases.get(phase, 0.0)
            axes.barh(row, width, left=left, color=color, height=0.72)
            left += width
        axes.text(left, row, f"  {phases['all']:,.0f}", va="center")
    axes.set_yticks(range(len(ways)), list(ways))
    axes.invert_yaxis()
    axes.set_title(case.removesuffix(", served"), loc="left", fontsize=10)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main(
    records: Annotated[Path, tyro.conf.Positional],
    picture: Annotated[Path, tyro.conf.Positional],
) -> int:
    """Draw where the time of each sync goes.

    Args:
        records: What `python -m bench broadcast --json` wrote.
        picture: To be written; .svg or .png.
    """
    try:
        plot(picture, json.loads(records.read_text()))
    except (OSError, ValueError) as error:
        print(f"{records}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m bench.sync.plot"))
