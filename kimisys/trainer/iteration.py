"""One iteration of k1.5: draw problems, sample, score, improve, publish, and check all of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from kimisys.errors import DigestError
from kimisys.rl.length_reward import LengthRewardSchedule, length_rewards
from kimisys.rl.prompt_sampling import UNSEEN_SUCCESS_RATE, SuccessRates, curriculum_pool, draw
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.control import Control
from kimisys.trainer.display import Display
from kimisys.trainer.engines import Engines
from kimisys.trainer.megatron_rank import Improved, Improvement
from kimisys.trainer.metrics import StepMetrics
from kimisys.trainer.model_folder import ModelFolder
from kimisys.trainer.progress import Progress
from kimisys.trainer.ranks import Ranks
from kimisys.trainer.rollout import Rollouts, sample
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.watch import ReplicaError, probe_gap

PROBE_TOKENS = 16  # at most: each is compared over the whole vocabulary
PUBLICATIONS = 2  # of the same weights, when an engine refuses what landed


@dataclass(frozen=True)
class _Draw:
    """The problems of a step: their places in the task, int64[prompts], and which there were to
    choose from, bool[problems]."""

    indices: torch.Tensor
    problems: list[Problem]
    admitted: torch.Tensor


class Iterations:
    """The RL steps of a run. What they change is in the ranks, the engines and `progress`."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        model: ModelFolder,
        ranks: Ranks,
        engines: Engines,
        progress: Progress,
        display: Display,
        control: Control | None = None,
    ) -> None:
        self._config, self._task, self._tokenizer = config, task, model.tokenizer
        self._ranks, self._engines, self._control = ranks, engines, control
        self._progress, self._watch, self._display = progress, progress.watch, display
        self._served = 0
        self._density: float | None = None  # of the last version
        first = self._tokenizer.encode_prompt(task.held_out[0].prompt)
        # the end-of-sequence token makes sure of the two tokens that a probe needs
        self._probe = [*first[: PROBE_TOKENS - 1], self._tokenizer.eos_id]
        self._difficulties = torch.tensor(
            [p.difficulty for p in task.problems], dtype=torch.float64
        )
        rates = progress.success_rates
        self._success = (
            SuccessRates.from_state(rates) if rates else SuccessRates(len(task.problems))
        )
        self._length = LengthRewardSchedule(config.length_reward, config.length_reward_from)

    @property
    def served(self) -> int:
        """The version that the engines serve."""
        return self._served

    def sync(self) -> float:
        """Publish, let the engines follow unless they are frozen, and compare what both compute.

        Returns the largest difference of the probe's log-probabilities.
        """
        start, progress = time.perf_counter(), self._progress
        if self._config.freeze_engine and self._served:
            self._publish()
        else:
            self._publish_and_update()
            self._served = progress.version
        self._watch.sync_seconds.append(time.perf_counter() - start)
        if self._control is not None and self._served == progress.version:
            self._control.follow(self._served)
            self._watch.compared += 1
        trainer = self._ranks.one("probe", self._probe)
        gap = max(probe_gap(trainer, e) for e in self._engines.probe(self._probe, self._served))
        self._watch.note_probe(progress.version, gap, self._served == progress.version)
        return gap

    def _publish_and_update(self) -> None:
        """A new version, served. One that arrives damaged is refused, and published once more: in
        full, as the damage may lie in what a delta would build on."""
        for attempt in range(1, PUBLICATIONS + 1):
            self._publish(full=attempt > 1)
            try:
                self._watch.note_sync(self._engines.update(self._progress.version))
                return
            except DigestError as error:
                self._watch.digest_mismatches += 1
                if attempt == PUBLICATIONS:
                    raise
                self._display.note(f"version {self._progress.version} is refused: {error}")

    def _publish(self, full: bool = False) -> None:
        """The live weights as the next version."""
        self._progress.version += 1
        self._density = self._ranks.publish(self._progress.version, full).density
        if self._density is not None:
            self._watch.density.append(self._density)

    def step(self, step: int) -> StepMetrics:
        """Do step `step`, counted from 1; afterwards the engines serve what it made."""
        start = time.perf_counter()
        drawn = self._draw(step)
        self._display.within_step(step, "sampling")
        rollouts = self._sample(drawn, step)
        self._success.record(drawn.indices, torch.from_numpy(rollouts.group_pass_rates()))
        self._progress.success_rates = self._success.state()
        weight = self._length.weight_at(step)
        extra = weight * _length_rewards(rollouts)
        self._display.within_step(step, "training")
        scored = time.perf_counter()
        log_probs: np.ndarray = self._ranks.one("score", rollouts.batch)
        gap = _gap(log_probs, rollouts)
        self._watch.note_gap(step, gap, self._config.freeze_engine)
        trained = time.perf_counter()
        rewards = rollouts.outcomes + extra
        improved = self._improve(step, rollouts, rewards, log_probs)
        train_seconds = time.perf_counter() - trained
        watch = self._watch
        nbytes, wire, full = watch.nbytes, watch.wire_nbytes, watch.full_nbytes
        gap_of_probe = self.sync()
        return StepMetrics(
            step=step,
            version=self._progress.version,
            reward=float(rewards.mean()),
            pass_rate=rollouts.pass_rate,
            completion_length=float(rollouts.lengths.mean()),
            correct_length=rollouts.correct_length,
            length_reward=float(extra.mean()),
            difficulty=float(np.mean([problem.difficulty for problem in drawn.problems])),
            success_rate=float(self._success.rates[drawn.admitted].mean()),
            admitted=int(drawn.admitted.sum()),
            tokens=rollouts.tokens,
            rollout_tokens_per_second=rollouts.tokens / rollouts.seconds,
            loss=improved.loss,
            gradient_norm=improved.gradient_norm,
            divergence=improved.divergence,
            logprob_gap=gap,
            probe_gap=gap_of_probe,
            sync_bytes=watch.nbytes - nbytes,
            delta_density=self._density,
            delta_bytes=watch.wire_nbytes - wire,
            full_bytes=watch.full_nbytes - full,
            sync_seconds=watch.sync_seconds[-1],
            rollout_seconds=rollouts.seconds,
            score_seconds=trained - scored,
            train_seconds=train_seconds,
            step_seconds=time.perf_counter() - start,
        )

    def _draw(self, step: int) -> _Draw:
        config = self._config
        done = (step - 1) / config.steps
        admitted = curriculum_pool(self._difficulties, done, full_at=config.curriculum)
        rates = self._success.rates
        if config.sampling == "uniform":
            rates = torch.full_like(rates, UNSEEN_SUCCESS_RATE)
        indices = draw(rates, admitted, config.prompts, config.seed, step)
        problems = [self._task.problems[i] for i in indices.tolist()]
        return _Draw(indices, problems, admitted)

    def _sample(self, drawn: _Draw, step: int) -> Rollouts:
        config = self._config
        return sample(
            self._engines,
            self._tokenizer,
            self._task,
            drawn.problems,
            config.samples,
            1.0,
            config.seed * 1_000_003 + step,
            self._served,
        )

    def _improve(
        self, step: int, rollouts: Rollouts, rewards: np.ndarray, log_probs: np.ndarray
    ) -> Improved:
        config = self._config
        improved: Improved = self._ranks.one(
            "improve",
            Improvement(
                rollouts.batch,
                rewards.astype(np.float32),
                rollouts.groups,
                (log_probs * rollouts.batch.mask).sum(axis=1),
                config.minibatches,
                config.learning_rate,
                config.tau,
                config.clip_gradient,
                config.seed + step,
            ),
        )
        if improved.replica_difference != 0.0:
            raise ReplicaError(
                f"step {step}: the ranks' copies of replicated parameters differ by up to "
                f"{improved.replica_difference:.1e}; a gradient is not summed over the ranks"
            )
        return improved


def _length_rewards(rollouts: Rollouts) -> np.ndarray:
    found = length_rewards(
        torch.from_numpy(rollouts.lengths),
        torch.from_numpy(rollouts.right),
        torch.from_numpy(rollouts.groups),
    )
    return np.asarray(found.numpy())


def _gap(log_probs: np.ndarray, rollouts: Rollouts) -> float:
    """Mean |trainer - engine| over the completion tokens, in nats."""
    mask = rollouts.batch.mask
    return float((np.abs(log_probs - rollouts.engine_log_probs) * mask).sum() / mask.sum())
