"""One iteration of k1.5: take finished groups, score, improve, publish, and check all of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from kimisys.errors import DigestError
from kimisys.rl.length_reward import LengthRewardSchedule
from kimisys.rollout import Batch
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.control import Control
from kimisys.trainer.display import Display
from kimisys.trainer.engines import Engines
from kimisys.trainer.learning import Experience, experience
from kimisys.trainer.megatron_rank import Improved, Improvement
from kimisys.trainer.metrics import StepMetrics
from kimisys.trainer.model_folder import ModelFolder
from kimisys.trainer.progress import Progress
from kimisys.trainer.prompts import Prompts
from kimisys.trainer.ranks import Ranks
from kimisys.trainer.rollout_engine import Following
from kimisys.trainer.rollouts import Rollouts
from kimisys.trainer.task import Task
from kimisys.trainer.watch import ReplicaError, probe_gap

PROBE_TOKENS = 16  # at most: each is compared over the whole vocabulary
PUBLICATIONS = 2  # of the same weights, when an engine refuses what landed


class Iterations:
    """The RL steps of a run. What they change is in the ranks, the engines and `progress`.

    First `sync`; then `step` after step with the same rollouts; `settle` when these have ended.
    """

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
        self._served = self._told = 0  # versions; told: the last that engines were to follow
        self._density: float | None = None  # of the last version
        first = self._tokenizer.encode_prompt(task.held_out[0].prompt)
        # the end-of-sequence token makes sure of the two tokens that a probe needs
        self._probe = [*first[: PROBE_TOKENS - 1], self._tokenizer.eos_id]
        self.prompts = Prompts(config, task, self._tokenizer, progress)
        """What the rollouts draw from."""
        overlap = config.deployment == "disaggregated"
        self.following = Following(self._watch, self._probe) if overlap else None
        """How the engines follow while others sample; None: they follow in `sync` alone."""
        self._length = LengthRewardSchedule(config.length_reward, config.length_reward_from)

    @property
    def served(self) -> int:
        """The version that the engines serve."""
        return self._served

    def sync(self) -> float:
        """Publish, let the engines follow unless they are frozen, and compare what both compute;
        nothing runs on the engines.

        Returns the largest difference of the probe's log-probabilities.
        """
        start, progress = time.perf_counter(), self._progress
        if self._config.freeze_engine and self._served:
            self._publish()
        else:
            self._publish_and_update()
            self._served = progress.version
        self._told = self._served
        self._watch.sync_seconds.append(time.perf_counter() - start)
        return self._compare()

    def settle(self) -> None:
        """Let engines that follow on their own take the last version; nothing runs on them now."""
        # a run that was resumed for its end alone has done no step, and its engines have the last
        if self.following is not None and self._told != self._served:
            self._told = self._served
            self._watch.note_sync(self._engines.update(self._served))
            self._compare()

    def _compare(self) -> float:
        """What the engines compute, with what the ranks do."""
        version = self._progress.version
        if self._control is not None and self._served == version:
            self._control.follow(self._served)
            self._watch.compared += 1
        trainer = self._ranks.one("probe", self._probe)
        gap = max(probe_gap(trainer, e) for e in self._engines.probe(self._probe, self._served))
        self._watch.note_probe(version, gap, self._served == version)
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

    def step(self, step: int, rollouts: Rollouts) -> StepMetrics:
        """Do step `step`, counted from 1; afterwards the engines serve what it made, or will."""
        start, watch = time.perf_counter(), self._watch
        moved = watch.nbytes, watch.wire_nbytes, watch.full_nbytes
        self.prompts.begin(step)
        self._display.within_step(step, "sampling")
        batch = rollouts.batch()
        keys = [one.prompt.key for one in (*batch.groups, *(one.group for one in batch.dropped))]
        places = {key: self.prompts.place(key) for key in keys}
        learned = self._judge(batch)
        self._display.within_step(step, "training")
        figures = self._train(step, learned)
        figures |= self._follow(step, rollouts)
        rollouts.log.batch(step, learned, batch.dropped, rollouts.spans(), places)
        self.prompts.save()
        return StepMetrics(
            step=step,
            version=self._progress.version,
            **figures,
            **rollouts.figures(batch),
            success_rate=self.prompts.success_rate,
            admitted=self.prompts.admitted,
            sync_bytes=watch.nbytes - moved[0],
            delta_density=self._density,
            delta_bytes=watch.wire_nbytes - moved[1],
            full_bytes=watch.full_nbytes - moved[2],
            step_seconds=time.perf_counter() - start,
        )

    def _judge(self, batch: Batch) -> Experience:
        """What a batch teaches; its prompts are done with."""
        self.prompts.dropped([one.group.prompt.key for one in batch.dropped])
        keys = [group.prompt.key for group in batch.groups]
        problems = [self.prompts.problem(key) for key in keys]
        learned = experience(batch.groups, problems, self._task, self._tokenizer, batch.seconds)
        self.prompts.trained(keys, torch.from_numpy(learned.answers.group_pass_rates()))
        return learned

    def _train(self, step: int, learned: Experience) -> dict[str, Any]:
        """Score and improve under the weights that were served; the metrics of both."""
        config, version, start = self._config, self._served, time.perf_counter()
        log_probs: np.ndarray = self._ranks.one("score", learned.batch)
        gap = learned.gap(log_probs, version)
        if gap is not None:
            self._watch.note_gap(step, gap, config.freeze_engine)
        scored = time.perf_counter()
        lengths = self._length.weight_at(step) * learned.length_rewards()
        rewards = learned.rewards(lengths, config.repetition_penalty)
        weights = learned.weights(config, log_probs, version)
        improved = self._improve(step, learned, rewards, log_probs, weights)
        return {
            **learned.figures(version, weights),
            "reward": float(rewards.mean()),
            "length_reward": float(lengths.mean()),
            "logprob_gap": gap,
            "stale_gap": learned.gap(log_probs, version, stale=True),
            "loss": improved.loss,
            "gradient_norm": improved.gradient_norm,
            "divergence": improved.divergence,
            "score_seconds": scored - start,
            "train_seconds": time.perf_counter() - scored,
        }

    def _improve(
        self,
        step: int,
        learned: Experience,
        rewards: np.ndarray,
        log_probs: np.ndarray,
        weights: np.ndarray,
    ) -> Improved:
        config = self._config
        groups = len(learned.groups)
        improved: Improved = self._ranks.one(
            "improve",
            Improvement(
                learned.batch,
                rewards,
                learned.answers.groups,
                (log_probs * weights).sum(axis=1),
                max(1, round(config.minibatches * groups / config.prompts)),
                config.learning_rate,
                config.tau,
                config.clip_gradient,
                config.seed + step,
                weights=weights,
            ),
        )
        if improved.replica_difference != 0.0:
            raise ReplicaError(
                f"step {step}: the ranks' copies of replicated parameters differ by up to "
                f"{improved.replica_difference:.1e}; a gradient is not summed over the ranks"
            )
        return improved

    def _follow(self, step: int, rollouts: Rollouts) -> dict[str, Any]:
        """The new weights to the engines; the metrics of it."""
        if self.following is None:
            gap = self.sync()
            seconds = self._watch.sync_seconds[-1]
            if self._served == self._progress.version:  # frozen engines know of nothing newer
                rollouts.publish(self._served)
            return {"probe_gap": gap, "sync_seconds": seconds}
        # deltas go from version to version: nobody may still be reading the one before
        followed = self.following.wait(rollouts.engines, rollouts.check, self._config.ready_timeout)
        start = time.perf_counter()
        self._publish()
        seconds = time.perf_counter() - start
        version = self._served = self._progress.version
        self.following.expect(version, self._ranks.one("probe", self._probe))
        if step < self._config.steps:  # the last one comes when nothing runs any more
            self._told = version
            rollouts.publish(version)
        return {"probe_gap": followed.gap, "sync_seconds": seconds + followed.seconds}
