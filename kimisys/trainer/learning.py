"""From finished groups to what an iteration learns from: judged answers and padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kimisys.rl.length_reward import length_rewards
from kimisys.rl.partial import Completions, token_weights
from kimisys.rl.repetition import repetition_penalty
from kimisys.rollout import Group
from kimisys.trainer.answers import Answers, judge
from kimisys.trainer.batch import Batch, make_batch
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer

NO_VERSION = -1


@dataclass(frozen=True)
class Experience:
    """Finished groups and their problems as rows, one a trajectory.

    log_probs, versions: float32 and int64 like batch.mask, of the engine that sampled each token; 0
    and NO_VERSION outside the completions. made_by: int64[rows], how many versions made each
    trajectory. repeated: bool[rows], ended for repeating itself.
    """

    groups: Sequence[Group]
    problems: Sequence[Problem]
    answers: Answers
    batch: Batch
    log_probs: np.ndarray
    versions: np.ndarray
    made_by: np.ndarray
    repeated: np.ndarray

    def gap(self, log_probs: np.ndarray, version: int, *, stale: bool = False) -> float | None:
        """Mean |`log_probs` - the engine's| over the tokens that `version` made, in nats; with
        `stale` over all others. None where there are none."""
        made = self.versions == version
        chosen = (self.batch.mask > 0) & (~made if stale else made)
        if not chosen.any():
            return None
        return float(np.abs(log_probs - self.log_probs)[chosen].mean())

    def weights(self, config: TrainConfig, log_probs: np.ndarray, version: int) -> np.ndarray:
        """What each token counts in the loss, by --loss-mask: float32 like batch.mask. log_probs:
        the trainer's, under `version`, the weights that are trained."""
        completions = Completions(
            torch.from_numpy(self.batch.mask),
            torch.from_numpy(self.versions),
            version,
            torch.from_numpy(log_probs.copy()),  # what Ray hands over is read-only
            torch.from_numpy(self.log_probs),
        )
        return token_weights(
            config.loss_mask,
            completions,
            staleness=config.mask_versions,
            truncation=config.mask_cap,
        ).numpy()

    def length_rewards(self) -> np.ndarray:
        """k1.5's length reward of each row, before any weight: float32[rows]."""
        found = length_rewards(
            torch.from_numpy(self.answers.lengths),
            torch.from_numpy(self.answers.right),
            torch.from_numpy(self.answers.groups),
        )
        return np.asarray(found.numpy())

    def rewards(self, lengths: np.ndarray, penalty: float) -> np.ndarray:
        """What each row earns, float32[rows]: the checker's reward, and `lengths` for its length,
        less the `penalty` for repeating itself."""
        earned = torch.from_numpy((self.answers.outcomes + lengths).astype(np.float32))
        return repetition_penalty(earned, torch.from_numpy(self.repeated), penalty).numpy()

    def figures(self, version: int, weights: np.ndarray) -> dict[str, Any]:
        """The metrics of these groups, `version` being the weights that are trained."""
        completions = self.batch.mask > 0
        staleness = version - self.versions[completions]
        trained = int((weights[completions] > 0).sum())
        return {
            "groups": len(self.groups),
            "pass_rate": self.answers.pass_rate,
            "completion_length": float(self.answers.lengths.mean()),
            "correct_length": self.answers.correct_length,
            "difficulty": float(np.mean([one.difficulty for one in self.problems])),
            "tokens": self.answers.tokens,
            "trained_tokens": trained,
            "masked_tokens": self.answers.tokens - trained,
            "staleness_mean": float(staleness.mean()),
            "staleness_max": int(staleness.max()),
            "continued": float((self.made_by > 1).mean()),
            "early_stopped": int(self.repeated.sum()),
        }


def experience(
    groups: Sequence[Group],
    problems: Sequence[Problem],
    task: Task,
    tokenizer: Tokenizer,
    seconds: float,
) -> Experience:
    """Judge the trajectories of at least one finished group, and lay them side by side.

    problems: of each group. seconds: that the rollouts took. Raises TaskError when the task's
    checker fails.
    """
    rows = [(i, one) for i, group in enumerate(groups) for one in group.trajectories]
    token_ids = [one.token_ids.tolist() for _, one in rows]
    completions = [
        judge(task, tokenizer, problems[i], ids)
        for (i, _), ids in zip(rows, token_ids, strict=True)
    ]
    prompts = [groups[i].prompt.token_ids for i, _ in rows]
    batch = make_batch(prompts, token_ids, tokenizer.pad_id)
    log_probs = np.zeros_like(batch.mask)
    versions = np.full(batch.mask.shape, NO_VERSION, np.int64)
    for row, (_, one) in enumerate(rows):
        made = batch.mask[row] > 0
        log_probs[row][made] = one.log_probs
        versions[row][made] = one.versions
    return Experience(
        groups,
        problems,
        Answers(completions, np.array([i for i, _ in rows], np.int64), seconds),
        batch,
        log_probs,
        versions,
        np.array([len({s.version for s in one.segments}) for _, one in rows], np.int64),
        np.array([one.reason == "repetition" for _, one in rows]),
    )
