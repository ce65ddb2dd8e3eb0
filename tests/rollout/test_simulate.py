"""Simulations, bounds and offline schedules from Python. That the simulator's jumps are right, and
the bounds and the search, is tested in C++ against token-by-token references and brute force."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys._core.rollout import (
    SPAN,
    Config,
    EndReason,
    EngineModel,
    Lots,
    Outage,
    Simulation,
    bounds,
    offline,
    simulate,
)
from kimisys.errors import SchedulerError

FOREVER = 1 << 50
ENGINE = EngineModel(step=1e-3, sequence=1e-5, kv_token=1e-8, kv_capacity=2000, max_sequences=16)


def lots(groups: int, samples: int = 4, seed: int = 0, limit: int = 400) -> Lots:
    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(60), 1.0, groups * samples).astype(np.int64) + 1
    return Lots(random.integers(1, 50, groups), lengths, samples=samples, limit=limit)


def whole(groups: int = 8, engines: int = 3, iterations: int = 2, **fields: Any) -> Simulation:
    config = Config(groups=groups, lease_timeout=FOREVER, **fields)
    return Simulation(config=config, engines=[ENGINE] * engines, iterations=iterations)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 12),
    engines=st.integers(1, 5),
    placement=st.sampled_from(["group_round_robin", "least_loaded", "kv_aware", "sticky"]),
    order=st.sampled_from(["fifo", "longest_first", "probe_first"]),
    concurrency=st.sampled_from(["fixed", "kv"]),
    oracle=st.booleans(),
)
def test_no_policy_beats_the_bounds_and_all_tokens_are_there(
    seed: int, groups: int, engines: int, placement: str, order: str, concurrency: str, oracle: bool
) -> None:
    given_lots = lots(2 * groups, seed=seed)
    config = Config(
        groups=groups, placement=placement, order=order, concurrency=concurrency,
        lease_timeout=FOREVER,
    )  # fmt: skip
    world = Simulation(
        config=config, engines=[ENGINE] * engines, iterations=2, train_base=1.0, oracle=oracle
    )
    outcome = simulate(world, given_lots, spans=True)
    wanted = np.minimum(given_lots.lengths, given_lots.limit).reshape(2, -1).sum(1)
    assert outcome.tokens.tolist() == wanted.tolist()
    assert outcome.groups.tolist() == [groups, groups]
    assert outcome.decoded == wanted.sum() == outcome.spans["tokens"].sum()
    assert outcome.ledger.trained.tokens == wanted.sum()
    assert outcome.train_seconds.tolist() == [1.0, 1.0]
    floor = bounds(world, given_lots)
    assert (outcome.rollout_seconds >= np.maximum(floor.area, floor.path) - 1e-9).all()
    assert outcome.seconds >= floor.seconds - 1e-9


def test_offline_schedules_have_each_trajectory_once_and_lie_between() -> None:
    world, given_lots = whole(groups=20, engines=4), lots(40)
    found = offline(world, given_lots, 2000, seed=3)
    for schedule in found.iterations:
        assert sorted(np.concatenate(schedule.lists)) == list(range(80))
        assert len(schedule.admit) == len(schedule.lists) == 4
        assert set(schedule.admit) <= {"at_once", "held"}
    assert 0 < found.evaluations < 2 * 2010
    assert bounds(world, given_lots).seconds < found.seconds
    plain = whole(
        groups=20, engines=4, placement="group_round_robin", order="fifo", concurrency="fixed"
    )
    assert found.seconds < simulate(plain, given_lots).seconds
    assert offline(world, given_lots, 2000, seed=3).seconds == found.seconds
    assert offline(world, given_lots, 0).evaluations == 0


def test_a_slack_engine_takes_what_the_model_says() -> None:
    world = Simulation(config=Config(groups=1), engines=[EngineModel()], train_token=0.5)
    outcome = simulate(world, Lots([100], [10, 30], samples=2, limit=20))
    kv = 100 * 30 + sum(range(10)) + sum(range(20))
    expected = 20 * 4e-3 + 30 * 60e-6 + kv * 20e-9 + 200 * 20e-6
    assert outcome.rollout_seconds == pytest.approx([expected], rel=1e-12)
    assert outcome.seconds == pytest.approx(expected + 15, rel=1e-12)
    assert outcome.busy == pytest.approx([expected], rel=1e-12)


def test_spans_are_records_and_empty_unless_asked_for() -> None:
    world, given_lots = whole(), lots(16)
    assert simulate(world, given_lots).spans.shape == (0,)
    spans = simulate(world, given_lots, spans=True).spans
    assert spans.dtype == SPAN
    assert (spans["end"] > spans["start"]).all()
    assert set(spans["engine"]) == {0, 1, 2}
    cut = spans[spans["reason"] == EndReason.LENGTH]
    assert len(cut) == (given_lots.lengths > given_lots.limit).sum() > 0


def test_equal_arguments_give_equal_outcomes() -> None:
    first, again = simulate(whole(), lots(16)), simulate(whole(), lots(16))
    assert (first.digest, first.seconds) == (again.digest, again.seconds)
    assert first.digest != simulate(whole(), lots(16, seed=1)).digest


def test_partial_rollouts_overlap_and_outages_run() -> None:
    config = Config(deployment="overlap", token_budget=3000, max_staleness=2, lease_timeout=FOREVER)
    world = Simulation(
        config=config, engines=[ENGINE] * 2, iterations=4, train_base=0.2,
        outages=[Outage(engine=1, time=0.1, until=0.5)],
    )  # fmt: skip
    outcome = simulate(world, lots(400), spans=True)
    assert len(outcome.tokens) == 4
    assert outcome.ledger.requeued > 0
    assert outcome.offered >= outcome.groups.sum()
    starts = outcome.spans["start"][outcome.spans["engine"] == 1]
    assert not ((starts >= 0.1) & (starts < 0.5)).any()
    assert (starts >= 0.5).any()


def test_the_oracle_is_told_lengths() -> None:
    # The probes of the first wave tell nothing of the rest: without the oracle it is by the offers.
    given_lots = lots(60, samples=1)
    shown = np.minimum(given_lots.lengths, given_lots.limit)

    def waiting(oracle: bool) -> float:
        world = whole(groups=60, engines=1, iterations=1, order="longest_first")
        told = Simulation(config=world.config, engines=world.engines, oracle=oracle)
        spans = simulate(told, given_lots, spans=True).spans
        later = spans["group"][spans["start"] > 0].astype(np.int64)
        assert 0 < len(later) < 60
        return float(shown[later].mean())

    assert waiting(oracle=True) < 0.8 * waiting(oracle=False)


def test_lots_take_integers_alone_and_cannot_be_changed() -> None:
    made = Lots(np.array([5, 6], np.int32), np.array([1, 2], np.uint8), samples=1, limit=9)
    assert made.lengths.dtype == np.int64
    assert made.prompt_tokens.tolist() == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        made.lengths[0] = 3
    with pytest.raises(SchedulerError, match="lengths are of dtype float64"):
        Lots([5], np.array([2.5]), samples=1, limit=9)  # type: ignore[arg-type]
    with pytest.raises(SchedulerError, match="lengths are of dtype float64"):
        Lots([5], [2.5], samples=1, limit=9)  # type: ignore[list-item]
    with pytest.raises(SchedulerError, match="2 dimensions"):
        Lots([5], np.ones((1, 1), np.int64), samples=1, limit=9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engines": []}, "0 engines"),
        ({"engines": [EngineModel(step=0)]}, "engine 0: step is 0"),
        ({"engines": [EngineModel(kv_capacity=100)]}, "grows to .* tokens"),
        ({"iterations": 3}, "wants 8 more groups in iteration 3 of 3"),
        ({"train_base": float("nan")}, "train_base is nan"),
        ({"outages": [Outage(engine=7, time=0, until=1)]}, "outage of engine 7"),
        ({"report_interval": 800000.0, "config": Config(groups=8)}, "report_interval is 800000"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"config": Config(groups=8, lease_timeout=FOREVER)}
    fields |= {"engines": [ENGINE], "iterations": 2, **change}
    with pytest.raises(SchedulerError, match=words):
        simulate(Simulation(**fields), lots(16))


def test_bounds_are_for_whole_iterations() -> None:
    budget = Simulation(config=Config(token_budget=100), engines=[ENGINE])
    with pytest.raises(SchedulerError, match="token_budget 0"):
        bounds(budget, lots(8))
    with pytest.raises(SchedulerError, match="token_budget 0"):
        offline(budget, lots(8), 10)
    with pytest.raises(SchedulerError, match="evaluations is -1"):
        offline(whole(), lots(16), -1)


def test_other_threads_run_meanwhile() -> None:
    done = threading.Event()

    def search() -> None:
        offline(whole(groups=100, engines=8, iterations=1), lots(100), 5000)
        done.set()

    worker = threading.Thread(target=search)
    worker.start()
    # With the lock held throughout the search no more than a few fit before and after it.
    rounds = 0
    while not done.wait(0.001):
        rounds += 1
    worker.join()
    assert rounds > 3


def test_all_print_themselves() -> None:
    assert repr(EngineModel(step=0.5)).startswith("EngineModel(step=0.5, sequence=6e-05")
    assert repr(Outage(engine=1, time=2, until=3)) == "Outage(engine=1, time=2, until=3)"
    assert "config=Config(groups=8" in repr(whole())
    assert repr(lots(2)) == "Lots(groups: 2, samples=4, limit=400)"
    assert repr(simulate(whole(), lots(16))).startswith("Outcome(seconds=")
