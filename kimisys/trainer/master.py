"""The run: supervised warm-up, then iterations, with checkpoints between them."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from kimisys.adapters.ray import Actors
from kimisys.trainer.checkpoint import Checkpoints
from kimisys.trainer.config import LOGPROB_GAP_BOUNDS, ConfigError, RunConfig, TrainConfig
from kimisys.trainer.control import Control
from kimisys.trainer.display import Display
from kimisys.trainer.engines import Engines, threads_for
from kimisys.trainer.evaluation import evaluate, sample_records
from kimisys.trainer.iteration import Iterations
from kimisys.trainer.machine import machine_record
from kimisys.trainer.metrics import (
    SftMetrics,
    StepMetrics,
    Summary,
    append_record,
    open_records,
    read_metrics,
    write_json,
)
from kimisys.trainer.model_folder import ModelFolder, make_model
from kimisys.trainer.plot import plot_run
from kimisys.trainer.processes import processes
from kimisys.trainer.progress import Evaluation, Progress
from kimisys.trainer.ranks import Ranks
from kimisys.trainer.report import write_report
from kimisys.trainer.rollout_engine import RolloutEngine
from kimisys.trainer.rollout_log import RolloutLog
from kimisys.trainer.rollouts import Rollouts
from kimisys.trainer.task import Task, TaskError
from kimisys.trainer.tensorboard import TensorBoardLog
from kimisys.trainer.warm_up import Demonstrations
from kimisys.trainer.watch import Watch

SFT_CHUNK, SFT_SIGN_SECONDS = 25, 5.0  # steps, and seconds, between two signs of life at most
SFT_CHECKPOINT = 50  # steps between two checkpoints
SAMPLES_SHOWN = 16  # in the report, before and after


class Master:
    """One run of `config` in the folder `out`, from `model`, on `task`; `started` is its
    time.monotonic(). A TrainConfig ends with RL, any other RunConfig with the warm-up."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        model: ModelFolder,
        task: Task,
        display: Display,
        started: float,
    ) -> None:
        self._config, self._out, self._display = config, out, display
        self._model = replace(model, folder=out.resolve() / model.folder)
        self._task, self._started = task, started
        self._command = "kimisys train" if isinstance(config, TrainConfig) else "kimisys sft"
        self._checkpoints = Checkpoints(out / "checkpoints", self._model)
        bound = LOGPROB_GAP_BOUNDS[config.wire_dtype]
        self._progress = self._checkpoints.progress() or Progress(Watch(bound), task.fingerprint)
        self._progress.watch.bound = bound  # a resumed run may publish in another dtype
        if self._progress.task != task.fingerprint:
            raise TaskError(
                f"the task {config.task} is not what it was when {out} was started: its problems "
                f"have changed; start another run with --model {out}/model"
            )
        done = self._next_step - 1
        if isinstance(config, TrainConfig) and (
            done > config.steps or (done == config.steps and (out / "model").exists())
        ):
            raise ConfigError(
                f"the run in {out} has done {done} steps already; give a larger --steps to go on"
            )
        self._seconds_before = self._progress.seconds
        self._after: Evaluation | None = None
        log = out / "metrics.jsonl"
        known = read_metrics(log) if log.exists() else []
        self._steps = [step for step in known if step.step < self._next_step]
        self._board = TensorBoardLog(out, self._next_step) if config.tensorboard else None

    @property
    def _next_step(self) -> int:
        """The RL step that comes next, counted from 1."""
        return self._progress.step + 1 if self._progress.phase == "rl" else 1

    def run(self) -> Summary:
        """Train; returns the summary, which is in `out`/summary.json however the run ends."""
        status = "completed"
        write_json(self._out / "machine.json", machine_record())
        (self._out / "summary.json").unlink(missing_ok=True)  # of an end that was resumed
        try:
            self._train()
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._board is not None:
                self._board.close()
            summary = self._summary(status)
            write_json(self._out / "summary.json", asdict(summary))
            self._display.phase("writing the report")
            if self._steps:
                plot_run(self._out / "curve.png", self._steps, summary)
            write_report(self._out)
        return summary

    def _train(self) -> None:
        config, display = self._config, self._display
        if config.model is None:
            make_model(self._model, config.seed)
        resumed = self._checkpoints.last()
        if resumed is not None:
            self._progress.resumed_at.append(self._next_step - 1)
            display.note(f"resuming from {resumed}")
        hint = f"Resume with: {self._command} --resume {self._out}"
        with processes(config.ready_timeout, hint) as (actors, sockets):
            ranks = Ranks(actors, config, self._model.hf_config, sockets)
            if not isinstance(config, TrainConfig):
                display.phase("starting Megatron")
                self._start_ranks(ranks, resumed)
                self._warm_up(ranks)
                ranks.open_publishers()
            else:
                display.phase("starting Megatron and vLLM")
                engines = self._engines(actors, config, config.engines)
                control = self._control(actors, config, engines)
                self._start_ranks(ranks, resumed)
                self._warm_up(ranks)
                display.phase("connecting the engines")
                ranks.open_publishers()
                (control or engines).connect(ranks.addresses)
                self._reinforce(config, ranks, engines, control)
            display.phase("saving the weights")
            self._save_model(ranks)
            display.phase("ending the processes")

    def _engines(
        self, actors: Actors, config: TrainConfig, count: int, name: str = "engine"
    ) -> Engines:
        """`count` engines, begun: they come up while the ranks warm up."""
        made = Engines(
            actors,
            self._model.folder,
            config.wire_dtype,
            self._longest(config),
            count,
            config.engine_tensor_parallel,
            config.seed,
            config.ready_timeout,
            name,
            # alike in all of them: how a sum is split over threads shows in its bits
            threads_for(config.engines + config.control_engine),
            config.pin_engines,
        )
        made.start()
        return made

    def _control(self, actors: Actors, config: TrainConfig, engines: Engines) -> Control | None:
        if not config.control_engine:
            return None
        whole = self._engines(actors, config, 1, "control engine")
        return Control(engines, whole, self._model.tokenizer, self._task)

    def _longest(self, config: TrainConfig) -> int:
        """Tokens of the longest prompt and completion that will be sampled, or of the probe."""
        held_out = self._task.held_out[: config.held_out]
        longest = self._model.longest(self._task, [*self._task.problems, *held_out])
        return min(longest + 1, self._model.context)

    def _start_ranks(self, ranks: Ranks, resumed: Path | None) -> None:
        ranks.start(resumed or self._model.folder)
        if resumed is not None and self._progress.phase == "sft":
            self._checkpoints.load_optimizer(ranks, resumed)

    def _warm_up(self, ranks: Ranks) -> None:
        """The SFT steps that are still to be done; a checkpoint now and then, and at the end."""
        sft, progress = self._config.sft, self._progress
        if progress.phase != "sft" or not self._task.demonstrations:
            return
        data = Demonstrations(
            self._task.demonstrations, self._model.tokenizer, sft.batch_size, self._config.seed
        )
        seconds = SFT_SIGN_SECONDS  # of a step, as long as none was timed
        with open_records(self._out / "sft.jsonl", progress.step) as log:
            while progress.step < sft.steps:
                chunk = max(1, int(SFT_SIGN_SECONDS / seconds))
                chunk = min(chunk, SFT_CHUNK - progress.step % SFT_CHUNK)
                steps = range(progress.step, min(progress.step + chunk, sft.steps))
                rates = [sft.learning_rate_at(step) for step in steps]
                batches = [data.batch(step) for step in steps]
                started = time.monotonic()
                losses = ranks.one("sft", batches, rates, self._config.clip_gradient)
                seconds = (time.monotonic() - started) / len(steps)
                for step, loss, rate in zip(steps, losses, rates, strict=True):
                    append_record(log, asdict(SftMetrics(step + 1, loss, rate)))
                progress.step = steps.stop
                self._display.phase(
                    f"supervised warm-up: step {progress.step}/{sft.steps}, loss {losses[-1]:.3f}"
                )
                if progress.step % SFT_CHECKPOINT == 0 or progress.step == sft.steps:
                    self._checkpoint(ranks)

    def _reinforce(
        self, config: TrainConfig, ranks: Ranks, engines: Engines, control: Control | None
    ) -> None:
        progress, display = self._progress, self._display
        sides = (ranks, engines, progress, display, control)
        iterations = Iterations(config, self._task, self._model, *sides)
        iterations.sync()
        if progress.before is None:
            progress.before = self._evaluate(config, engines, iterations.served, "before")
        first = self._next_step
        metrics = open_records(self._out / "metrics.jsonl", first - 1)
        with metrics, self._rollouts(config, engines, iterations) as rollouts:
            for step in range(first, config.steps + 1):
                self._note(iterations.step(step, rollouts), metrics)
                progress.phase, progress.step = "rl", step
                if step % config.checkpoint_every == 0 or step == config.steps:
                    rollouts.log.engine_steps(engines.steps())
                    self._checkpoint(ranks)
        iterations.settle()
        self._after = self._evaluate(config, engines, iterations.served, "after")

    @contextmanager
    def _rollouts(
        self, config: TrainConfig, engines: Engines, iterations: Iterations
    ) -> Iterator[Rollouts]:
        """The rollouts of this life of the run; the engines serve a version."""
        progress, before = self._progress, self._progress.before
        assert before is not None  # it has just been measured
        usual = round(config.prompts * config.samples * before.length)
        engines.steps()  # those of the evaluation are no rollouts
        past = (self._next_step - 1, self._seconds_before)
        with (
            RolloutLog(self._out / "rollouts", *past, self._started, progress.offered) as log,
            Rollouts(
                config,
                config.token_budget or usual,
                [
                    RolloutEngine(client, iterations.following, bounded=config.partial)
                    for client in engines.clients()
                ],
                iterations.prompts.offer,
                self._model.tokenizer.eos_id,
                log,
                engines.check,
            ) as rollouts,
        ):
            yield rollouts

    def _note(self, metrics: StepMetrics, log: TextIO) -> None:
        """Write down what a step was, and show it."""
        append_record(log, asdict(metrics))
        self._steps.append(metrics)
        if self._board is not None:
            self._board.step(metrics)
        self._display.step(metrics)

    def _checkpoint(self, ranks: Ranks) -> None:
        self._progress.seconds = self._seconds()
        self._checkpoints.write(ranks, self._progress)

    def _evaluate(
        self, config: TrainConfig, engines: Engines, version: int, when: str
    ) -> Evaluation:
        """Pass rates on the held-out problems, and some samples for the report."""
        problems = self._task.held_out[: config.held_out]
        self._display.phase(f"measuring {len(problems)} held-out problems {when} RL")
        seed = 2 * config.seed + (when == "after")  # else equal weights would answer equally
        found, greedy = evaluate(
            engines, self._model.tokenizer, self._task, problems, seed, version
        )
        with open_records(self._out / "samples.jsonl") as log:
            for record in sample_records(problems[:SAMPLES_SHOWN], greedy):
                append_record(log, {"when": when, **record})
        self._display.note(
            f"{when} RL: pass rate {found.pass_rate:.3f} at temperature 1, {found.greedy:.3f} "
            f"greedy, {found.length:.1f} tokens"
        )
        return found

    def _save_model(self, ranks: Ranks) -> None:
        folder, progress = self._out / "model", self._progress
        if not isinstance(self._config, TrainConfig):
            progress.version += 1
            ranks.publish(progress.version)
        for stale in self._out.glob(".model.*"):  # of a run that was killed here
            shutil.rmtree(stale)
        fresh = folder.with_name("model.next")
        shutil.rmtree(fresh, ignore_errors=True)
        ranks.save_published(fresh, progress.version, self._model.files(self._config.wire_dtype))
        if folder.exists():  # of a run that was resumed to go further
            shutil.rmtree(folder)
        fresh.rename(folder)

    def _seconds(self) -> float:
        """Of the run so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def _summary(self, status: str) -> Summary:
        progress, watch = self._progress, self._progress.watch
        return Summary(
            status=status,
            **_measured("before", progress.before),
            **_measured("after", self._after),
            steps=progress.step if progress.phase == "rl" else 0,
            resumed_at=progress.resumed_at,
            wall_seconds=self._seconds(),
            syncs=watch.syncs,
            sync_seconds_median=statistics.median(watch.sync_seconds or [0.0]),
            sync_bytes_total=watch.nbytes,
            digest_checks=watch.digests,
            digest_mismatches=watch.digest_mismatches,
            logprob_gap_max=watch.logprob_gap,
            logprob_gap_bound=watch.bound,
            logprob_gap_exceeded_at=watch.exceeded_at,
            probe_gap_max=watch.probe_gap,
            rollout_tokens_per_second=_sampling_rate(self._steps),
            seed=self._config.seed,
            delta_density_median=statistics.median(watch.density) if watch.density else None,
            delta_bytes_total=watch.wire_nbytes,
            full_bytes_total=watch.full_nbytes,
            control_compared=watch.compared or None,
            **_sampled(self._steps),
        )


def _sampling_rate(steps: Sequence[StepMetrics]) -> float:
    """Tokens per second of sampling, over all steps; engines that sample while ranks train do so
    for longer than a batch is waited for."""
    made = [(s.made_tokens or s.tokens, s.rollout_tokens_per_second) for s in steps]
    seconds = sum(tokens / rate for tokens, rate in made if rate)
    return sum(tokens for tokens, _ in made) / seconds if seconds else 0.0


def _sampled(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """What the summary says of the rollouts of these steps."""

    def known(name: str) -> list[Any]:
        return [value for step in steps if (value := getattr(step, name)) is not None]

    sums = ("groups", "dropped", "made_tokens", "trained_tokens", "idle_seconds", "step_seconds")
    means = ("staleness_mean", "continued", "utilisation")
    return {
        **{f"{name}_total": sum(known(name)) for name in sums if known(name)},
        **{name: statistics.fmean(known(name)) for name in means if known(name)},
        "staleness_max": max(known("staleness_max"), default=None),
        "token_budget": max(known("token_budget"), default=None),
    }


def _measured(when: str, found: Evaluation | None) -> dict[str, Any]:
    """An evaluation as the summary has it."""
    return {
        f"{name}_{when}": getattr(found, name, None)
        for name in ("pass_rate", "greedy", "length", "correct_length")
    }
