"""What an iteration does when an engine refuses a version, when both sides disagree, and with the
length reward; the ranks and engines are scripted, all else is real."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kimisys.errors import DigestError
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.display import Display
from kimisys.trainer.engines import Sampling, Sync
from kimisys.trainer.iteration import Iterations
from kimisys.trainer.megatron_rank import Improved, Improvement
from kimisys.trainer.progress import Progress
from kimisys.trainer.ranks import Published
from kimisys.trainer.answers import judge
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
    """The first `damaged` versions arrive damaged. Every problem is answered with `texts`."""

    def __init__(self, damaged: int = 0, says: float = -1.0, texts: Sequence[str] = ()) -> None:
        self.damaged, self.says, self.texts = damaged, says, texts

    count = 2

    def update(self, version: int, full: bool = False) -> Sync:
        if version <= self.damaged:
            raise DigestError(f"version {version}: 'w' is not what was published")
        return Sync(version, 100, 1, 10 + version, 500)

    def probe(self, tokens: Sequence[int], version: int) -> list[np.ndarray]:
        agreeing = np.full((3, 16), -1.0, np.float32)
        return [agreeing, np.full((3, 16), self.says, np.float32)]

    def generate(self, prompts: Sequence[Any], how: Sampling, version: int) -> list[list[Any]]:
        return [[sample_of(text) for text in self.texts] for _ in prompts]


def sample_of(text: str) -> Any:
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    return SimpleNamespace(token_ids=ids, log_probs=[-0.5] * len(ids))


def task() -> Task:
    problems = [Problem(f"{i}+{3 - i}=", "3", difficulty=i) for i in range(3)]
    return Task(problems, [Problem("9+9=", "18")], right_sum, 16)


def right_sum(problem: Problem, text: str, finished: bool) -> float:
    return float(finished and text.endswith("#" + problem.answer))


def iterations(engines: ScriptedEngines, **changes: Any) -> tuple[Iterations, ScriptedRanks]:
    config = dataclasses.replace(TrainConfig(), steps=10, prompts=4, samples=4, **changes)
    ranks, progress = ScriptedRanks(), Progress(Watch(1e-3), "task")
    made = Iterations(
        config,
        task(),
        SimpleNamespace(tokenizer=TOKENIZER),  # type: ignore[arg-type]
        ranks,  # type: ignore[arg-type]
        engines,  # type: ignore[arg-type]
        progress,
        Display(Console(quiet=True), steps=1),
    )
    return made, ranks


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
    engines = ScriptedEngines(texts=[SHORT, LONG, WRONG, LONG])
    run, ranks = iterations(engines, length_reward=0.2, length_reward_from=2)
    run.sync()
    first, second = run.step(1), run.step(2)
    assert ranks.work[0].rewards[:4].tolist() == [1.0, 1.0, 0.0, 1.0]
    # lengths 3, 8, 3, 8: λ = 0.5, -0.5, min(0, 0.5), -0.5
    np.testing.assert_allclose(ranks.work[1].rewards[:4], [1.1, 0.9, 0.0, 0.9], rtol=1e-6)
    assert first.length_reward == 0.0
    assert second.length_reward == pytest.approx(0.2 * (0.5 - 0.5 - 0.5) / 4)
    assert (second.pass_rate, second.correct_length) == (0.75, pytest.approx(19 / 3))


def test_the_curriculum_admits_the_easy_problems_first() -> None:
    run, _ = iterations(ScriptedEngines(texts=[SHORT] * 4), curriculum=0.5)
    run.sync()
    steps = [run.step(step) for step in range(1, 7)]
    admitted = [step.admitted for step in steps]
    assert admitted[0] == 1 and admitted[-1] == 3
    assert admitted == sorted(admitted)  # type: ignore[type-var]
    assert steps[0].difficulty == 0.0


def test_what_syncs_moved_is_counted_by_step_and_in_all() -> None:
    run, _ = iterations(ScriptedEngines(texts=[SHORT] * 4))
    run.sync()
    steps = [run.step(1), run.step(2)]
    assert [step.delta_density for step in steps] == [0.03, 0.045]  # the first version had no base
    assert [(step.delta_bytes, step.full_bytes) for step in steps] == [(12, 500), (13, 500)]
    watch = run._progress.watch
    assert watch.density == [0.03, 0.045]
    assert (watch.wire_nbytes, watch.full_nbytes) == (11 + 12 + 13, 1500)


def test_a_full_publication_has_no_density() -> None:
    run, _ = iterations(ScriptedEngines(damaged=1))
    run.sync()
    assert run._progress.watch.density == []


def test_success_rates_are_tracked_and_travel_with_the_progress() -> None:
    engines = ScriptedEngines(texts=[SHORT] * 4)
    run, _ = iterations(engines, curriculum=0.0)
    run.sync()
    run.step(1)
    assert min(run._progress.success_rates) > 0.7  # each was drawn, and solved every time


def test_a_checker_that_fails_is_an_error_of_the_task() -> None:
    def fails(problem: Problem, text: str, finished: bool) -> float:
        raise KeyError("no such unit")

    def graded(problem: Problem, text: str, finished: bool) -> float:
        return 2.0

    for check, message in ((fails, "KeyError: 'no such unit'"), (graded, "gave 2.0")):
        bad = dataclasses.replace(task(), check=check)
        with pytest.raises(TaskError, match=message):
            judge(bad, TOKENIZER, bad.problems[0], sample_of(SHORT))
