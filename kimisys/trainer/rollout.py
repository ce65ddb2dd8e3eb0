"""Problems in, judged completions out: one call samples a whole batch and checks the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimisys.adapters.vllm.engine import Sample
from kimisys.trainer.batch import Batch, make_batch
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
class Rollouts:
    """Samples of one version, grouped by problem: sample j of problem i is row i · samples + j.

    groups: int64[rows], the problem of each row. engine_log_probs: float32 like batch.mask, what
    the engine sampled with, zero outside the completions. seconds: of the sampling.
    """

    batch: Batch
    completions: Sequence[Completion]
    groups: np.ndarray
    engine_log_probs: np.ndarray
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
) -> Rollouts:
    """Let the engines complete each problem `samples` times under `version`, and check the
    answers. Raises TaskError when the task's checker fails."""
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    how = Sampling(samples, temperature, task.max_completion_tokens, [tokenizer.eos_id], seed)
    start = time.perf_counter()
    answered = engines.generate(prompts, how, version)
    seconds = time.perf_counter() - start
    rows = [(i, one) for i, group in enumerate(answered) for one in group]
    ids = [list(one.token_ids) for _, one in rows]
    batch = make_batch([prompts[i] for i, _ in rows], ids, tokenizer.pad_id)
    engine_log_probs = np.zeros_like(batch.mask)
    for row, (_, one) in enumerate(rows):
        engine_log_probs[row][batch.mask[row] > 0] = one.log_probs
    return Rollouts(
        batch,
        [judge(task, tokenizer, problems[i], one) for i, one in rows],
        np.array([i for i, _ in rows], np.int64),
        engine_log_probs,
        seconds,
    )


def judge(task: Task, tokenizer: Tokenizer, problem: Problem, one: Sample) -> Completion:
    """What the task's checker says of a sample. Raises TaskError when it fails or answers with
    something that is no reward."""
    ids = list(one.token_ids)
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
