"""The rollouts' thread: batches, turns, whoever fails or dies; with toy engines."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy_engine import ToyEngine, prompt

from kimisys.adapters.ray import ActorLostError
from kimisys.rollout import Prompt, replay
from kimisys.trainer.config import TrainConfig
from kimisys.trainer.rollout_engine import RolloutEngine
from kimisys.trainer.rollout_log import RolloutLog
from kimisys.trainer.rollouts import Rollouts

BUDGET = 200


def nobody_died() -> None: ...


@contextmanager
def rollouts(
    folder: Path, toys: Sequence[ToyEngine], alive: Any = nobody_died, **options: Any
) -> Iterator[Rollouts]:
    config = dataclasses.replace(TrainConfig(), **{"prompts": 6, "samples": 2, **options})
    keys = itertools.count()

    def offer(count: int) -> list[Prompt]:
        return [prompt(next(keys)) for _ in range(count)]

    engines = [RolloutEngine(toy, bounded=config.partial) for toy in toys]  # type: ignore[arg-type]
    with (
        RolloutLog(folder / "rollouts", 0, 0.0, 0.0, 0) as log,
        Rollouts(config, BUDGET, engines, offer, 0, log, alive) as made,
    ):
        yield made


def test_engines_and_trainer_take_turns_with_a_budget(tmp_path: Path) -> None:
    toys = [ToyEngine(step=0.001) for _ in range(2)]
    seen: set[int] = set()
    with rollouts(tmp_path, toys) as made:
        for version in range(1, 7):
            batch = made.batch()
            assert not any(toy.running or toy.waiting for toy in toys)
            keys = [group.prompt.key for group in batch.groups]
            assert keys and not seen & set(keys)
            seen.update(keys)
            assert batch.tokens >= BUDGET
            for toy in toys:  # as the master lets them follow
                toy.version = version
            made.publish(version)
            assert not any(toy.running or toy.waiting for toy in toys)
            figures = made.figures(batch)
            assert 0.0 < figures["utilisation"] <= 1.0
            assert (figures["made_tokens"], figures["token_budget"]) == (batch.tokens, BUDGET)
            spans = made.spans()
            assert sum(span.tokens for span in spans) == batch.tokens
            assert {span.version for span in spans} == {version - 1}
    assert not any(toy.updates for toy in toys)
    assert replay(tmp_path / "rollouts/trace").equal


def test_a_whole_iteration_begins_everything_in_one_call_of_each_engine(tmp_path: Path) -> None:
    """What a resumed run's doing the same again rests on."""
    toys = [ToyEngine(step=0.001, max_sequences=2) for _ in range(2)]
    with rollouts(tmp_path, toys, rollouts="whole") as made:
        for iteration in range(3):
            batch = made.batch()
            assert [g.prompt.key for g in batch.groups] == list(
                range(6 * iteration, 6 * iteration + 6)
            )
            for toy in toys:
                assert len(toy.started) == iteration + 1
                assert len(toy.started[-1]) == 6  # three groups of two, far beyond two sequences
                toy.version = iteration + 1
            made.publish(iteration + 1)


def test_an_engine_that_fails_ends_the_run_though_others_could_go_on(tmp_path: Path) -> None:
    def fails(engine: ToyEngine) -> None:
        if engine.steps > 5:
            raise ActorLostError("engine 1 is lost: it was killed")

    toys = [ToyEngine(step=0.001), ToyEngine(step=0.001, fault=fails)]
    with pytest.raises(ActorLostError, match="engine 1"), rollouts(tmp_path, toys) as made:
        for _ in range(3):
            made.batch()


def test_a_death_elsewhere_is_noticed_while_a_batch_is_waited_for(tmp_path: Path) -> None:
    def dead() -> None:
        raise ActorLostError("Megatron rank 1 is lost")

    toys = [ToyEngine(step=0.01, silent=True)]
    with pytest.raises(ActorLostError, match="rank 1"), rollouts(tmp_path, toys, dead) as made:
        made.batch()


def test_what_the_draw_of_prompts_raises_ends_the_run(tmp_path: Path) -> None:
    config = TrainConfig()

    def offer(count: int) -> list[Prompt]:
        raise ValueError("nothing is admitted")

    engine = RolloutEngine(ToyEngine())  # type: ignore[arg-type]
    with (
        RolloutLog(tmp_path / "rollouts", 0, 0.0, 0.0, 0) as log,
        pytest.raises(ValueError, match="nothing is admitted"),
        Rollouts(config, BUDGET, [engine], offer, 0, log, nobody_died) as made,
    ):
        made.batch()
