"""`python -m bench.schedules.trade --json FILE --plot FILE`: what partial rollouts gain for the
staleness that they cost, by each policy and each value of its knob."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from bench.harness import machine
from bench.schedules.cases import CORRELATIONS, MEMORY, Case, Study
from bench.schedules.study import interval
from kimisys.rollout.measure import Measured, measure
from kimisys.rollout.policies import policies
from kimisys.trainer.gantt import COLOURS
from kimisys.trainer.simulate_plot import STYLE

ENGINES = 16
KNOBS = {
    "partial": (0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    "partial_round_robin": (0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    "april": (1.25, 1.5, 2.0, 2.5, 3.0),
    "areal": (1, 2, 3, 4, 6),
}
FIGURES = ("staleness", "staleness_most", "recomputed_share", "bias")


def run(json_file: Path, plot: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Measure on 16 engines, write the record and the picture.

    Args:
        json_file: The record.
        plot: The picture, SVG or PNG.
        seeds: Draws of the workload.
    """
    study = Study(seeds=seeds)
    console = Console()
    record: dict[str, Any] = {"study": asdict(study), "machine": machine(), "cases": []}
    with Console(stderr=True).status("") as status:
        for memory in MEMORY:
            for correlation in CORRELATIONS:
                case = Case(ENGINES, memory, correlation)
                status.update(case.name)
                rows = traded(case, study)
                record["cases"].append({"name": case.name, "rows": rows})
                console.print(case.name, style="bold")
                for row in rows:
                    console.print(line(row), highlight=False)
                json_file.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, plot)


def traded(case: Case, study: Study) -> list[dict[str, Any]]:
    """A row for each policy and value: tokens per second against group_round_robin's on the same
    draws, with its confidence interval, and the means of FIGURES."""
    draws = [case.lots(study, seed) for seed in study.seeds]

    def measured(name: str, knob: float | None) -> list[Measured]:
        policy = policies()[name]
        settings = [case.setting(study, policy, lots) for lots in draws]
        return [measure(policy, s, lots, knob) for s, lots in zip(settings, draws, strict=True)]

    against = measured("group_round_robin", None)
    rows = []
    for name, knobs in KNOBS.items():
        for knob in knobs:
            found = measured(name, knob)
            pairs = zip(found, against, strict=True)
            speed = interval([one.speed / other.speed for one, other in pairs])
            means = {
                figure: sum(float(getattr(one, figure)) for one in found) / len(found)
                for figure in FIGURES
            }
            rows.append({"policy": name, "knob": knob, "speed": asdict(speed), **means})
    return rows


def line(row: Mapping[str, Any]) -> str:
    """One row as a person reads it."""
    return (
        f"  {row['policy']:<20} {row['knob']:<5g} {row['speed']['mean']:.2f} ± "
        f"{row['speed']['half']:.2f}  staleness {row['staleness']:.2f} "
        f"({row['staleness_most']:.0f})  recomputed {row['recomputed_share']:.0%}  "
        f"length {row['bias']:.3f}"
    )


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Speed over staleness: a line for each policy, a point for each value of its knob."""
    with rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flat
        for axes, case in zip(panels, record["cases"], strict=True):
            for name, colour in zip(KNOBS, COLOURS, strict=False):
                rows = [row for row in case["rows"] if row["policy"] == name]
                axes.plot(
                    [row["staleness"] for row in rows],
                    [row["speed"]["mean"] for row in rows],
                    "o-", color=colour, label=name, ms=4, lw=1.2,
                )  # fmt: skip
            axes.set_title(case["name"], fontsize=9)
            axes.grid(color="#d5dae0")
            axes.set_ylabel("tokens/s, against\ngroup round-robin")
        for axes in figure.axes[2:]:
            axes.set_xlabel("mean staleness of trained tokens, versions")
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    tyro.cli(run, prog="python -m bench.schedules.trade")
