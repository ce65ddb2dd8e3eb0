"""What the master does when an engine refuses a version, and when both sides disagree."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kimisys.errors import DigestError
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.display import Display
from kimisys.trainer.fleet import Sync
from kimisys.trainer.master import EngineMismatchError, Master, Watch


class DamagedFleet:
    """Answers a master's calls of one sync; the first `damaged` versions arrive damaged."""

    def __init__(self, damaged: int, engine_says: float = -1.0) -> None:
        self.damaged, self.engine_says = damaged, engine_says
        self.published: list[int] = []

    def publish(self, version: int) -> None:
        self.published.append(version)

    def update_engine(self, version: int) -> Sync:
        if version <= self.damaged:
            raise DigestError(f"version {version}: 'w' is not what was published")
        return Sync(version, 100, 1)

    def on_ranks(self, method: str, *args: Any) -> list[Any]:
        return [np.full((3, 16), -1.0, np.float32)]

    def on_engine(self, method: str, *args: Any) -> Any:
        return np.full((3, 16), self.engine_says, np.float32)


def master(tmp_path: Path) -> Master:
    display = Display(Console(quiet=True), steps=1)
    return Master(TrainConfig(), tmp_path, display, time.monotonic())


def test_a_damaged_version_is_refused_and_published_anew(tmp_path: Path) -> None:
    run, fleet = master(tmp_path), DamagedFleet(damaged=1)
    assert run._sync(fleet) == 0.0  # type: ignore[arg-type]
    summary = run._summary("completed")
    assert fleet.published == [1, 2]
    assert (summary.syncs, summary.digest_mismatches) == (1, 1)


def test_damage_that_stays_ends_the_run(tmp_path: Path) -> None:
    run, fleet = master(tmp_path), DamagedFleet(damaged=9)
    with pytest.raises(DigestError, match="version 2"):
        run._sync(fleet)  # type: ignore[arg-type]
    assert run._summary("DigestError").digest_mismatches == 2


@pytest.mark.parametrize("engine_says", [-1.5, float("nan"), float("-inf")])
def test_an_engine_that_computes_something_else_ends_the_run(
    tmp_path: Path, engine_says: float
) -> None:
    with pytest.raises(EngineMismatchError, match="probe"):
        master(tmp_path)._sync(DamagedFleet(0, engine_says))  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", [2e-3, float("nan")])
def test_a_gap_beyond_the_bound_ends_the_run_unless_the_engine_is_frozen(gap: float) -> None:
    watch = Watch(bound=1e-3)
    watch.note_gap(1, 5e-4, frozen=False)
    with pytest.raises(EngineMismatchError, match="step 2"):
        watch.note_gap(2, gap, frozen=False)
    watch.note_gap(2, gap, frozen=True)
    watch.note_gap(3, gap, frozen=True)
    assert watch.exceeded_at == 2
