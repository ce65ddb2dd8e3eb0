"""The run: supervised warm-up, then iterations of sample, score, improve, publish."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kimisys.adapters.megatron.families import check_layout
from kimisys.adapters.ray import local_cluster
from kimisys.errors import DigestError, KimisysError
from kimisys.trainer.arithmetic import ArithmeticTask, Problem
from kimisys.trainer.batch import Batch, make_batch
from kimisys.trainer.config import LOGPROB_GAP_BOUNDS, TrainConfig
from kimisys.trainer.display import Display
from kimisys.trainer.fleet import Fleet, Sync
from kimisys.trainer.initial import write_initial_checkpoint
from kimisys.trainer.megatron_rank import Improvement
from kimisys.trainer.metrics import StepMetrics, Summary, append_metrics, write_json
from kimisys.trainer.plot import plot_run
from kimisys.trainer.rollout import Rollouts, sample
from kimisys.trainer.tokenizer import Tokenizer

SFT_CHUNK = 25  # steps between two signs of life
PUBLICATIONS = 2  # of the same weights, when the engine refuses what landed


class EngineMismatchError(KimisysError):
    """The engine computes something else than the trainer, though the digests agree."""


class ReplicaError(KimisysError):
    """Ranks disagree on a parameter that each of them holds whole."""


@dataclass
class Watch:
    """What is checked at every step, and the worst that was seen."""

    bound: float
    logprob_gap: float = 0.0
    probe_gap: float = 0.0
    digest_mismatches: int = 0
    exceeded_at: int | None = None
    syncs: list[Sync] = field(default_factory=list)
    sync_seconds: list[float] = field(default_factory=list)

    def note_gap(self, step: int, gap: float, frozen: bool) -> None:
        """Note the log-probability gap of `step`; EngineMismatchError beyond the bound, unless
        `frozen`."""
        self.logprob_gap = max(self.logprob_gap, gap)
        if gap <= self.bound:  # NaN is beyond it
            return
        if not frozen:
            raise EngineMismatchError(
                f"step {step}: trainer and engine differ by {gap:.2e} a token in log-probability "
                f"(bound {self.bound:.0e}), so the engine does not serve the weights that it "
                "verified; look at what it derives from its parameters "
                "(kimisys/adapters/vllm/pack.py)"
            )
        self.exceeded_at = self.exceeded_at or step


def probe_gap(trainer: np.ndarray, engine: np.ndarray) -> float:
    """The largest difference of two log-softmaxes, float32[tokens, vocabulary], over what either
    side gives a probability of at least 1e-3; infinite where one is not finite."""
    if not (np.isfinite(trainer).all() and np.isfinite(engine).all()):
        return float("inf")
    likely = np.maximum(trainer, engine) >= np.log(1e-3)
    return float(np.abs(trainer - engine)[likely].max())


class Master:
    """One run of the recipe in `config`, writing into `out`; `started` is its time.monotonic()."""

    def __init__(self, config: TrainConfig, out: Path, display: Display, started: float) -> None:
        self._config, self._out, self._display = config, out, display
        self._started = started
        self._tokenizer = Tokenizer()
        self._task = ArithmeticTask()
        self._hf_config = config.model.hugging_face(
            self._tokenizer.vocab_size,
            self._task.max_prompt_tokens + self._task.max_completion_tokens,
            self._tokenizer.eos_id,
            self._tokenizer.pad_id,
        )
        check_layout(self._hf_config, config.tensor_parallel, 1, config.tensor_parallel)
        self._held_out = self._task.held_out(config.held_out)
        self._probe = self._tokenizer.encode(self._held_out[0].demonstration)
        self._watch = Watch(LOGPROB_GAP_BOUNDS[config.wire_dtype])
        self._steps: list[StepMetrics] = []
        self._rates: list[tuple[float, float]] = []
        self._version = 0
        self._served = 0

    def run(self) -> Summary:
        """Train; returns the summary, which is in `out`/summary.json however the run ends."""
        status = "completed"
        try:
            self._train()
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
            raise
        finally:
            summary = self._summary(status)
            write_json(self._out / "summary.json", asdict(summary))
        plot_run(self._out / "curve.png", self._steps, summary)
        return summary

    def _train(self) -> None:
        config, display = self._config, self._display
        initial = self._out / "initial"
        write_initial_checkpoint(initial, self._hf_config, config.seed)
        display.phase("starting Megatron and vLLM")
        with (
            local_cluster(cpus=2),
            Fleet(config, self._hf_config, initial) as fleet,
            open(self._out / "metrics.jsonl", "a", encoding="utf-8") as log,
        ):
            fleet.start_engine()  # comes up while the ranks warm up
            fleet.start_ranks()
            self._warm_up(fleet)
            display.phase("connecting the engine")
            fleet.connect()
            self._sync(fleet)
            self._evaluate(fleet, "before RL")
            for step in range(1, config.steps + 1):
                metrics = self._step(fleet, step)
                self._steps.append(metrics)
                append_metrics(log, metrics)
                display.step(metrics)
            self._evaluate(fleet, "after RL")
            display.phase("saving the weights")
            fleet.save(self._out / "model", self._version)
            display.phase("ending the processes")

    def _warm_up(self, fleet: Fleet) -> None:
        sft = self._config.sft
        examples = self._task.sft_examples(self._config.seed, sft.steps * sft.batch_size)
        batches = [
            self._demonstrations(examples[i : i + sft.batch_size])
            for i in range(0, len(examples), sft.batch_size)
        ]
        for first in range(0, sft.steps, SFT_CHUNK):
            chunk = batches[first : first + SFT_CHUNK]
            rates = [sft.learning_rate_at(first + i) for i in range(len(chunk))]
            losses = fleet.on_ranks("sft", chunk, rates, self._config.clip_gradient)[0]
            done = min(first + SFT_CHUNK, sft.steps)
            self._display.phase(
                f"supervised warm-up: step {done}/{sft.steps}, loss {losses[-1]:.3f}"
            )

    def _demonstrations(self, problems: Sequence[Problem]) -> Batch:
        encode, eos = self._tokenizer.encode, self._tokenizer.eos_id
        return make_batch(
            [encode(problem.prompt) for problem in problems],
            [[*encode(problem.completion), eos] for problem in problems],
            self._tokenizer.pad_id,
        )

    def _sync(self, fleet: Fleet) -> float:
        """Publish, let the engine follow unless it is frozen, and compare what both compute.

        Returns the largest difference of the probe's log-probabilities.
        """
        start = time.perf_counter()
        if self._config.freeze_engine and self._served:
            self._version += 1
            fleet.publish(self._version)
        else:
            self._watch.syncs.append(self._publish_and_update(fleet))
            self._served = self._version
        self._watch.sync_seconds.append(time.perf_counter() - start)
        trainer = fleet.on_ranks("probe", self._probe)[0]
        engine = fleet.on_engine("probe", self._probe, self._served)
        gap = probe_gap(trainer, engine)
        self._watch.probe_gap = max(self._watch.probe_gap, gap)
        if self._served == self._version and not gap <= 10 * self._watch.bound:
            raise EngineMismatchError(
                f"version {self._version}: the engine's log-probabilities of the probe differ from "
                f"the trainer's by up to {gap:.2e}, though the digests of the weights agree"
            )
        return gap

    def _publish_and_update(self, fleet: Fleet) -> Sync:
        """A new version, served. One that arrives damaged is refused and published once more."""
        for attempt in range(1, PUBLICATIONS + 1):
            self._version += 1
            fleet.publish(self._version)
            try:
                return fleet.update_engine(self._version)
            except DigestError as error:
                self._watch.digest_mismatches += 1
                if attempt == PUBLICATIONS:
                    raise
                self._display.note(f"version {self._version} is refused: {error}")
        raise AssertionError("the loop returns or raises")

    def _step(self, fleet: Fleet, step: int) -> StepMetrics:
        config, start = self._config, time.perf_counter()
        self._display.within_step(step, "sampling")
        rollouts = self._sample(fleet, step)
        self._display.within_step(step, "training")
        scored = time.perf_counter()
        log_probs = fleet.on_ranks("score", rollouts.batch)[0]
        mask = rollouts.batch.mask
        gap = float((np.abs(log_probs - rollouts.engine_log_probs) * mask).sum() / mask.sum())
        self._watch.note_gap(step, gap, config.freeze_engine)
        score_seconds = time.perf_counter() - scored
        trained = time.perf_counter()
        reference = (log_probs * mask).sum(axis=1)
        update = fleet.on_ranks(
            "improve",
            Improvement(
                rollouts.batch,
                rollouts.rewards,
                rollouts.groups,
                reference,
                config.minibatches,
                config.learning_rate,
                config.tau,
                config.clip_gradient,
                config.seed + step,
            ),
        )[0]
        train_seconds = time.perf_counter() - trained
        if update.replica_difference != 0.0:
            raise ReplicaError(
                f"step {step}: the ranks' copies of replicated parameters differ by up to "
                f"{update.replica_difference:.1e}; a gradient is not summed over the ranks"
            )
        probe_gap = self._sync(fleet)
        return StepMetrics(
            step=step,
            version=self._version,
            reward=float(rollouts.rewards.mean()),
            pass_rate=rollouts.pass_rate,
            completion_length=rollouts.mean_length,
            tokens=rollouts.tokens,
            rollout_tokens_per_second=rollouts.tokens / rollouts.seconds,
            loss=update.loss,
            gradient_norm=update.gradient_norm,
            divergence=update.divergence,
            logprob_gap=gap,
            probe_gap=probe_gap,
            sync_bytes=self._watch.syncs[-1].nbytes if self._served == self._version else 0,
            sync_seconds=self._watch.sync_seconds[-1],
            rollout_seconds=rollouts.seconds,
            score_seconds=score_seconds,
            train_seconds=train_seconds,
            step_seconds=time.perf_counter() - start,
        )

    def _sample(self, fleet: Fleet, step: int) -> Rollouts:
        config = self._config
        problems = self._task.problems(config.seed, step, config.prompts)
        return sample(
            fleet,
            self._tokenizer,
            problems,
            config.samples,
            1.0,
            self._task.max_completion_tokens,
            config.seed * 1_000_003 + step,
            self._served,
        )

    def _evaluate(self, fleet: Fleet, when: str) -> None:
        """Pass rates on the held-out problems: sampled at temperature 1, and greedy."""
        self._display.phase(f"measuring {self._config.held_out} held-out problems {when}")
        seed = 2 * self._config.seed + len(self._rates)  # else equal weights would answer equally
        sampled, greedy = (
            sample(
                fleet,
                self._tokenizer,
                self._held_out,
                1,
                temperature,
                self._task.max_completion_tokens,
                seed,
                self._served,
            ).pass_rate
            for temperature in (1.0, 0.0)
        )
        self._rates.append((sampled, greedy))
        self._display.note(f"{when}: pass rate {sampled:.3f} at temperature 1, {greedy:.3f} greedy")

    def _summary(self, status: str) -> Summary:
        watch, steps = self._watch, self._steps
        unknown: list[tuple[float | None, float | None]] = [(None, None)] * 2
        before, after = [*self._rates, *unknown][:2]
        seconds = sum(s.rollout_seconds for s in steps)
        return Summary(
            status=status,
            pass_rate_before=before[0],
            pass_rate_after=after[0],
            greedy_before=before[1],
            greedy_after=after[1],
            steps=len(steps),
            wall_seconds=time.monotonic() - self._started,
            syncs=len(watch.syncs),
            sync_seconds_median=statistics.median(watch.sync_seconds or [0.0]),
            sync_bytes_total=sum(s.nbytes for s in watch.syncs),
            digest_checks=sum(s.digests for s in watch.syncs),
            digest_mismatches=watch.digest_mismatches,
            logprob_gap_max=watch.logprob_gap,
            logprob_gap_bound=watch.bound,
            logprob_gap_exceeded_at=watch.exceeded_at,
            probe_gap_max=watch.probe_gap,
            rollout_tokens_per_second=sum(s.tokens for s in steps) / seconds if seconds else 0.0,
            seed=self._config.seed,
        )
