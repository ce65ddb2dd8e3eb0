"""curve.png, the picture that a run leaves for a quick look."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
from run_folders import step_metrics, summary

from kimisys.trainer.plot import plot_run


@pytest.mark.parametrize(("steps", "curves"), [(30, (True, True)), (0, (True, False))])
def test_both_halves_show_what_there_is(
    tmp_path: Path, steps: int, curves: tuple[bool, bool]
) -> None:
    path = tmp_path / "curve.png"
    plot_run(path, [step_metrics(i) for i in range(1, steps + 1)], summary(steps))
    pixels = matplotlib.image.imread(path)[:, :, :3]
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 0.2
    middle = coloured.shape[1] // 2  # pass rates on the left; without steps the held-out marks
    assert (coloured[:, :middle].sum() > 100, coloured[:, middle:].sum() > 100) == curves
