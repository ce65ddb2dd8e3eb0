"""`kimisys simulate --calibrate RUN`: an engine's time model from the steps that it took, and what
the simulator would have said of the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kimisys.rollout import EngineModel, Outcome, Simulation, simulate
from kimisys.rollout.calibration import TERMS, Calibration, calibrated
from kimisys.rollout.policies import FOREVER
from kimisys.rollout.workload import extended
from kimisys.trainer.metrics import write_json
from kimisys.trainer.simulate_config import SimulateConfig
from kimisys.trainer.simulate_run import RecordedRun, recorded_run, steps_of, traces

_UNITS = {
    "step": "a step",
    "sequence": "a sequence in it",
    "kv_token": "a token of KV in it",
    "prefill_token": "a token prefilled",
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run's rollouts, as they were and as the simulator has them."""

    batches: int
    measured: float
    simulated: float
    unfinished: int
    begun: int

    @property
    def error(self) -> float:
        """Simulated against measured, less 1."""
        return self.simulated / self.measured - 1


def calibrate(folder: Path, config: SimulateConfig, console: Console) -> None:
    """Fit, test, predict, print; the engine's model goes to --json, for --engine to read."""
    found = calibrated(steps_of(folder))
    recorded = recorded_run(traces(folder)[0])
    prediction = predict(found, recorded)
    console.print(_fitted(found))
    console.print(
        f"held out: {found.held_out:,} later steps are predicted {found.total_error:+.1%} in all; "
        f"a single one is off by {found.step_error:.1%} in the median. Fitted to {found.fitted:,}, "
        f"{found.left_out} far slower ones ({found.left_out_seconds:.1f} s: compilations, pauses) "
        "left out.",
        highlight=False,
    )
    console.print(
        f"rollouts of {prediction.batches} batches: measured {prediction.measured:.2f} s, "
        f"simulated {prediction.simulated:.2f} s ({prediction.error:+.1%}); "
        f"{prediction.unfinished:,} of {prediction.begun:,} trajectories had not ended: their "
        "lengths are drawn.",
        highlight=False,
    )
    if config.json is not None:
        write_json(config.json, _record(found, recorded, prediction))
        console.print(f"to simulate this engine: kimisys simulate --engine {config.json}")


def predict(found: Calibration, recorded: RecordedRun) -> Prediction:
    """Simulate the run's batches, with the time that passed between them in the mean."""
    between = float(np.mean(recorded.between_seconds)) if recorded.between_seconds else 0.0
    outcome = simulated(found, recorded, between)
    batches = len(recorded.rollout_seconds)
    return Prediction(
        batches,
        measured=float(np.sum(recorded.rollout_seconds)),
        simulated=float(np.sum(outcome.rollout_seconds)),
        unfinished=recorded.unfinished,
        begun=recorded.begun,
    )


def simulated(
    found: Calibration, recorded: RecordedRun, train_base: float, train_token: float = 0.0
) -> Outcome:
    """The run's batches, simulated with its own configuration, lengths and engines. train_base,
    train_token: seconds between two batches, and of them for each trained token."""
    simulation = Simulation(
        config=recorded.config.replace(lease_timeout=FOREVER),
        engines=[EngineModel(**_model(found, recorded, kv, most)) for kv, most in recorded.engines],
        iterations=len(recorded.rollout_seconds),
        train_base=train_base,
        train_token=train_token,
    )
    # what the run never began may be begun here
    return simulate(
        simulation, extended(recorded.lots, 2 * len(recorded.lots.prompt_tokens), seed=1)
    )


def _model(found: Calibration, recorded: RecordedRun, kv: int, most: int) -> dict[str, Any]:
    """Fields of an EngineModel."""
    terms = {term: getattr(found, term) for term in TERMS}
    terms["step"] += found.between
    sizes = {"kv_capacity": kv, "max_sequences": most, "update": recorded.update_seconds}
    return terms | sizes


def _fitted(found: Calibration) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    for term in TERMS:
        table.add_row(_UNITS[term], f"{_microseconds(getattr(found, term))}")
    table.add_row("between two steps", _microseconds(found.between))
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.4g} µs"


def _record(found: Calibration, recorded: RecordedRun, prediction: Prediction) -> dict[str, Any]:
    kv, most = recorded.engines[0]
    return {
        "engine": _model(found, recorded, kv, most),
        "calibration": dataclasses.asdict(found),
        "prediction": dataclasses.asdict(prediction) | {"error": prediction.error},
    }
