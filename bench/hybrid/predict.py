"""What the simulator says of a run: engines and training calibrated on one run, lengths those of
the run that is predicted, decisions by the scheduler that took them in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimisys.rollout.calibration import Calibration, calibrated, non_negative_least_squares
from kimisys.trainer.simulate_calibrate import simulated
from kimisys.trainer.simulate_run import recorded_run, steps_of, traces


@dataclass(frozen=True)
class Model:
    """engine: seconds of a step. train_base, train_token: seconds of all that follows a batch until
    the next is asked for: scoring, training, the sync."""

    engine: Calibration
    train_base: float
    train_token: float


def model_of(folder: Path) -> Model:
    """Fitted to the steps of one run's engines, and to its iterations."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = np.array([step["trained_tokens"] for step in steps[1:]], np.float64)
    rest = np.array([step["step_seconds"] - step["rollout_seconds"] for step in steps[1:]])
    base, token = non_negative_least_squares(np.stack([np.ones_like(tokens), tokens], 1), rest)
    return Model(calibrated(steps_of(folder)), float(base), float(token))


def microseconds_per_token(model: Model, folder: Path, warm_steps: int = 1) -> float:
    """Wall time per trained token that the simulator predicts for the run in `folder`."""
    recorded = recorded_run(traces(folder)[0])
    outcome = simulated(model.engine, recorded, model.train_base, model.train_token)
    seconds = np.asarray(outcome.rollout_seconds) + np.asarray(outcome.train_seconds)
    tokens = np.asarray(outcome.tokens)
    return float(1e6 * seconds[warm_steps:].sum() / tokens[warm_steps:].sum())
