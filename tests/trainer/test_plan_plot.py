"""The picture of a plan: what is where, by its pixels."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import numpy.typing as npt
from plan_reports import GB, report

from kimisys.trainer.plan_plot import matrix, plot_plan
from kimisys.trainer.plan_report import Nics, PlanReport

BLUE, ORANGE, RED = (0x2F, 0x6D, 0xB3), (0xE0, 0x8A, 0x2E), (0xC8, 0x50, 0x4F)


def drawn(path: Path, shown: PlanReport) -> npt.NDArray[np.int64]:
    """[height, width, 3], 0 to 255."""
    plot_plan(path, shown)
    return np.round(matplotlib.image.imread(path)[:, :, :3] * 255).astype(np.int64)


def of_colour(pixels: npt.NDArray[np.int64], colour: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    return np.abs(pixels - np.array(colour)).max(axis=2) <= 3


def test_the_matrix_has_the_bytes_of_each_pair() -> None:
    sent = matrix(report())
    assert sent.tolist() == [[2 * GB, 4 * GB, 0, 0], [0, 0, 0, 6 * GB]]


def test_bars_are_as_high_as_the_bytes(tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "plan.png", report())
    middle = pixels.shape[1] // 2
    sent, received = of_colour(pixels, BLUE)[:, middle:], of_colour(pixels, ORANGE)[:, middle:]
    high = sent.sum(axis=0).max(), received.sum(axis=0).max()
    assert high[0] > 50 and abs(high[0] - high[1]) <= 4  # 6 GB both ways
    # rows with more of a colour than the legend has
    rows, below = (np.flatnonzero(bars.sum(axis=1) > 60) for bars in (sent, received))
    assert below.min() > rows.min()
    limit = np.flatnonzero(of_colour(pixels, RED)[:, middle:].sum(axis=1) > 100)
    # the bound's lines: 0.12 s x 50 GB/s = 6 GB, as high as the highest bars
    assert abs(limit.min() - rows.min()) <= 4
    assert abs(limit.max() - below.max()) <= 4


def test_who_sends_nothing_is_white(tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "plan.png", report())
    half = pixels[: int(pixels.shape[0] * 0.87), : int(pixels.shape[1] * 0.44)]  # without its scale
    blueish = half[:, :, 2] - half[:, :, 0] > 30
    rows, columns = np.flatnonzero(blueish.any(axis=1)), np.flatnonzero(blueish.any(axis=0))
    cells = blueish[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = cells.shape[0] // 2, cells.shape[1] // 4
    filled = [
        [cells[i * height + height // 2, j * width + width // 2] for j in range(4)]
        for i in range(2)
    ]
    assert filled == [[True, True, False, False], [False, False, False, True]]


def test_a_plan_of_256_to_128_ranks_shows_single_pairs(tmp_path: Path) -> None:
    rank = np.arange(256)
    large = report(
        source_ranks=256,
        destination_ranks=128,
        pairs={
            "source_rank": rank,
            "destination_rank": rank // 2,
            "bytes": np.full(256, GB),
            "copies": np.ones(256, np.int64),
        },
        nics=Nics(rank // 8, rank % 8, np.full(256, GB), np.full(256, GB)),
    )
    pixels = drawn(tmp_path / "plan.png", large)
    half = pixels[: int(pixels.shape[0] * 0.75), : pixels.shape[1] // 2]
    dark = half.max(axis=2) < 120
    columns = np.flatnonzero((dark & (half[:, :, 2] - half[:, :, 0] > 30)).any(axis=0))
    assert columns.max() - columns.min() > 500  # the diagonal, from the first rank to the last


def test_a_plan_that_moves_nothing_is_drawn(tmp_path: Path) -> None:
    nothing = np.zeros(0, np.int64)
    names = ("source_rank", "destination_rank", "bytes", "copies")
    empty = report(pairs=dict.fromkeys(names, nothing), bound=0.0, simulated=0.0)
    assert drawn(tmp_path / "plan.png", empty).shape[2] == 3
