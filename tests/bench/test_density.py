"""What rounding predicts of the density of updates, against bfloat16 itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.density.plot import draw
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


def test_a_small_study_agrees_with_the_prediction_and_is_drawn(tmp_path: Path) -> None:
    """That the publisher counts what the study counts, the study itself sees to."""
    small = {
        **{"--learning-rates": "1e-5", "--iterations": "3", "--settled": "2"},
        **{"--problems": "2", "--samples": "2", "--sft.steps": "2", "--threads": "1"},
        **{"--shape.hidden-size": "64", "--shape.layers": "2", "--shape.heads": "2"},
        **{"--shape.ffn-size": "128", "--json": str(tmp_path / "record.json")},
    }
    arguments = [part for option in small.items() for part in option]
    run = subprocess.run(
        [sys.executable, "-m", "bench.density", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    cells = {(c["regime"]["wire_dtype"], c["regime"]["reset"]): c for c in record["cells"]}
    assert set(cells) == {("bfloat16", True), ("bfloat16", False), ("float32", True)}
    for cell in record["cells"]:
        if cell["regime"]["wire_dtype"] == "bfloat16":
            assert cell["median"] == pytest.approx(cell["predicted_from_moves"], rel=0.1)
    assert cells["float32", True]["median"] > 0.5
    draw(record, tmp_path / "density.svg")
    assert "<svg" in (tmp_path / "density.svg").read_text()
