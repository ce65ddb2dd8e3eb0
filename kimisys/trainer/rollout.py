"""Problems in, judged completions out: one call samples a whole batch from the engine and rewards
it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimisys.rewards.arithmetic import check
from kimisys.trainer.batch import Batch, make_batch
from kimisys.trainer.fleet import Fleet
from kimisys.trainer.task import Problem
from kimisys.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollouts:
    """Samples of one version, grouped by problem: sample j of problem i is row i · samples + j.

    rewards: float32[rows]. groups: int64[rows], the problem of each row. engine_log_probs: float32
    like batch.mask, what the engine sampled with, zero outside the completions. seconds: of the
    sampling.
    """

    batch: Batch
    rewards: np.ndarray
    groups: np.ndarray
    engine_log_probs: np.ndarray
    tokens: int
    seconds: float

    @property
    def pass_rate(self) -> float:
        """The share of rows with a right answer."""
        return float(np.mean(self.rewards > 0))

    @property
    def mean_length(self) -> float:
        """Mean number of completion tokens."""
        return self.tokens / len(self.rewards)


def sample(
    fleet: Fleet,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    version: int,
) -> Rollouts:
    """Let the engine complete each problem `samples` times under `version`, and check the
    answers."""
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    start = time.perf_counter()
    groups: list[list[Any]] = fleet.on_engine(
        "generate", prompts, samples, max_tokens, temperature, [tokenizer.eos_id], seed, version
    )
    seconds = time.perf_counter() - start
    rows = [(i, one) for i, group in enumerate(groups) for one in group]
    completions = [list(one.token_ids) for _, one in rows]
    batch = make_batch([prompts[i] for i, _ in rows], completions, tokenizer.pad_id)
    engine_log_probs = np.zeros_like(batch.mask)
    for row, (_, one) in enumerate(rows):
        engine_log_probs[row][batch.mask[row] > 0] = one.log_probs
    rewards = [_reward(tokenizer, problems[i], one) for i, one in rows]
    return Rollouts(
        batch,
        np.array(rewards, np.float32),
        np.array([i for i, _ in rows], np.int64),
        engine_log_probs,
        sum(map(len, completions)),
        seconds,
    )


def _reward(tokenizer: Tokenizer, problem: Problem, one: Any) -> float:
    finished = bool(one.token_ids) and one.token_ids[-1] == tokenizer.eos_id
    text = tokenizer.decode([t for t in one.token_ids if t != tokenizer.eos_id])
    return check(problem, text, finished)
