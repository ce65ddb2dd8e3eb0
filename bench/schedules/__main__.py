"""`python -m bench.schedules --json FILE --plot FILE`: run the study, keep and draw its numbers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from bench.harness import machine
from bench.schedules.cases import SHIPPED, Study, cases
from bench.schedules.plot import draw
from bench.schedules.study import Result, investigate
from kimisys.rollout.policies import policies


def run(
    study: Annotated[Study, tyro.conf.arg(name="")],
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    plot: Path | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Measure, print, and write the record after each case.

    Args:
        study: How much is simulated.
        json_file: The record.
        plot: The picture, SVG or PNG.
        only: Cases whose name holds one of these words; all of them if not given.
    """
    console = Console(width=None if sys.stdout.isatty() else 110)
    chosen = [case for case in cases() if not only or any(word in case.name for word in only)]
    results: list[Result] = []
    with Console(stderr=True).status("") as status:
        for case in chosen:
            started = time.monotonic()
            result = investigate(case, study, status.update)
            results.append(result)
            console.print(f"\n{case.name} ({time.monotonic() - started:.0f} s)", style="bold")
            console.print(table(result))
            for name, figure in result.figures().items():
                console.print(f"  {name:<34} {figure}", highlight=False)
            for line in result.lost():
                console.print(f"  lost: {line}", highlight=False)
            record = {
                "study": asdict(study),
                "engines": {name: roof.fields() for name, roof in SHIPPED.items()},
                "policies": {name: policy.says for name, policy in policies().items()},
                "machine": machine(),
                "cases": [each.to_json() for each in results],
            }
            if json_file is not None:
                json_file.write_text(json.dumps(record, indent=1) + "\n")
            if plot is not None:
                draw(record, plot)


def table(result: Result) -> Table:
    """A row for each policy, means over the seeds; then the figures."""
    shown = Table(box=None, padding=(0, 1))
    for column in ("policy", "knob", "tokens/s", "x", "busy", "recomputed", "stale", "length"):
        shown.add_column(column, justify="left" if column in {"policy", "knob"} else "right")
    for name, all_ in result.measured.items():

        def mean(field: str, all_: list = all_) -> float:  # type: ignore[type-arg]
            return sum(getattr(one, field) for one in all_) / len(all_)

        shown.add_row(
            name,
            f"{policies()[name].knob} {all_[0].knob:g}" if all_[0].knob is not None else "",
            f"{mean('speed'):,.0f}",
            f"{result.ratio(name, 'group_round_robin').mean:.3f}",
            f"{mean('utilisation'):.0%}",
            f"{mean('recomputed_share'):.1%}",
            f"{mean('staleness'):.2f}",
            f"{mean('bias'):.3f}",
        )
    return shown


if __name__ == "__main__":
    tyro.cli(run, prog="python -m bench.schedules")
