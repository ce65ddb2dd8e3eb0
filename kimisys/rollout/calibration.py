"""The time model of an engine, fitted to steps that it took, and how well it predicts others."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Seconds per step, per sequence and step, per KV token and step, per prefilled token; between:
    that pass between the end of a step and the start of the next, where one follows at once.

    fitted, held_out: how many steps. left_out: of the fitted part, those that were far too slow;
    left_out_seconds: what they took. total_error: predicted against measured seconds of all held
    out steps together, less 1. step_error: of single steps, the median of the relative errors'
    size.
    """

    step: float
    sequence: float
    kv_token: float
    prefill_token: float
    between: float
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


def calibrated(engines: Sequence[npt.NDArray[Any]], share: float = 0.6) -> Calibration:
    """Fit to the first `share` of the steps of each engine, test on the rest.

    engines: for each its steps in the order of their starts, a structured array with, at least, the
    fields start and seconds (seconds), batch (sequences), kv_tokens (that they hold) and
    prefill_tokens (whose KV the step computes besides the new tokens'). Raises WorkloadError for
    too few.
    """
    busy = [steps[steps["batch"] > 0] for steps in engines]
    cuts = [int(len(steps) * share) for steps in busy]
    firsts = [steps[:cut] for steps, cut in zip(busy, cuts, strict=True)]
    if sum(cuts) < 2 * len(TERMS):
        raise WorkloadError(
            f"{sum(map(len, busy))} timed steps are too few to fit {len(TERMS)} numbers to "
            f"{share:.0%} of them and test them on the rest; let the run go on for longer"
        )
    first = np.concatenate(firsts)
    rest = np.concatenate([steps[cut:] for steps, cut in zip(busy, cuts, strict=True)])
    slow = first["seconds"] > _SLOW * np.median(first["seconds"])
    weights = non_negative_least_squares(_design(first[~slow]), first["seconds"][~slow])
    predicted, measured = _design(rest) @ weights, rest["seconds"]
    step, sequence, kv_token, prefill_token = weights.tolist()
    return Calibration(
        step=step,
        sequence=sequence,
        kv_token=kv_token,
        prefill_token=prefill_token,
        between=_between(firsts),
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


def _between(engines: Sequence[npt.NDArray[Any]]) -> float:
    """The mean pause after a step that another of the engine follows within the time of ten."""
    short = []
    for steps in engines:
        pauses = steps["start"][1:] - steps["start"][:-1] - steps["seconds"][:-1]
        short.append(pauses[(pauses >= 0) & (pauses < 10 * np.median(steps["seconds"]))])
    found = np.concatenate(short)
    return float(found.mean()) if len(found) else 0.0


def _design(steps: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[steps, TERMS]."""
    columns = (np.ones(len(steps)), steps["batch"], steps["kv_tokens"], steps["prefill_tokens"])
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
