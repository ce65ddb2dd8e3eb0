"""The event files, read back by TensorBoard itself."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_folders import step_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kimisys.trainer.tensorboard import TensorBoardLog, TensorBoardMissingError


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def write(folder: Path, first: int, last: int, reward: float, shaped: bool = False) -> None:
    log = TensorBoardLog(folder, first)
    for number in range(first, last + 1):
        log.step(replace(step_metrics(number, shaped), reward=reward))
    log.close()


def test_every_number_of_a_step_is_there(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, reward=0.5, shaped=True)
    assert curve(tmp_path, "metrics/reward") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert curve(tmp_path, "seconds/train_seconds") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert [step for step, _ in curve(tmp_path, "metrics/delta_density")] == [1, 2, 3]
    known = {name for name, v in asdict(step_metrics(1, True)).items() if v is not None}
    tags = {tag.partition("/")[2] for tag in read(tmp_path).Tags()["scalars"]}
    assert tags == known - {"step"}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, reward=0.5)
    tags = read(tmp_path).Tags()["scalars"]
    assert "metrics/difficulty" not in tags
    assert len(tags) == 17


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 1, 4, reward=0.5)
    write(tmp_path, 3, 5, reward=1.0)
    assert curve(tmp_path, "metrics/reward") == [(1, 0.5), (2, 0.5), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_steps_can_be_seen_while_the_run_goes_on(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.step(step_metrics(1))
    assert len(curve(tmp_path, "metrics/loss")) == 1
    log.close()


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(TensorBoardMissingError, match=r"pip install kimisys\[tensorboard\]"):
        TensorBoardLog(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
