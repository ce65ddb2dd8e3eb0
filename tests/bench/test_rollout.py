"""What the benchmark of rollouts compares with does the same, on cases small enough to look at."""

from __future__ import annotations

import numpy as np
import pytest

from bench.rollout import FIRST_COME, scheduling, simulating
from bench.scheduling.loops import first_loop
from bench.scheduling.plain import PlainScheduler
from bench.scheduling.stream import World, as_answers, as_events, same
from kimisys._core.rollout import (
    ActionKind,
    Config,
    Lots,
    RepetitionConfig,
    RepetitionDetector,
    Scheduler,
)

CONFIGS = {
    "whole": FIRST_COME.replace(groups=30),
    "budget": FIRST_COME.replace(groups=0, token_budget=20_000),
    "budget, a few groups at most": FIRST_COME.replace(groups=3, token_budget=20_000),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("engines", [1, 3, 8])
def test_the_plain_scheduler_answers_the_same(config: Config, engines: int) -> None:
    """Over several iterations, all of them from the first event on."""
    world = World(config, live=120, engines=engines, seed=engines)
    world.fill()
    world.words(8000)
    plain = PlainScheduler(config.token_budget, config.groups)
    for _, call in world.records:
        call(plain)
    actions = Scheduler(config).handle(as_events(world.records))
    assert (actions["kind"] == ActionKind.BATCH).sum() >= 3
    answers = as_answers(actions)
    assert same(answers, plain.answers)
    assert not same(answers[1:], plain.answers)
    changed = [*answers[:-1], (*answers[-1][:5], answers[-1][5] + 1)]
    assert not same(changed, plain.answers)


def test_the_case_of_the_scheduler_checks_and_agrees() -> None:
    case = scheduling("token budget", CONFIGS["budget"], live=100, engines=4, count=3000)
    case.before()
    case.ours()
    assert case.correct()
    [peer] = case.peers.values()
    peer()
    assert case.agree()


@pytest.mark.parametrize("config", [Config(groups=30), Config(token_budget=20_000)], ids=repr)
def test_the_default_policies_are_timed_too(config: Config) -> None:
    case = scheduling("default", config, live=100, engines=4, count=3000, plain=False)
    case.before()
    case.ours()
    assert case.correct()
    assert not case.peers
    assert case.figures()["events"] >= 3000


@pytest.mark.parametrize("engines", [1, 3])
def test_the_simulator_takes_as_long_as_its_steps(engines: int) -> None:
    rng = np.random.default_rng(engines)
    lots = Lots(rng.integers(1, 50, 20), rng.integers(1, 90, 80), samples=4, limit=70)
    case = simulating("small", FIRST_COME.replace(groups=20), engines, lots, naive=True)
    case.ours()
    assert case.correct()
    [peer] = case.peers.values()
    peer()
    assert case.agree()


def test_the_naive_detector_finds_the_same() -> None:
    rng = np.random.default_rng(0)
    config = RepetitionConfig(max_period=20, min_tokens=30, min_repeats=3)
    for period in (1, 7, 20):
        loop = np.tile(rng.integers(0, 100, period), 60)
        text = np.concatenate([rng.integers(0, 100, 200), loop])
        found = RepetitionDetector(config).feed(text)
        assert found is not None
        assert (found.position, found.period) == first_loop(text, config)
    assert first_loop(rng.integers(0, 100, 500), config) is None
