"""The study: a policy is warmed up once, then goes a few iterations of k1.5 at every learning rate,
each time from the same weights. After each it is published, as a delta, and what the publisher
says of it is compared with a count of its own."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.density.prediction import Floats, predicted_density
from bench.density.samples import Answers, draw_answers
from kimisys.broadcast import Publication
from kimisys.errors import KimisysError
from kimisys.trainer.config import Dtype, SftConfig, ShapeConfig
from kimisys.trainer.megatron_rank import Improvement, MegatronRank, Place
from kimisys.trainer.model_folder import ModelFolder, make_model, planned_model
from kimisys.trainer.task import Task
from kimisys.trainer.warm_up import Demonstrations

TAU, CLIP = 0.1, 1.0
_TIMEOUT_SECONDS = 600.0


class CountError(KimisysError):
    """The publisher and the study count differently."""


Tell = Callable[[str], object]


@dataclass(frozen=True)
class StudyConfig:
    """What is measured."""

    learning_rates: tuple[float, ...] = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    steps_per_sync: tuple[int, ...] = (1, 4)
    """Optimizer steps between two syncs; `kimisys train` takes 4."""
    iterations: int = 8
    """Syncs at each learning rate."""
    settled: int = 3
    """Of them, the last ones, which count: an optimizer that keeps its state needs some steps to
    forget where it began."""
    problems: int = 8
    """Of one iteration."""
    samples: int = 8
    """Of each problem."""
    shape: ShapeConfig = field(
        default_factory=lambda: ShapeConfig(256, 4, heads=8, kv_heads=4, ffn_size=1024)
    )
    sft: SftConfig = field(
        default_factory=lambda: SftConfig(steps=120, batch_size=32, learning_rate=1e-3)
    )
    threads: int = 2
    seed: int = 1


@dataclass(frozen=True)
class Regime:
    """How a policy is trained between two syncs. reset: the optimizer forgets its state after each
    sync, as in k1.5."""

    learning_rate: float
    steps_per_sync: int
    reset: bool
    wire_dtype: Dtype


@dataclass(frozen=True)
class Cell:
    """What one regime gave, over the syncs that count: medians, but for `density`.

    density: changed / all published elements, at each of these syncs. predicted_from_rate: what one
    move of every weight by the learning rate would change, predicted; predicted_from_moves: the
    same for the moves that the weights made. moved: their mean size, in learning rates.
    record_nbytes: of the delta, with the blocks that it leaves to be read in full. full_nbytes: of
    all elements.
    """

    regime: Regime
    density: tuple[float, ...]
    median: float
    record_nbytes: int
    full_nbytes: int
    predicted_from_rate: float | None
    predicted_from_moves: float | None
    moved: float


class Study:
    """A warmed-up policy on one Megatron rank, and the answers that it is trained on."""

    def __init__(self, config: StudyConfig, task: Task, folder: Path, tell: Tell) -> None:
        self._config, self._folder = config, folder
        model = planned_model(folder / "model", config.shape, task)
        make_model(model, config.seed)
        place = Place(0, 1, 1, "127.0.0.1", _free_port())
        self._rank = MegatronRank(place, model.hf_config, config.seed, _TIMEOUT_SECONDS, 4096)
        torch.set_num_threads(config.threads)
        self._rank.load(str(model.folder))
        self.loss = self._warm_up(task, model, tell)
        self._start = [p.detach().clone() for p in self._rank.model.parameters()]
        self._answers: list[Answers] = []
        for i in range(config.iterations):
            tell(f"answers {i + 1} of {config.iterations}")
            drawn = (config.problems, config.samples, 1000 * config.seed + i)
            self._answers.append(draw_answers(self._rank.policy, task, model.tokenizer, *drawn))

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(p.numel() for p in self._start)

    @property
    def pass_rate(self) -> float:
        """The share of right answers among those that are trained on."""
        return float(np.mean([answers.rewards.mean() for answers in self._answers]))

    def cell(self, regime: Regime) -> Cell:
        """Go from the warmed-up weights through all iterations under `regime`."""
        config, rank = self._config, self._rank
        with torch.no_grad():
            for parameter, bits in zip(rank.model.parameters(), self._start, strict=True):
                parameter.copy_(bits)
        rank.policy.reset_optimizer()
        rank.open_publisher([rank.snapshot(regime.wire_dtype)], str(self._folder))
        rank.publish(0, full=True)
        found: list[tuple[float, ...]] = []
        for i, answers in enumerate(self._answers):
            before = self._weights()
            self._improve(answers, regime, config.seed + i)
            after = self._weights()
            published = rank.publish(i + 1, full=False)
            _check_count(published, before, after, regime)
            if i >= config.iterations - config.settled:
                found.append(_figures(published, before, after, regime.learning_rate))
        density, sent, by_rate, by_moves, moved = zip(*found, strict=True)
        bfloat16 = regime.wire_dtype == "bfloat16"
        return Cell(
            regime,
            density,
            statistics.median(density),
            int(statistics.median(sent)),
            published.nbytes,
            statistics.median(by_rate) if bfloat16 else None,
            statistics.median(by_moves) if bfloat16 else None,
            statistics.median(moved),
        )

    def close(self) -> None:
        """Leave the process group."""
        self._rank.close()

    def _warm_up(self, task: Task, model: ModelFolder, tell: Tell) -> float:
        sft = self._config.sft
        shown = task.demonstrations
        data = Demonstrations(shown, model.tokenizer, sft.batch_size, self._config.seed)
        loss = float("nan")
        for step in range(sft.steps):
            rate = sft.learning_rate_at(step)
            (loss,) = self._rank.sft([data.batch(step)], [rate], CLIP)
            tell(f"warm-up {step + 1} of {sft.steps}, loss {loss:.3f}")
        return loss

    def _improve(self, answers: Answers, regime: Regime, seed: int) -> None:
        """One iteration of k1.5, as `kimisys train` does it."""
        batch = answers.batch
        log_probs = self._rank.score(batch)
        self._rank.improve(
            Improvement(
                batch,
                answers.rewards,
                answers.groups,
                (log_probs * batch.mask).sum(axis=1),
                regime.steps_per_sync,
                regime.learning_rate,
                TAU,
                CLIP,
                seed,
                regime.reset,
            )
        )

    def _weights(self) -> Floats:
        """All weights as they are now, float32[parameters]."""
        flat = [p.detach().flatten() for p in self._rank.model.parameters()]
        return torch.cat(flat).numpy()


def _check_count(published: Publication, before: Floats, after: Floats, regime: Regime) -> None:
    """Raise CountError unless exactly the elements that the publisher counts have changed."""
    dtype = regime.wire_dtype
    changed = int(np.count_nonzero(_bits(before, dtype) != _bits(after, dtype)))
    if published.base is None or published.changed != changed:
        raise CountError(f"{changed} elements changed under {regime}, but {published}")


def _figures(
    published: Publication, before: Floats, after: Floats, rate: float
) -> tuple[float, ...]:
    """Density, bytes, predictions from the rate and from the moves, how far the weights moved."""
    moves = np.abs(after - before)
    return (
        published.density,
        published.delta_nbytes + published.reference_nbytes,
        predicted_density(before, rate),
        predicted_density(before, moves),
        float(moves.mean(dtype=np.float64)) / rate,
    )


def _bits(weights: Floats, dtype: Dtype) -> np.ndarray:
    if dtype == "float32":
        return weights.view(np.int32)
    return torch.from_numpy(weights).to(torch.bfloat16).view(torch.int16).numpy()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
