"""Real runs by each kind of rollouts: Megatron, Ray, vLLM and the scheduler, cut short."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import read_until, start, start_run, wait_for_nothing

from kimisys.rollout import replay
from kimisys.trainer.metrics import StepMetrics, read_metrics

STEPS = 5
PROMPTS, SAMPLES = 8, 4  # of runs.SHORT
OPTIONS = ["--steps", str(STEPS), "--checkpoint-every", "1"]


def finished(out: Path, *options: str) -> list[StepMetrics]:
    run = start_run(out, *OPTIONS, *options)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert wait_for_nothing() == {}
    return read_metrics(out / "metrics.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_files(out: Path, steps: list[StepMetrics], engines: int = 1) -> None:
    """What the files say of one another: tokens, versions, groups, decisions."""
    groups = lines(out / "rollouts/groups.jsonl")
    segments = lines(out / "rollouts/segments.jsonl")
    assert len({one["group"] for one in groups}) == len(groups)  # none is trained twice
    made: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for segment in segments:
        if segment["tokens"]:
            made.setdefault((segment["group"], segment["sample"]), []).append(segment)
    for one in groups:
        for sample, length in enumerate(one["lengths"]):
            pieces = made.pop((one["group"], sample))
            assert sum(piece["tokens"] for piece in pieces) == length
            versions = [piece["version"] for piece in pieces]
            assert versions == sorted(versions)
            assert [versions[0], versions[-1]] == one["versions"][sample]
            ends = [piece["end"] for piece in pieces]
            assert all(e <= s["start"] for e, s in zip(ends, pieces[1:], strict=False))
            assert pieces[-1]["reason"] == one["reasons"][sample]
    for step in steps:
        trained = [one for one in groups if one["step"] == step.step]
        assert len(trained) == step.groups
        assert sum(sum(one["lengths"]) for one in trained) == step.tokens
        behind = [step.version - 1 - oldest for one in trained for oldest, _ in one["versions"]]
        assert max(behind) == step.staleness_max
    replayed = replay(out / "rollouts/trace")
    assert replayed.equal, replayed.first_difference
    for engine in range(engines):
        timed = np.load(out / f"rollouts/steps-engine{engine}.npy")
        busy = timed["new_tokens"] > 0
        assert timed["new_tokens"].sum() >= sum(
            segment["tokens"] for segment in segments if segment["engine"] == engine
        )
        assert (np.diff(timed["start"][busy]) > 0).all()


def test_hybrid_with_a_budget(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = finished(out)
    check_files(out, steps)
    assert len(steps) == STEPS
    budget = steps[0].token_budget
    before = json.loads((out / "summary.json").read_text())["length_before"]
    assert budget == round(PROMPTS * SAMPLES * before)
    for step in steps:
        assert step.made_tokens is not None and step.made_tokens >= budget
        assert step.groups and step.groups >= 1
        assert step.logprob_gap is None or step.logprob_gap <= 1e-3
        assert step.masked_tokens == step.dropped == step.early_stopped == 0
    assert any(step.continued for step in steps)  # else this was no test of partial rollouts
    assert max(step.staleness_max or 0 for step in steps) <= 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["groups_total"] == sum(step.groups or 0 for step in steps)
    assert summary["syncs"] == STEPS + 1


def test_disaggregated(tmp_path: Path) -> None:
    """Two engines go on while the ranks train; each follows every version on its own."""
    out = tmp_path / "run"
    layout = ["--deployment", "disaggregated", "--engines", "2", "--max-staleness", "2"]
    steps = finished(out, *layout, "--loss-mask", "weighted")
    check_files(out, steps, engines=2)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    # the first version and the last reach both engines together, those between each by itself
    assert summary["syncs"] == 1 + 2 * (STEPS - 1) + 1
    assert summary["digest_mismatches"] == 0
    assert max(step.staleness_max or 0 for step in steps) <= 2
    assert max(step.logprob_gap or 0.0 for step in steps) <= 1e-3
    assert max(step.probe_gap for step in steps) <= 1e-2
    segments = lines(out / "rollouts/segments.jsonl")
    assert {segment["engine"] for segment in segments} == {0, 1}


def test_whole_iterations_are_the_synchronous_loop(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = finished(out, "--rollouts", "whole", "--engines", "2", "--pin-engines")
    check_files(out, steps, engines=2)
    for step in steps:
        assert (step.groups, step.staleness_max, step.continued) == (PROMPTS, 0, 0.0)
        assert step.token_budget is None and step.made_tokens == step.tokens
        assert step.logprob_gap is not None and step.logprob_gap <= 1e-3
    segments = lines(out / "rollouts/segments.jsonl")
    assert len(segments) == STEPS * PROMPTS * SAMPLES  # nothing is cut
    engines = Counter((segment["group"] % 2, segment["engine"]) for segment in segments)
    assert len(engines) == 2  # groups in turn, all of a group to one engine
    groups = lines(out / "rollouts/groups.jsonl")
    assert [one["group"] for one in groups] == list(range(STEPS * PROMPTS))


@pytest.mark.parametrize("deployment", ["hybrid", "disaggregated"])
def test_a_killed_run_loses_no_prompt(tmp_path: Path, deployment: str) -> None:
    out = tmp_path / "run"
    run = start_run(out, *OPTIONS, "--deployment", deployment)
    read_until(run, f" 3/{STEPS} ")
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=200)
    assert wait_for_nothing() == {}
    state = json.loads(newest_state(out).read_text())
    waiting, done = state["waiting"], state["step"]
    assert waiting and done >= 1

    run = start("--resume", out)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    steps = read_metrics(out / "metrics.jsonl")
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    groups = lines(out / "rollouts/groups.jsonl")
    assert len({one["group"] for one in groups}) == len(groups)
    since = [one for one in groups if one["step"] > done]
    last = json.loads(newest_state(out).read_text())
    left = Counter(one["problem"] for one in since) + Counter(last["waiting"])
    assert not Counter(waiting) - left
    assert left.total() == len(waiting) + PROMPTS * (last["draws"] - state["draws"])
    for one in since:  # those that were waiting are the first that the resumed run offers
        place = one["group"] - state["offered"]
        assert place >= 0
        if place < len(waiting):
            assert one["problem"] == waiting[place]
    assert replay(out / f"rollouts/trace-{done}").equal


def newest_state(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("rl-??????"))[-1] / "state.json"
