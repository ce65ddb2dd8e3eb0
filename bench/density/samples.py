"""Answers of the policy itself, to train on: drawn by whole forward passes, one for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kimisys.adapters.megatron.policy import Policy
from kimisys.trainer.batch import Batch, make_batch
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answers:
    """What one iteration learns from. groups: int64[rows], the problem of each row. rewards:
    float32[rows], the checker's."""

    batch: Batch
    groups: np.ndarray
    rewards: np.ndarray


def draw_answers(
    policy: Policy, task: Task, tokenizer: Tokenizer, problems: int, samples: int, seed: int
) -> Answers:
    """`samples` answers at temperature 1 to each of `problems` problems that `seed` draws."""
    chosen = np.random.default_rng(seed).choice(len(task.problems), problems, replace=False)
    asked = [task.problems[i] for i in chosen for _ in range(samples)]
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in asked]
    answers = _sample(policy, prompts, task.max_completion_tokens, tokenizer, seed)
    rewards = [_reward(task, tokenizer, *pair) for pair in zip(asked, answers, strict=True)]
    return Answers(
        make_batch(prompts, answers, tokenizer.pad_id),
        np.repeat(np.arange(problems), samples),
        np.array(rewards, np.float32),
    )


def _sample(
    policy: Policy, prompts: Sequence[list[int]], most: int, tokenizer: Tokenizer, seed: int
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [list(prompt) for prompt in prompts]
    going = list(range(len(rows)))
    for _ in range(most):
        # attention is causal: the pads after a row change nothing before them
        longest = max(len(rows[i]) for i in going)
        padded = [rows[i] + [tokenizer.pad_id] * (longest - len(rows[i])) for i in going]
        last = torch.tensor([len(rows[i]) - 1 for i in going])
        log_probs = policy.full_log_probs(torch.tensor(padded))[torch.arange(len(going)), last]
        tokens = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0].tolist()
        for i, token in zip(going, tokens, strict=True):
            rows[i].append(token)
        going = [i for i in going if rows[i][-1] != tokenizer.eos_id]
        if not going:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _reward(task: Task, tokenizer: Tokenizer, problem: Problem, answer: list[int]) -> float:
    finished = answer[-1] == tokenizer.eos_id
    return task.check(problem, tokenizer.decode(answer[:-1] if finished else answer), finished)
