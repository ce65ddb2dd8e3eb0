"""The picture of a plan: who sends what to whom, and what each NIC carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kimisys.trainer.plan_report import PlanReport

_INK, _FAINT = "#3b4450", "#d5dae0"
_SENT, _RECEIVED, _BOUND = "#2f6db3", "#e08a2e", "#c8504f"
_HEAT = LinearSegmentedColormap.from_list("bytes", ["#bcd6ef", "#5e9bd3", "#1f5a9c", "#0b2545"])
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.edgecolor": _FAINT,
    "font.size": 10,
}


def plot_plan(path: Path, report: PlanReport) -> None:
    """Write `path` (PNG): bytes from each source rank to each destination rank, and bytes that each
    NIC sends and receives, with the line that the lower bound draws."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(16, 9), layout="constrained")  # not pyplot: no display, no state
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _matrix(figure, left, report)
        _loads(right, report)
        figure.suptitle(
            f"{report.model}:  {report.train}  →  {report.infer}\n"
            f"{report.copies:,} copies, {_axis_bytes(report.nbytes)} written, "
            f"simulated {report.simulated:.3g} s, lower bound {report.bound:.3g} s "
            f"at {report.nic_bandwidth / 1e9:g} GB/s a NIC",
            fontsize=12,
        )
        figure.savefig(path, dpi=110)


def matrix(report: PlanReport) -> npt.NDArray[np.int64]:
    """[destination ranks, source ranks] int64: the bytes that one sends to the other."""
    sent = np.zeros((report.destination_ranks, report.source_ranks), np.int64)
    pairs = report.pairs
    np.add.at(sent, (pairs["destination_rank"], pairs["source_rank"]), pairs["bytes"])
    return sent


def _matrix(figure: Figure, axes: Axes, report: PlanReport) -> None:
    sent = matrix(report)
    shown = np.ma.masked_equal(sent, 0)
    low, high = (int(shown.min()), int(shown.max())) if sent.any() else (1, 2)
    low = max(1, min(low, high // 2))  # a scale needs two ends
    image = axes.imshow(
        shown,
        cmap=_HEAT,
        norm=LogNorm(low, high),
        interpolation="nearest",
        aspect="auto",
        origin="upper",
    )
    axes.set(
        xlabel="training rank", ylabel="inference rank", title="Who sends what to whom (no relay)"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 8, 10]))
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", pad=0.02, aspect=40)
    ticks = np.geomspace(low, high, 5)
    bar.set_ticks(list(ticks), labels=[_axis_bytes(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label("bytes of a pair")


def _loads(axes: Axes, report: PlanReport) -> None:
    """Upwards what a NIC sends, downwards what it receives: a step for each NIC."""
    nics = report.nics
    edges = np.arange(nics.count + 1) - 0.5
    axes.stairs(nics.sent, edges, fill=True, color=_SENT, label="sends")
    axes.stairs(-nics.received, edges, fill=True, color=_RECEIVED, label="receives")
    limit = report.bound * report.nic_bandwidth
    for sign in (1, -1):
        axes.axhline(
            sign * limit,
            color=_BOUND,
            linestyle="--",
            linewidth=1.4,
            label="a full NIC in the lower bound's time" if sign > 0 else None,
        )
    axes.axhline(0, color=_INK, linewidth=0.8)
    starts = np.flatnonzero(np.diff(nics.node, prepend=-1))
    axes.set_xlim(-0.5, nics.count - 0.5)
    axes.set(title="What each NIC carries (relays counted)")
    _name_nodes(axes, starts, nics.node)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _axis_bytes(abs(value))))
    axes.set_ylabel("← receives      bytes      sends →")
    axes.grid(axis="y", color=_FAINT)
    axes.set_axisbelow(True)
    axes.margins(y=0.16)  # room for the legend
    axes.legend(loc="upper center", ncols=3, frameon=False)


def _name_nodes(axes: Axes, starts: npt.NDArray[np.int64], nodes: npt.NDArray[np.int64]) -> None:
    """A tick at the first NIC of a node: of as many nodes as can be read."""
    every = max(1, len(starts) // 12)
    shown = starts[::every]
    axes.set_xticks(shown, [str(nodes[i]) for i in shown])
    axes.set_xlabel("NIC, by node")


def _axis_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
