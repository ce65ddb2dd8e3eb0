"""`python -m bench.hybrid --json FILE`: train both ways in turn, compare, predict."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from bench.harness import machine
from bench.hybrid.predict import microseconds_per_token, model_of
from bench.hybrid.runs import Measured, Side, run, warm_up


@dataclass(frozen=True)
class HybridConfig:
    """Real runs of `kimisys train`, hybrid mode: two vLLM engines pinned to a core each, lognormal
    completions (bench/hybrid/task.py), the synchronous loop against budgeted partial rollouts."""

    out: Path = Path("runs/hybrid")
    """Folder for the runs; what is there already is read and not run again."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """A pair of runs each. Engines and training are calibrated on the first whole run alone."""
    steps: int = 20
    prompts: int = 16
    live: int = 256
    """Completions under way in the engines of the budgeted side, two batches of them."""
    sft_steps: int = 300
    """Of the model that all runs start from."""
    train: tuple[str, ...] = field(default=())
    """Further options of both sides, of `kimisys train`."""

    @property
    def sides(self) -> tuple[Side, Side]:
        """The synchronous loop, and partial rollouts."""
        budget = ("--rollouts", "budget", "--live-limit", str(self.live))
        return Side("whole", ("--rollouts", "whole")), Side("budget", budget)

    @property
    def options(self) -> list[str]:
        """Of both sides."""
        sizes = {"steps": self.steps, "prompts": self.prompts, "samples": 8, "held-out": 256}
        off = {"sft.steps": 0, "curriculum": 0, "length-reward": 0}
        numbers = [f"--{name}={value}" for name, value in (sizes | off).items()]
        return ["--engines=2", "--pin-engines", *numbers, *self.train]


def main(
    config: Annotated[HybridConfig, tyro.conf.arg(name="")],
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Run, compare, print, and write the record."""
    console = Console(stderr=True)
    config.out.mkdir(parents=True, exist_ok=True)
    runs: list[Measured] = []
    with console.status("supervised warm-up") as status:
        model = warm_up(config.out, config.sft_steps)
        for seed in config.seeds:
            for side in config.sides:
                status.update(f"seed {seed}, {side.name}")
                runs.append(run(side, seed, model, config.out, config.options))
                console.print(_line(runs[-1]), highlight=False)
    calibration = model_of(runs[0].folder)
    predictions = [microseconds_per_token(calibration, each.folder) for each in runs]
    ratios = [
        whole.microseconds_per_token / budget.microseconds_per_token
        for whole, budget in zip(runs[::2], runs[1::2], strict=True)
    ]
    Console().print(_table(runs, predictions))
    Console().print(
        f"whole / budget, wall time per trained token: median {statistics.median(ratios):.2f} "
        f"[{min(ratios):.2f} {max(ratios):.2f}] of {len(ratios)} pairs; {machine()}",
        highlight=False,
    )
    if json_file is not None:
        record = _record(config, runs, predictions, ratios, asdict(calibration))
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def _line(one: Measured) -> str:
    return (
        f"seed {one.seed}, {one.side}: {one.microseconds_per_token:.0f} µs a trained token, "
        f"{one.rollout_seconds / one.seconds:.0%} of it rollouts; pass rate {one.pass_rate:.3f}"
    )


def _table(runs: list[Measured], predictions: list[float]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("seed", "side", "µs/token", "rollouts", "predicted", "error", "pass rate"):
        table.add_column(column, justify="right")
    for one, predicted in zip(runs, predictions, strict=True):
        measured = one.microseconds_per_token
        table.add_row(
            str(one.seed),
            one.side,
            f"{measured:.1f}",
            f"{one.rollout_seconds / one.seconds:.0%}",
            f"{predicted:.1f}",
            f"{predicted / measured - 1:+.1%}",
            f"{one.pass_rate:.3f}",
        )
    return table


def _record(
    config: HybridConfig,
    runs: list[Measured],
    predictions: list[float],
    ratios: list[float],
    calibration: dict[str, Any],
) -> dict[str, Any]:
    rows = [
        {key: value for key, value in asdict(one).items() if key != "folder"}
        | {"microseconds_per_token": one.microseconds_per_token, "predicted": predicted}
        for one, predicted in zip(runs, predictions, strict=True)
    ]
    return {
        "machine": machine(),
        "options": config.options,
        "runs": rows,
        "ratios": ratios,
        "calibration": calibration,
    }


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.hybrid")
