"""What rounding predicts of the density of updates, against bfloat16 itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.density.prediction import predicted_density, spacing

RANDOM = np.random.default_rng(3)


def bits(weights: np.ndarray) -> np.ndarray:
    return torch.from_numpy(weights).to(torch.bfloat16).view(torch.int16).numpy()


def test_the_spacing_is_that_of_neighbouring_numbers() -> None:
    """Of all finite bfloat16 numbers, either sign, and between them."""
    numbers = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    gaps = np.diff(numbers)
    low = numbers[:-1]
    between = (low.astype(np.float64) + 0.37 * gaps).astype(np.float32)
    for weights in (low, -low, between):
        np.testing.assert_array_equal(spacing(weights), gaps)


@pytest.mark.parametrize("move", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_the_prediction_is_what_rounding_does(move: float, deviation: float) -> None:
    weights = (deviation * RANDOM.standard_normal(400_000)).astype(np.float32)
    signs = RANDOM.choice([-1, 1], weights.size).astype(np.float32)
    moved = weights + move * signs
    found = float(np.mean(bits(weights) != bits(moved)))
    assert predicted_density(weights, moved - weights) == pytest.approx(found, rel=0.05)
    assert predicted_density(weights, move) == pytest.approx(found, rel=0.05)


def test_what_does_not_move_does_not_change() -> None:
    weights = RANDOM.standard_normal(1000).astype(np.float32)
    assert predicted_density(weights, 0.0) == 0.0
    assert predicted_density(np.zeros(4, np.float32), 0.0) == 0.0
    assert predicted_density(np.zeros(4, np.float32), 1e-6) == 1.0
