"""The time model of an engine, fitted to steps that it took, and how well it predicts others."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.errors import WorkloadError

TERMS = ("step", "sequence", "kv_token", "prefill_token")
_SLOW = 20.0
"""Steps that take so many times the median are compilations and pauses, and not fitted."""


@dataclass(frozen=True)
class Calibration:
    """Seconds per step, per sequence and step, per KV token and step, per prefilled token.

    fitted, held_out: how many steps. left_out: of the fitted part, those that were far too slow;
    left_out_seconds: what they took. total_error: predicted against measured seconds of all held
    out steps together, less 1. step_error: of single steps, the median of the relative errors'
    size.
    """

    step: float
    sequence: float
    kv_token: float
    prefill_token: float
    fitted: int
    held_out: int
    left_out: int
    left_out_seconds: float
    total_error: float
    step_error: float

    def seconds(self, steps: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """What the model says of `steps`."""
        weights = np.array([getattr(self, term) for term in TERMS])
        return _design(steps) @ weights


def calibrated(steps: npt.NDArray[Any], share: float = 0.6) -> Calibration:
    """Fit to the first `share` of `steps` in the order of their starts, test on the rest.

    steps: a structured array with, at least, the fields start and seconds (seconds), batch
    (sequences), kv_tokens (that they hold) and prefill_tokens (whose KV the step computes besides
    the new tokens'). Raises WorkloadError for too few.
    """
    steps = np.sort(steps[steps["batch"] > 0], order="start")
    cut = int(len(steps) * share)
    first, rest = steps[:cut], steps[cut:]
    if len(first) < 2 * len(TERMS) or not len(rest):
        raise WorkloadError(
            f"{len(steps)} timed steps are too few to fit {len(TERMS)} numbers to {share:.0%} of "
            "them and test them on the rest; let the run go on for longer"
        )
    slow = first["seconds"] > _SLOW * np.median(first["seconds"])
    weights = non_negative_least_squares(_design(first[~slow]), first["seconds"][~slow])
    predicted, measured = _design(rest) @ weights, rest["seconds"]
    return Calibration(
        *(float(weight) for weight in weights),
        fitted=int((~slow).sum()),
        held_out=len(rest),
        left_out=int(slow.sum()),
        left_out_seconds=float(first["seconds"][slow].sum()),
        total_error=float(predicted.sum() / measured.sum() - 1),
        step_error=float(np.median(np.abs(predicted / measured - 1))),
    )


def non_negative_least_squares(
    design: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """[columns] float64, none negative, with the least |design @ x - values|; exact, by trying
    every set of columns that may be positive: for a handful of them."""
    columns = design.shape[1]
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)
    scaled = design / scale
    gram, moment = scaled.T @ scaled, scaled.T @ values
    best, least = np.zeros(columns), 0.0
    for count in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), count)):
            part = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], moment[chosen], rcond=None)[0]
            # the squared error, less that of x = 0
            error = float(part @ gram[np.ix_(chosen, chosen)] @ part - 2 * part @ moment[chosen])
            if (part >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[chosen] = part
    return best / scale


def _design(steps: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[steps, TERMS]."""
    columns = (np.ones(len(steps)), steps["batch"], steps["kv_tokens"], steps["prefill_tokens"])
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
