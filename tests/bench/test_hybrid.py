"""The study of partial rollouts on real engines: its task, how it reads runs, its kept record."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import bench
from bench.hybrid.runs import Measured, read
from bench.hybrid.task import LONGEST, task
from kimisys.rewards.arithmetic import check
from kimisys.trainer.problem import Problem


def test_completions_are_lognormal_and_the_demonstrations_that_forget_nothing_are_right() -> None:
    made = task()
    lengths = np.array([len(shown.completion) + 1 for shown in made.demonstrations])
    logarithms = np.log(lengths)
    assert 0.85 < logarithms.std() < 1.1  # cut at both ends
    assert 55 < np.median(lengths) < 75
    assert lengths.max() <= made.max_completion_tokens
    assert 0.002 < (lengths > LONGEST - 8).mean() < 0.05
    right = 0
    for shown in made.demonstrations[:500]:
        first, second = shown.prompt.partition(",")[0].split("+")
        problem = Problem(shown.prompt, str(int(first) + int(second)))
        right += check(problem, shown.completion, finished=True) == 1.0
    assert 250 < right < 500


def _folder(tmp_path: Path, status: str) -> Path:
    steps = [
        {"step_seconds": 9.0, "rollout_seconds": 8.0, "trained_tokens": 10},
        {"step_seconds": 2.0, "rollout_seconds": 1.0, "trained_tokens": 400},
        {"step_seconds": 4.0, "rollout_seconds": 1.5, "trained_tokens": 600},
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "summary.json").write_text(json.dumps({"status": status, "pass_rate_after": 0.5}))
    return tmp_path


def test_a_run_is_read_without_its_first_step(tmp_path: Path) -> None:
    found = read("whole", 3, _folder(tmp_path, "completed"))
    assert (found.seconds, found.rollout_seconds, found.tokens, found.steps) == (6.0, 2.5, 1000, 2)
    assert found.microseconds_per_token == 6000.0


def test_a_run_that_did_not_end_well_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with ActorLostError"):
        read("whole", 3, _folder(tmp_path, "ActorLostError: engine 0"))


def test_the_kept_record_follows_from_its_runs() -> None:
    (file,) = (Path(bench.__file__).parent / "results").glob("*-hybrid-*.json")
    record = json.loads(file.read_text())
    known = {field.name for field in fields(Measured)} - {"folder"}
    sides = {"whole": [], "budget": []}
    for run in record["runs"]:
        assert known <= set(run)
        each = 1e6 * run["seconds"] / run["tokens"]
        assert each == pytest.approx(run["microseconds_per_token"])
        assert abs(run["predicted"] / each - 1) < 0.15
        sides[run["side"]].append(each)
    ratios = [whole / part for whole, part in zip(sides["whole"], sides["budget"], strict=True)]
    assert ratios == pytest.approx(record["ratios"])
