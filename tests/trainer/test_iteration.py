"""What an iteration does when an engine refuses a version, when both sides disagree, and with the
length reward; the ranks, the engines and the rollouts are scripted, all else is real."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kimisys.errors import DigestError
from kimisys.rollout import Batch, Group, Segment, Trajectory
from kimisys.trainer.answers import judge
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.display import Display
from kimisys.trainer.engines import Sync
from kimisys.trainer.iteration import Iterations
from kimisys.trainer.megatron_rank import Improved, Improvement
from kimisys.trainer.metrics import StepMetrics
from kimisys.trainer.progress import Progress
from kimisys.trainer.ranks import Published
from kimisys.trainer.task import Problem, Task, TaskError
from kimisys.trainer.tokenizer import Tokenizer
from kimisys.trainer.watch import EngineMismatchError, Watch

TOKENIZER = Tokenizer.arithmetic()
SHORT, LONG, WRONG = "#3", "1+2=3#3", "#4"


class ScriptedRanks:
    def __init__(self) -> None:
        self.published: list[int] = []
        self.full: list[int] = []  # those that were asked to be published whole
        self.work: list[Improvement] = []

    def publish(self, version: int, full: bool = False) -> Published:
        self.published.append(version)
        if full:
            self.full.append(version)
        base = None if full or version == 1 else version - 1
        return Published(version, base, 200, 3 * version if base is not None else 200)

    def one(self, method: str, *args: Any) -> Any:
        if method == "probe":
            return np.full((3, 16), -1.0, np.float32)
        if method == "score":
            return -0.5 * args[0].mask
        assert method == "improve"
        self.work.append(args[0])
        return Improved(0.0, 1.0, 0.0, 0.0)


class ScriptedEngines:
    """The first `damaged` versions arrive damaged."""

    count = 2

    def __init__(self, damaged: int = 0, says: float = -1.0) -> None:
        self.damaged, self.says = damaged, says

    def update(self, version: int, full: bool = False) -> Sync:
        if version <= self.damaged:
            raise DigestError(f"version {version}: 'w' is not what was published")
        return Sync(version, 100, 1, 10 + version, 500)

    def probe(self, tokens: Sequence[int], version: int) -> list[np.ndarray]:
        agreeing = np.full((3, 16), -1.0, np.float32)
        return [agreeing, np.full((3, 16), self.says, np.float32)]


class ScriptedRollouts:
    """Every prompt is answered with `texts`, by the version that is served, or so many versions
    before."""

    engines = 2

    def __init__(self, run: Iterations, texts: Sequence[str], behind: int = 0) -> None:
        self.run, self.texts, self.behind = run, texts, behind
        self.published: list[int] = []
        self.log = SimpleNamespace(batch=lambda *arguments: None)

    def batch(self) -> Batch:
        version = self.run.served - self.behind
        groups = [
            Group(i, prompt, tuple(trajectory(text, version) for text in self.texts))
            for i, prompt in enumerate(self.run.prompts.offer(4))
        ]
        return Batch(0, groups, [], 10, 1.0, version)

    def publish(self, version: int) -> None:
        self.published.append(version)

    def check(self) -> None: ...

    def figures(self, batch: Batch) -> dict[str, Any]:
        return {"rollout_seconds": 1.0, "rollout_tokens_per_second": 10.0}

    def spans(self) -> list[Any]:
        return []


def trajectory(text: str, version: int) -> Trajectory:
    ids = np.array([*TOKENIZER.encode(text), TOKENIZER.eos_id], np.int32)
    log_probs = np.full(len(ids), -0.5, np.float32)
    return Trajectory((Segment(version, ids, log_probs, 0, 0.0, 1.0),), "stop")


def task() -> Task:
    problems = [Problem(f"{i}+{3 - i}=", "3", difficulty=i) for i in range(3)]
    return Task(problems, [Problem("9+9=", "18")], right_sum, 16)


def right_sum(problem: Problem, text: str, finished: bool) -> float:
    return float(finished and text.endswith("#" + problem.answer))


def iterations(
    engines: ScriptedEngines | None = None, **changes: Any
) -> tuple[Iterations, ScriptedRanks]:
    options = {"steps": 10, "prompts": 4, "samples": 4, **changes}
    config = dataclasses.replace(TrainConfig(), **options)
    ranks, progress = ScriptedRanks(), Progress(Watch(1e-3), "task")
    return Iterations(
        config,
        task(),
        SimpleNamespace(tokenizer=TOKENIZER),  # type: ignore[arg-type]
        ranks,  # type: ignore[arg-type]
        engines or ScriptedEngines(),  # type: ignore[arg-type]
        progress,
        Display(Console(quiet=True), steps=1),
    ), ranks


def steps(run: Iterations, texts: Sequence[str], count: int, behind: int = 0) -> list[StepMetrics]:
    rollouts: Any = ScriptedRollouts(run, texts, behind)
    return [run.step(step, rollouts) for step in range(1, count + 1)]


def test_a_damaged_version_is_refused_and_published_anew() -> None:
    run, ranks = iterations(ScriptedEngines(damaged=1))
    assert run.sync() == 0.0
    assert (ranks.published, ranks.full) == ([1, 2], [2])
    assert run.served == 2


def test_damage_that_stays_ends_the_run() -> None:
    run, ranks = iterations(ScriptedEngines(damaged=9))
    with pytest.raises(DigestError, match="version 2"):
        run.sync()
    assert ranks.published == [1, 2]


@pytest.mark.parametrize("says", [-1.5, float("nan"), float("-inf")])
def test_one_engine_that_computes_something_else_ends_the_run(says: float) -> None:
    with pytest.raises(EngineMismatchError, match="probe"):
        iterations(ScriptedEngines(says=says))[0].sync()


@pytest.mark.parametrize("gap", [2e-3, float("nan")])
def test_a_gap_beyond_the_bound_ends_the_run_unless_the_engine_is_frozen(gap: float) -> None:
    watch = Watch(bound=1e-3)
    watch.note_gap(1, 5e-4, frozen=False)
    with pytest.raises(EngineMismatchError, match="step 2"):
        watch.note_gap(2, gap, frozen=False)
    watch.note_gap(2, gap, frozen=True)
    watch.note_gap(3, gap, frozen=True)
    assert watch.exceeded_at == 2


def test_the_length_reward_prefers_the_shorter_right_answer_from_its_step_on() -> None:
    run, ranks = iterations(length_reward=0.2, length_reward_from=2)
    run.sync()
    first, second = steps(run, [SHORT, LONG, WRONG, LONG], 2)
    assert ranks.work[0].rewards[:4].tolist() == [1.0, 1.0, 0.0, 1.0]
    # lengths 3, 8, 3, 8: λ = 0.5, -0.5, min(0, 0.5), -0.5
    np.testing.assert_allclose(ranks.work[1].rewards[:4], [1.1, 0.9, 0.0, 0.9], rtol=1e-6)
    assert first.length_reward == 0.0
    assert second.length_reward == pytest.approx(0.2 * (0.5 - 0.5 - 0.5) / 4)
    assert (second.pass_rate, second.correct_length) == (0.75, pytest.approx(19 / 3))


def test_the_curriculum_admits_the_easy_problems_first() -> None:
    run, _ = iterations(curriculum=0.5)
    run.sync()
    done = steps(run, [SHORT] * 4, 6)
    admitted = [step.admitted for step in done]
    assert admitted[0] == 1 and admitted[-1] == 3
    assert admitted == sorted(admitted)  # type: ignore[type-var]
    assert done[0].difficulty == 0.0


def test_what_syncs_moved_is_counted_by_step_and_in_all() -> None:
    run, _ = iterations()
    run.sync()
    done = steps(run, [SHORT] * 4, 2)
    assert [step.delta_density for step in done] == [0.03, 0.045]  # the first version had no base
    assert [(step.delta_bytes, step.full_bytes) for step in done] == [(12, 500), (13, 500)]
    watch = run._progress.watch
    assert watch.density == [0.03, 0.045]
    assert (watch.wire_nbytes, watch.full_nbytes) == (11 + 12 + 13, 1500)


def test_a_full_publication_has_no_density() -> None:
    run, _ = iterations(ScriptedEngines(damaged=1))
    run.sync()
    assert run._progress.watch.density == []


def test_success_rates_are_tracked_and_travel_with_the_progress() -> None:
    run, _ = iterations(curriculum=0.0)
    run.sync()
    steps(run, [SHORT] * 4, 1)
    assert min(run._progress.success_rates) > 0.7  # each was drawn, and solved every time


def test_a_checker_that_fails_is_an_error_of_the_task() -> None:
    def fails(problem: Problem, text: str, finished: bool) -> float:
        raise KeyError("no such unit")

    def graded(problem: Problem, text: str, finished: bool) -> float:
        return 2.0

    for check, message in ((fails, "KeyError: 'no such unit'"), (graded, "gave 2.0")):
        bad = dataclasses.replace(task(), check=check)
        with pytest.raises(TaskError, match=message):
            judge(bad, TOKENIZER, bad.problems[0], TOKENIZER.encode(SHORT))


def test_a_frozen_engine_is_told_of_nothing_newer() -> None:
    run, ranks = iterations(freeze_engine=True)
    run.sync()
    rollouts: Any = ScriptedRollouts(run, [SHORT] * 4)
    done = [run.step(step, rollouts) for step in (1, 2)]
    assert (run.served, rollouts.published) == (1, [])
    assert ranks.published == [1, 2, 3]
    assert [step.staleness_max for step in done] == [0, 0]


def test_engines_are_told_of_each_version() -> None:
    run, _ = iterations()
    run.sync()
    rollouts: Any = ScriptedRollouts(run, [SHORT] * 4)
    run.step(1, rollouts)
    run.step(2, rollouts)
    assert rollouts.published == [2, 3]


def test_engines_that_follow_take_the_last_version_once_when_nothing_runs() -> None:
    class Strict(ScriptedEngines):
        served = 0

        def update(self, version: int, full: bool = False) -> Sync:
            assert version > self.served  # an engine refuses what it serves already
            self.served = version
            return super().update(version, full)

    engines = Strict()
    run, _ = iterations(engines, deployment="disaggregated", steps=1)
    run.sync()
    run.settle()  # as a run that was resumed after its last step
    assert engines.served == 1
    rollouts: Any = ScriptedRollouts(run, [SHORT] * 4)
    run.step(1, rollouts)
    assert (engines.served, rollouts.published) == (1, [])
    run.settle()
    assert engines.served == run.served == 2


def test_the_gap_is_that_of_the_tokens_of_the_served_version() -> None:
    run, _ = iterations()
    run.sync()
    (fresh,) = steps(run, [SHORT] * 4, 1)
    (stale,) = steps(run, [SHORT] * 4, 1, behind=1)
    assert (fresh.logprob_gap, fresh.stale_gap) == (0.0, None)
    assert (stale.logprob_gap, stale.stale_gap) == (None, 0.0)
    assert (stale.staleness_mean, stale.staleness_max) == (1.0, 1)


@pytest.mark.parametrize(
    ("prompts", "minibatches", "expected"), [(4, 4, 4), (16, 4, 1), (64, 4, 1), (2, 2, 4)]
)
def test_a_minibatch_is_about_as_many_groups_whatever_the_batch(
    prompts: int, minibatches: int, expected: int
) -> None:
    run, ranks = iterations(prompts=prompts, minibatches=minibatches)
    run.sync()
    steps(run, [SHORT] * 4, 1)  # four groups
    assert ranks.work[0].minibatches == expected
