"""`python -m bench.schedules.pictures FOLDER`: a picture of each policy for docs/rollout.md, drawn
from simulations small enough to see every segment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kimisys.rollout import Config, EngineModel, Lots, Outcome, Simulation, simulate
from kimisys.rollout.policies import FOREVER
from kimisys.rollout.workload import Prompts, lognormal
from kimisys.trainer.gantt import Bars, draw_gantt
from kimisys.trainer.simulate_plot import STYLE, batch_ends

ENGINES, SEQUENCES, SAMPLES = 3, 4, 4
_PLAIN = {"placement": "least_loaded", "order": "fifo", "concurrency": "fixed"}


@dataclass(frozen=True)
class Panel:
    """One simulation. fields: of its Config; engine: of its EngineModels."""

    title: str
    fields: Mapping[str, Any]
    iterations: int = 1
    by_group: bool = False
    """Whether colours are groups', and not versions'."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    train: float = 0.0
    groups: int = 6
    correlation: float = 0.6
    seed: int = 4


BUDGET = 3000
_ORDER: dict[str, Any] = {"by_group": True, "groups": 9, "correlation": 0.9, "seed": 6}
_TIGHT = {"kv_capacity": 700, "max_sequences": 8, "prefill_token": 1e-3}

PICTURES: dict[str, tuple[Panel, ...]] = {
    "group-round-robin": (
        Panel("group_round_robin", {**_PLAIN, "placement": "group_round_robin"}, by_group=True),
    ),
    "least-loaded": (Panel("least_loaded", _PLAIN, by_group=True),),
    "kv-aware": (Panel("kv_aware", {**_PLAIN, "placement": "kv_aware"}, by_group=True),),
    "sticky": (Panel("sticky", {**_PLAIN, "placement": "sticky"}, by_group=True),),
    "fifo": (Panel("fifo", _PLAIN, 2, **_ORDER),),
    "longest-first": (Panel("longest_first", {**_PLAIN, "order": "longest_first"}, 2, **_ORDER),),
    "probe-first": (Panel("probe_first", {**_PLAIN, "order": "probe_first"}, 2, **_ORDER),),
    "whole": (Panel("whole iterations", _PLAIN, 4),),
    "budget": (Panel("token_budget", {**_PLAIN, "token_budget": BUDGET, "groups": 0}, 6),),
    "segments": (
        Panel("segment_tokens", {**_PLAIN, "segment_tokens": 150}, by_group=True),
    ),
    "over-issue": (Panel("over_issue", {**_PLAIN, "over_issue": 1.5}, 4),),
    "fixed": (Panel("fixed", _PLAIN, engine=_TIGHT, groups=9, by_group=True),),
    "kv": (
        Panel("kv", {**_PLAIN, "concurrency": "kv"}, engine=_TIGHT, groups=9, by_group=True),
    ),
    "overlap-interrupt": (
        Panel(
            "overlap, interrupt",
            {**_PLAIN, "deployment": "overlap", "staleness": "admission", "max_staleness": 2},
            5,
            train=1.0,
        ),
    ),
    "overlap-drain": (
        Panel(
            "overlap, drain",
            {
                **_PLAIN,
                "deployment": "overlap",
                "staleness": "admission",
                "max_staleness": 2,
                "update": "drain",
            },
            5,
            train=1.0,
        ),
    ),
    "stale-wait": (
        Panel(
            "wait",
            {**_PLAIN, "token_budget": BUDGET, "groups": 0, "staleness": "wait",
             "max_staleness": 1},
            6,
        ),
    ),
    "stale-drop": (
        Panel(
            "drop",
            {**_PLAIN, "token_budget": BUDGET, "groups": 0, "staleness": "drop",
             "max_staleness": 1},
            6,
        ),
    ),
}  # fmt: skip


def simulated(panel: Panel) -> Outcome:
    """Of three engines of four sequences, and long-tailed lengths."""
    engine = {
        "step": 8e-3, "sequence": 5e-4, "kv_token": 0.0, "prefill_token": 1e-4,
        "kv_capacity": 1 << 20, "max_sequences": SEQUENCES, "update": 0.2, **panel.engine,
    }  # fmt: skip
    config = Config(**{"groups": panel.groups, "lease_timeout": FOREVER, **panel.fields})
    simulation = Simulation(
        config=config,
        engines=[EngineModel(**engine)] * ENGINES,
        iterations=panel.iterations,
        train_base=panel.train,
    )
    return simulate(simulation, lots(panel), True)


def lots(panel: Panel) -> Lots:
    """Long-tailed ones, of at most 600 tokens."""
    return lognormal(
        400,
        SAMPLES,
        median=90,
        sigma=0.9,
        correlation=panel.correlation,
        limit=600,
        seed=panel.seed,
        prompts=Prompts(40),
    )


def draw(path: Path, panels: tuple[Panel, ...]) -> None:
    """Write `path` (SVG)."""
    with rc_context({**STYLE, "font.size": 8, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 0.45 + 1.15 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            _draw(axes, panel)
        figure.savefig(path, metadata={"Date": None})


def _draw(axes: Axes, panel: Panel) -> None:
    outcome = simulated(panel)
    spans = outcome.spans
    groups = np.asarray(spans["group"]).astype(np.int64)
    draw_gantt(
        axes, Bars.of(spans), range(ENGINES), colour=groups if panel.by_group else None, few=True
    )
    for end in batch_ends(outcome):
        axes.axvline(end, color=STYLE["text.color"], linestyle=":", linewidth=1)
    tokens = int(sum(outcome.tokens))
    axes.set_title(
        f"{panel.title}: {outcome.seconds:.1f} s, {tokens / outcome.seconds:,.0f} trained tokens/s",
        fontsize=8,
        loc="left",
    )
    axes.set(ylabel="engine", xlim=(0, outcome.seconds))


def main(folder: Path) -> None:
    """Draw all of them."""
    for name, panels in PICTURES.items():
        draw(folder / f"rollout-{name}.svg", panels)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
