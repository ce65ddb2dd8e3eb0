"""`python -m bench.density --json FILE --plot FILE`: run the study, keep its numbers, draw them."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bench.density.study import Cell, Regime, Study, StudyConfig
from bench.harness import machine
from kimisys.trainer import arithmetic


def regimes(config: StudyConfig) -> list[Regime]:
    """Every learning rate, with one and with several steps to a sync, with and without the reset;
    and some on a float32 wire, to see that deltas are of no use there."""
    steps = config.steps_per_sync
    found = [
        Regime(rate, each, reset, "bfloat16")
        for each in steps
        for reset in (True, False)
        for rate in config.learning_rates
    ]
    some = config.learning_rates[::3]
    return found + [Regime(rate, steps[-1], True, "float32") for rate in some]


def run(
    config: Annotated[StudyConfig, tyro.conf.arg(name="")],
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measure, print, and write the record after each regime."""
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status("starting Megatron") as status,
        closing(Study(config, arithmetic.task(), Path(folder), status.update)) as study,
    ):
        record: dict[str, Any] = {
            "config": asdict(config),
            "machine": machine(),
            "parameters": study.parameters,
            "warm_up_loss": study.loss,
            "pass_rate": study.pass_rate,
            "cells": [],
        }
        console.print(
            f"{study.parameters:,} parameters, loss {study.loss:.3f} after warm-up, "
            f"{study.pass_rate:.3f} of the answers are right"
        )
        for regime in regimes(config):
            status.update(str(regime))
            cell = study.cell(regime)
            record["cells"].append(asdict(cell))
            console.print(line(cell), highlight=False)
            if json_file is not None:
                json_file.write_text(json.dumps(record, indent=1) + "\n")


def line(cell: Cell) -> str:
    """One regime as a person reads it."""
    regime = cell.regime
    kept = "reset" if regime.reset else "kept"
    text = (
        f"{regime.wire_dtype} {regime.learning_rate:.0e} {regime.steps_per_sync} steps, {kept:5} "
        f"density {cell.median:8.4%}, {cell.record_nbytes / cell.full_nbytes:.2%} of the bytes, "
        f"moved {cell.moved:.2f} rates"
    )
    if cell.predicted_from_rate is None or cell.predicted_from_moves is None:
        return text
    return (
        f"{text}; predicted {cell.predicted_from_rate:.4%} from the rate, "
        f"{cell.predicted_from_moves:.4%} from the moves"
    )


if __name__ == "__main__":
    tyro.cli(run, prog="python -m bench.density")
