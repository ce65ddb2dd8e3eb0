"""The driver over engines that generate: what it hands over is what one engine alone would have
made, whatever was cut, moved and continued."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from driving import BUDGET, Prompts, drive, iterate
from toy_engine import ToyEngine, prompt
from virtual_time import run

from kimisys.errors import SchedulerError
from kimisys.rollout import Batch, Config, Driver, Prompt, RepetitionConfig

CONFIGS = {
    "budget": BUDGET,
    "budget, groups": Config(token_budget=500, groups=4),
    "budget, chunks": Config(token_budget=500, segment_tokens=7, live_limit=12),
    "budget, stale": Config(token_budget=300, max_staleness=1, staleness="drop"),
    "whole": Config(groups=8),
    "whole, round robin": Config(
        groups=8, placement="group_round_robin", order="fifo", concurrency="fixed"
    ),
    "whole, over-issue": Config(groups=8, over_issue=2.0),
    "overlap": Config(token_budget=500, groups=6, deployment="overlap"),
    "overlap, drain": Config(groups=8, deployment="overlap", update="drain", over_issue=1.5),
    "overlap, admission": Config(
        groups=6, deployment="overlap", max_staleness=2, staleness="admission"
    ),
    "sticky": Config(token_budget=500, placement="sticky", order="longest_first"),
    "least loaded": Config(token_budget=500, placement="least_loaded", concurrency="fixed"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_batches_of_whole_trajectories(config: Config, tmp_path: Path) -> None:
    engines = [ToyEngine(max_sequences=n) for n in (4, 8, 3)]

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 8)
        assert all(b.groups for b in batches)
        for number, batch in enumerate(batches):
            assert batch.number == batch.version == number
            assert batch.seconds >= 0
            if config.groups:
                assert len(batch.groups) <= config.groups
            if not config.token_budget:
                assert len(batch.groups) == config.groups
            if config.max_staleness >= 0:
                oldest = min(t.versions.min() for g in batch.groups for t in g.trajectories)
                assert number - oldest <= config.max_staleness
        assert [g.id for g in driver.buffer.handed_over()] == [g.id for g in batches[-1].groups]
        return batches

    driver = drive(tmp_path, engines, work, config=config)
    assert driver.failures == {}
    assert all(engine.most <= engine.max_sequences for engine in engines)
    for engine in engines:
        assert engine.updates == sorted(set(engine.updates))
        if config.deployment == "alternate":
            assert engine.updates == list(range(1, 9))


def test_a_budget_is_spent_and_the_unfinished_go_on(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        batches = []
        for version in range(1, 6):
            batches.append(await driver.batch())
            begun = driver.buffer.begun()
            assert all(not g.complete for g in begun)
            await driver.publish(version)
            # Between a batch and the next nothing runs.
            assert driver.scheduler.counts().running == 0
        spans = driver.take_spans()
        assert driver.spans == []
        assert sum(s.tokens for s in spans) == sum(b.tokens for b in batches)
        assert {s.reason for s in spans} <= {"stop", "length", "paused"}
        assert all(s.end >= s.start for s in spans)
        # In-flight sequences may each make one step more.
        assert all(500 <= b.tokens <= 500 + 2 * 16 * 2 for b in batches)
        versions = [t.versions for b in batches for g in b.groups for t in g.trajectories]
        assert any(len(np.unique(v)) > 1 for v in versions)
        return batches

    driver = drive(tmp_path, [ToyEngine(), ToyEngine()], work)
    assert driver.ledger.continued > 0


def test_versions_are_those_of_the_iterations(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 3)
        for number, batch in enumerate(batches):
            for group in batch.groups:
                assert all((t.versions == number).all() for t in group.trajectories)
        return batches

    drive(tmp_path, [ToyEngine()], work, config=Config(groups=4))


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    def once(folder: Path) -> list[list[int]]:
        folder.mkdir()
        made: list[list[int]] = []

        async def work(driver: Driver) -> list[Batch]:
            batches = await iterate(driver, 3)
            made.extend(t.token_ids.tolist() for b in batches for g in b.groups
                        for t in g.trajectories)  # fmt: skip
            return batches

        engines = [ToyEngine(), ToyEngine()]
        drive(folder, engines, work, config=CONFIGS["whole, round robin"], seed=5)
        # Each engine got all of its share of an iteration in one call.
        assert [len(e.started) for e in engines] == [3, 3]
        return made

    assert once(tmp_path / "a") == once(tmp_path / "b")


def test_loops_are_stopped(tmp_path: Path) -> None:
    engine = ToyEngine(loops=lambda first: first % 3 == 0)
    prompts = Prompts(most=30, limit=1000)
    found: list[int] = []

    async def main() -> None:
        repetition = RepetitionConfig(max_period=8, min_tokens=24)
        async with Driver(Config(groups=20), [engine], prompts, repetition=repetition) as driver:
            batch = await driver.batch()
            for trajectory in (t for g in batch.groups for t in g.trajectories):
                assert (trajectory.reason == "repetition") == (trajectory.token_ids[0] % 3 == 0)
                if trajectory.reason == "repetition":
                    found.append(len(trajectory))
            assert driver.ledger.ended["repetition"].trajectories == len(found)
            assert not engine.running

    run(main())
    assert found and max(found) < 60


def test_cancelled_calls_lose_nothing(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        batches = []
        for version in range(1, 6):
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(driver.batch(), 0.001)
            batches.append(await driver.batch())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await driver.publish(version)
        return batches

    drive(tmp_path, [ToyEngine(), ToyEngine()], work)


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        first = asyncio.create_task(driver.batch())
        await asyncio.sleep(0)
        with pytest.raises(SchedulerError, match="one batch at a time"):
            await driver.batch()
        return [await first]

    drive(tmp_path, [ToyEngine()], work)


def test_closing_in_the_middle_stops_the_engines(tmp_path: Path) -> None:
    engines = [ToyEngine(), ToyEngine()]

    async def work(driver: Driver) -> list[Batch]:
        waiting = asyncio.create_task(driver.batch())
        while not engines[1].running:
            await asyncio.sleep(0)
        await driver.close()
        with pytest.raises(SchedulerError, match="closed"):
            await waiting
        with pytest.raises(SchedulerError, match="closed"):
            await driver.batch()
        return []

    drive(tmp_path, engines, work, config=Config(groups=100))
    assert not any(e.running or e.waiting for e in engines)


def test_prompts_that_come_late_or_not_at_all(tmp_path: Path) -> None:
    prompts = Prompts(most=6)

    async def work(driver: Driver) -> list[Batch]:
        with pytest.raises(SchedulerError, match="no prompts are left: 6 of 6 groups"):
            await driver.batch()
        prompts.most = 10
        first = await driver.batch()
        assert len(first.groups) == 8
        with pytest.raises(SchedulerError, match="no prompts are left: 2 of 2 groups"):
            await driver.batch()
        assert [p.key for p in driver.buffer.unfinished()] == [8, 9]
        assert [g.prompt.key for g in driver.buffer.complete()] == [8, 9]
        return [first]

    config = Config(groups=8, deployment="overlap")
    drive(tmp_path, [ToyEngine()], work, config=config, prompts=prompts)


def test_what_prompts_raises_reaches_the_caller(tmp_path: Path) -> None:
    calls = iter([ValueError("the data set is gone")])
    prompts = Prompts()

    def offer(count: int) -> list[Prompt]:
        for error in calls:
            raise error
        return list(prompts(count))

    async def main() -> None:
        async with Driver(Config(groups=3), [ToyEngine()], offer) as driver:
            with pytest.raises(ValueError, match="data set"):
                await driver.batch()
            assert len((await driver.batch()).groups) == 3

    run(main())


def test_two_thousand_trajectories(tmp_path: Path) -> None:
    engines = [ToyEngine(max_sequences=64) for _ in range(4)]
    trained: list[int] = []

    async def work(driver: Driver) -> list[Batch]:
        batches = []
        while sum(len(b.groups) for b in batches) < 500:
            batches += await iterate(driver, 1, len(batches) + 1)
        trained.extend(len(t) for b in batches for g in b.groups for t in g.trajectories)
        return batches

    drive(tmp_path, engines, work, config=Config(token_budget=4000), prompts=Prompts(samples=4))
    assert len(trained) >= 2000


def test_bad_prompts_are_refused() -> None:
    for bad in ({"samples": 0}, {"limit": 0}):
        with pytest.raises(SchedulerError, match="prompt 3 has"):
            prompt(3, **bad)
    with pytest.raises(SchedulerError, match="prompt 1 has 0 tokens"):
        Prompt(1, [], 1, 1)
