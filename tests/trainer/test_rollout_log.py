"""The files about rollouts: what is written, and what a resumed run drops of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_groups import group, trajectory

from kimisys.rollout import Dropped, Span
from kimisys.trainer.learning import experience
from kimisys.trainer.rollout_log import RolloutLog
from kimisys.trainer.rollout_records import read_rollouts
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.arithmetic()
PROBLEM = Problem("1+2=", "3")
TASK = Task([PROBLEM], [Problem("9+9=", "18")], lambda p, text, f: float(text == "3"), 16)
THREE, EOS = TOKENIZER.encode("3")[0], TOKENIZER.eos_id
STEP = np.dtype([("start", np.float64), ("batch", np.int32)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, done: int, seconds: float, first: int, steps: range) -> None:
    """A life of a run that began at 1000.0 of the clock and does `steps`."""
    with RolloutLog(folder, done, seconds, 1000.0, first) as log:
        assert log.trace.name == (f"trace-{done}" if done else "trace")
        for step in steps:
            right = trajectory((step, [THREE, EOS]))
            wrong = trajectory((step - 1, [THREE]), (step, [THREE, EOS]))
            made = [group(first + step, [THREE, THREE], right, wrong)]
            learned = experience(made, [PROBLEM], TASK, TOKENIZER, 1.0)
            lost = Dropped(group(99, [THREE], trajectory((1, [THREE]))), "stale", "")
            span = Span(1, step, 0, 1000.5 + step, 1000.75 + step, 2, step, "stop")
            log.batch(step, learned, [lost], [span], {first + step: 0, 99: 0})
            log.engine_steps([np.array([(1000.5 + step, step)], STEP)])


def test_what_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    write(folder, 0, 0.0, 0, range(1, 3))
    groups = lines(folder / "groups.jsonl")
    assert groups[0] == {
        "step": 1,
        "group": 1,
        "problem": 0,
        "prompt_tokens": 2,
        "lengths": [2, 3],
        "versions": [[1, 1], [0, 1]],
        "reasons": ["stop", "stop"],
        "rewards": [1.0, 0.0],
    }
    assert (groups[1]["group"], groups[1]["dropped"]) == (99, "stale")
    assert lines(folder / "segments.jsonl")[1] == {
        **{"step": 2, "engine": 1, "group": 2, "sample": 0, "start": 2.5, "end": 2.75},
        **{"tokens": 2, "version": 2, "reason": "stop"},
    }
    assert np.load(folder / "steps-engine0.npy")["start"].tolist() == [1.5, 2.5]
    read = read_rollouts(tmp_path)
    assert read is not None
    assert read.trained.tolist() == [2, 3, 2, 3]  # what was dropped is not


def test_a_run_that_is_killed_while_steps_are_written_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rollouts"
    write(folder, 0, 0.0, 0, range(1, 2))

    def killed(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(np, "save", killed)
        write(folder, 1, 2.0, 40, range(2, 3))
    write(folder, 1, 2.0, 40, range(2, 3))
    assert np.load(folder / "steps-engine0.npy")["start"].tolist() == [1.5, 4.5]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    write(folder, 0, 0.0, 0, range(1, 4))
    write(folder, 1, 2.0, 40, range(2, 3))  # the checkpoint was written 2 s into the run, by step 1
    assert [line["step"] for line in lines(folder / "segments.jsonl")] == [1, 2]
    resumed = lines(folder / "segments.jsonl")[1]
    assert (resumed["group"], resumed["start"]) == (42, 4.5)
    assert [line["group"] for line in lines(folder / "groups.jsonl")] == [1, 99, 42, 99]
    assert np.load(folder / "steps-engine0.npy")["start"].tolist() == [1.5, 4.5]
