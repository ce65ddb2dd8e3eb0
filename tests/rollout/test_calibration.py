"""The fit of an engine's time model: exact on exact steps, honest on those held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from kimisys.errors import WorkloadError
from kimisys.rollout.calibration import TERMS, calibrated, non_negative_least_squares

STEP = np.dtype(
    [
        ("start", "f8"),
        ("seconds", "f8"),
        ("batch", "i8"),
        ("kv_tokens", "i8"),
        ("prefill_tokens", "i8"),
    ]
)
TRUE = {"step": 4e-3, "sequence": 60e-6, "kv_token": 20e-9, "prefill_token": 25e-6}


def taken(count: int, noise: float = 0.0, pause: float = 0.0, **model: float) -> npt.NDArray[Any]:
    """Steps of an engine of this model, with relative noise, and pauses between."""
    random = np.random.default_rng(1)
    steps = np.zeros(count, STEP)
    steps["batch"] = random.integers(1, 128, count)
    steps["kv_tokens"] = steps["batch"] * random.integers(100, 8000, count)
    steps["prefill_tokens"] = random.integers(0, 2, count) * random.integers(1, 4000, count)
    model = TRUE | model
    exact = (
        model["step"]
        + model["sequence"] * steps["batch"]
        + model["kv_token"] * steps["kv_tokens"]
        + model["prefill_token"] * steps["prefill_tokens"]
    )
    steps["seconds"] = exact * np.exp(noise * random.standard_normal(count))
    steps["start"] = np.cumsum(steps["seconds"]) - steps["seconds"] + pause * np.arange(count)
    return steps


def test_exact_steps_give_the_model() -> None:
    found = calibrated([taken(500)])
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(TRUE[term], rel=1e-6)
    assert found.total_error == pytest.approx(0, abs=1e-9)
    assert found.seconds(taken(20)) == pytest.approx(taken(20)["seconds"])
    assert (found.fitted, found.held_out) == (300, 200)


def test_noisy_steps_give_about_the_model_and_the_noise() -> None:
    found = calibrated([taken(20_000, noise=0.1)])
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(TRUE[term], rel=0.05)
    assert abs(found.total_error) < 0.02
    assert found.step_error == pytest.approx(0.1 * 0.6745, rel=0.1)  # the median of |N(0, 0.1²)|


def test_an_engine_that_gets_slower_shows_in_the_held_out_error() -> None:
    steps = taken(1000)
    steps["seconds"][600:] *= 1.25
    assert calibrated([steps]).total_error == pytest.approx(1 / 1.25 - 1, rel=1e-3)


def test_a_compilation_is_left_out_and_told() -> None:
    steps = taken(500)
    steps["seconds"][3] = 18.0
    found = calibrated([steps])
    assert (found.left_out, found.left_out_seconds) == (1, 18.0)
    assert found.step == pytest.approx(TRUE["step"], rel=1e-6)


def test_steps_without_sequences_change_nothing() -> None:
    steps = taken(500)
    idle = np.zeros(30, STEP)
    assert calibrated([np.concatenate([idle, steps])]) == calibrated([steps])


def test_pauses_are_of_one_engine_and_not_of_idleness() -> None:
    steps = taken(500, pause=3e-4)
    later = taken(500, pause=5e-4)
    later["start"] += 1e-4  # between the other's
    later["start"][250:] += 60.0  # idle
    assert calibrated([steps, later]).between == pytest.approx(4e-4, rel=1e-2)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(WorkloadError, match="10 timed steps are too few"):
        calibrated([taken(10)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(4, 30))
def test_the_fit_is_the_non_negative_one_of_least_squares(
    seed: int, columns: int, rows: int
) -> None:
    random = np.random.default_rng(seed)
    design = random.standard_normal((rows, columns))
    values = random.standard_normal(rows)
    found = non_negative_least_squares(design, values)
    expected, error = nnls(design, values)
    assert (found >= 0).all()
    assert np.linalg.norm(design @ found - values) == pytest.approx(error, rel=1e-9, abs=1e-9)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
