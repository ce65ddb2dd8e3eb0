"""Problems in, judged completions out: one call samples a whole batch and checks the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimisys.trainer.engines import Engines, Sampling
from kimisys.trainer.task import Problem, Task, TaskError
from kimisys.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One judged sample. reward: the checker's, within 0 to 1; 1 is right. tokens: its
    end-of-sequence token included."""

    text: str
    finished: bool
    tokens: int
    reward: float

    @property
    def right(self) -> bool:
        """Whether the checker was satisfied."""
        return self.reward >= 1.0


@dataclass(frozen=True)
class Answers:
    """Judged completions of some problems, one a row. groups: int64[rows], the problem of each,
    numbered from 0. seconds: that they took."""

    completions: Sequence[Completion]
    groups: np.ndarray
    seconds: float

    @property
    def outcomes(self) -> np.ndarray:
        """The checker's reward of each row: float32[rows]."""
        return np.array([one.reward for one in self.completions], np.float32)

    @property
    def right(self) -> np.ndarray:
        """Whether each row is right: bool[rows]."""
        return np.array([one.right for one in self.completions])

    @property
    def lengths(self) -> np.ndarray:
        """Completion tokens of each row: int64[rows]."""
        return np.array([one.tokens for one in self.completions], np.int64)

    @property
    def tokens(self) -> int:
        """Completion tokens in all."""
        return int(self.lengths.sum())

    @property
    def pass_rate(self) -> float:
        """The share of right rows."""
        return float(self.right.mean())

    @property
    def correct_length(self) -> float | None:
        """Mean completion tokens of the right rows; None where none is right."""
        return float(self.lengths[self.right].mean()) if self.right.any() else None

    def group_pass_rates(self) -> np.ndarray:
        """The share of right samples of each problem: float64[problems]."""
        counts = np.bincount(self.groups)
        return np.bincount(self.groups, weights=self.right) / counts


def sample(
    engines: Engines,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    samples: int,
    temperature: float,
    seed: int,
    version: int,
) -> Answers:
    """Let the engines complete each problem `samples` times under `version`, all at once, and check
    the answers; row i · samples + j is sample j of problem i. Raises TaskError when the task's
    checker fails."""
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    how = Sampling(samples, temperature, task.max_completion_tokens, [tokenizer.eos_id], seed)
    start = time.perf_counter()
    answered = engines.generate(prompts, how, version)
    seconds = time.perf_counter() - start
    rows = [(i, one.token_ids) for i, group in enumerate(answered) for one in group]
    return Answers(
        [judge(task, tokenizer, problems[i], ids) for i, ids in rows],
        np.array([i for i, _ in rows], np.int64),
        seconds,
    )


def judge(
    task: Task, tokenizer: Tokenizer, problem: Problem, token_ids: Sequence[int]
) -> Completion:
    """What the task's checker says of a completion. Raises TaskError when it fails or answers with
    something that is no reward."""
    ids = list(token_ids)
    finished = bool(ids) and ids[-1] == tokenizer.eos_id
    text = tokenizer.decode(ids[:-1] if finished else ids)
    try:
        reward = float(task.check(problem, text, finished))
    except Exception as error:
        raise TaskError(
            f"the task's checker failed on {text!r}, an answer to {problem.prompt!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not 0.0 <= reward <= 1.0 or math.isnan(reward):
        raise TaskError(
            f"the task's checker gave {reward} for {text!r}, an answer to {problem.prompt!r}; "
            "a reward lies within 0 to 1, and 1 is right"
        )
    return Completion(text, finished, len(ids), reward)
