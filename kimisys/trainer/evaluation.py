"""Measuring a policy on problems that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kimisys.trainer.answers import Answers, sample
from kimisys.trainer.engines import Engines
from kimisys.trainer.progress import Evaluation
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer


def evaluate(
    engines: Engines,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    seed: int,
    version: int,
) -> tuple[Evaluation, Answers]:
    """One sample of each problem at temperature 1, and the greedy one; also returns the latter."""
    sampled, greedy = (
        sample(engines, tokenizer, task, problems, 1, temperature, seed, version)
        for temperature in (1.0, 0.0)
    )
    found = Evaluation(
        sampled.pass_rate,
        greedy.pass_rate,
        float(sampled.lengths.mean()),
        sampled.correct_length,
    )
    return found, greedy


def sample_records(problems: Sequence[Problem], answers: Answers) -> list[dict[str, Any]]:
    """The samples of the first problems, of which there is one each, as samples.jsonl holds
    them."""
    return [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "completion": one.text,
            "finished": one.finished,
            "reward": one.reward,
            "tokens": one.tokens,
        }
        for problem, one in zip(problems, answers.completions, strict=False)
    ]
