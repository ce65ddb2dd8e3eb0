"""Engines that die, hang, answer late, refuse and lie: nothing is lost, nothing wrong is kept."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from driving import BUDGET, Prompts, drive, iterate
from toy_engine import ToyEngine
from virtual_time import run

from kimisys.errors import EngineError, SchedulerError
from kimisys.rollout import Batch, Config, Driver, EngineStats, SegmentOutput, SegmentRequest

QUICK = BUDGET.replace(lease_timeout=10_000)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="kimisys.rollout")


class Died(Exception):
    """What an engine of these tests dies of."""


def dies_after(steps: int) -> Callable[[ToyEngine], None]:
    def fault(engine: ToyEngine) -> None:
        if engine.steps >= steps:
            raise Died(f"after {steps} steps")

    return fault


@pytest.mark.parametrize("config", [BUDGET, Config(groups=8), Config(
    groups=8, deployment="overlap", over_issue=1.5), BUDGET.replace(segment_tokens=5)])  # fmt: skip
def test_an_engine_that_dies_in_the_middle(config: Config, tmp_path: Path) -> None:
    engines = [ToyEngine(), ToyEngine(fault=dies_after(40)), ToyEngine(fault=dies_after(90))]

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 8)
        assert driver.engines == [0]
        assert any(s.reason == "lost" and s.engine == 1 for s in driver.spans)
        return batches

    driver = drive(tmp_path, engines, work, config=config)
    assert {n: str(e) for n, e in driver.failures.items()} == {
        1: "after 40 steps", 2: "after 90 steps",
    }  # fmt: skip
    assert driver.ledger.requeued > 0


def test_all_die_and_one_that_is_added_goes_on(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 2)
        with pytest.raises(Died):
            while True:
                batches.append(await driver.batch())
                await driver.publish(len(batches))
        with pytest.raises(Died):
            await driver.batch()
        begun = {g.id for g in driver.buffer.begun()}
        assert begun
        newest = driver.version
        assert await driver.add(ToyEngine(version=newest)) == 2
        batch = await driver.batch()
        assert begun & {g.id for g in batch.groups}
        return [*batches, batch]

    engines = [ToyEngine(fault=dies_after(150)), ToyEngine(fault=dies_after(100))]
    driver = drive(tmp_path, engines, work)
    assert sorted(driver.failures) == [0, 1]


def test_a_silent_engine_is_left_out(tmp_path: Path) -> None:
    def falls_silent(engine: ToyEngine) -> None:
        engine.silent = engine.steps > 30

    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 4)

    engines = [ToyEngine(), ToyEngine(fault=falls_silent)]
    driver = drive(tmp_path, engines, work, config=QUICK)
    assert isinstance(driver.failures[1], EngineError)
    assert "engine 1 said nothing for" in str(driver.failures[1])


def test_one_lease_that_is_never_heard_of_again(tmp_path: Path) -> None:
    """The engine speaks of all the others: it stays, and the lease is made again."""
    lost: set[int] = set()

    class Loses(ToyEngine):
        def _output(self, lease: int, tokens: list[int], reason: str) -> SegmentOutput:
            output = super()._output(lease, tokens, reason)
            if self.steps == 20 and not lost and not reason:
                lost.add(lease)
            return output

        def _step(self) -> None:
            super()._step()
            self._out = [o for o in self._out if o.lease not in lost]

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 3)
        assert lost
        return batches

    driver = drive(tmp_path, [Loses(step=0.002)], work, config=Config(
        groups=12, lease_timeout=50_000))  # fmt: skip
    assert driver.failures == {}
    assert driver.ledger.requeued == 1


def test_an_engine_that_does_not_stop_when_it_is_told(tmp_path: Path) -> None:
    """Paused leases that go on are dead after the deadline; what they still send is ignored."""
    engines = [ToyEngine(deaf=True), ToyEngine()]
    config = Config(token_budget=200, lease_timeout=5_000)

    async def work(driver: Driver) -> list[Batch]:
        batches = []
        for version in range(1, 4):
            batches.append(await driver.batch())
            while engines[0].running or engines[0].waiting:
                await asyncio.sleep(0.001)
            await driver.publish(version)
        return batches

    driver = drive(tmp_path, engines, work, config=config)
    assert driver.failures == {}


LIES: dict[str, tuple[Callable[[SegmentOutput], SegmentOutput], str]] = {
    "log-probs": (
        lambda o: dataclasses.replace(o, log_probs=[*o.log_probs, -1.0]),
        "has 1 tokens and 2 log-probs",
    ),
    "too many": (
        lambda o: dataclasses.replace(o, token_ids=[1] * 99, log_probs=[-1.0] * 99),
        "has more than the",
    ),
    "version": (lambda o: dataclasses.replace(o, version=7), "was made by version 7"),
    "reason": (lambda o: dataclasses.replace(o, reason="done"), "ends with reason 'done'"),
    "tokens": (lambda o: dataclasses.replace(o, token_ids=[1 << 40]), "more than 31 bits"),
    "negative": (lambda o: dataclasses.replace(o, token_ids=[-2]), "are negative"),
    "lease": (lambda o: dataclasses.replace(o, lease=-5), "never made"),
    "unknown": (lambda o: dataclasses.replace(o, lease=12345 << 32 | 6), "never given"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_engine_that_lies_is_left_out(lie: str, tmp_path: Path) -> None:
    told: list[SegmentOutput] = []

    def lies(output: SegmentOutput) -> SegmentOutput:
        told.append(output)
        honest = len(told) < 60 or not output.token_ids
        return output if honest else LIES[lie][0](output)

    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 4)

    driver = drive(tmp_path, [ToyEngine(), ToyEngine(lies=lies)], work)
    assert list(driver.failures) == [1]
    assert isinstance(driver.failures[1], EngineError)
    assert LIES[lie][1] in str(driver.failures[1]) and "engine 1" in str(driver.failures[1])


def test_an_engine_that_speaks_for_another(tmp_path: Path) -> None:
    engines = [ToyEngine(), ToyEngine()]

    def usurps(output: SegmentOutput) -> SegmentOutput:
        foreign = next(iter(engines[0].running), output.lease)
        return dataclasses.replace(output, lease=foreign)

    engines[1].lies = usurps

    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 3)

    driver = drive(tmp_path, engines, work)
    assert "belongs to engine 0" in str(driver.failures[1])


def test_leases_that_ended_long_ago_are_counted_and_ignored(tmp_path: Path) -> None:

    class Babbles(ToyEngine):
        def _step(self) -> None:
            super()._step()
            old = [lease for call in self.started for lease in call if lease not in self.running]
            known = {r.request.lease for r in self.waiting} | {o.lease for o in self._out}
            for lease in [x for x in old[:3] if x not in known]:
                self._out.append(SegmentOutput(lease, [1], [-1.0], self.version or 0))

    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 3)

    driver = drive(tmp_path, [Babbles()], work)
    assert driver.failures == {}
    assert driver.ledger.late > 100


def test_segments_that_fail_are_tried_again_and_then_dropped(tmp_path: Path) -> None:
    """Prompt keys of which 3 is a multiple (the first token is 0) are refused each time."""
    engine = ToyEngine(refuses=lambda s: s.token_ids[0] == 0)
    batches: list[Batch] = []

    async def work(driver: Driver) -> list[Batch]:
        batches.extend(await iterate(driver, 4))
        return batches

    driver = drive(tmp_path, [engine], work, config=Config(groups=6, max_failures=2))
    dropped = [d for b in batches for d in b.dropped]
    assert dropped
    assert all(d.group.prompt.key % 7 == 0 for d in dropped)
    assert {d.reason for d in dropped} == {"failures"} and {d.error for d in dropped} == {
        "too long"
    }
    assert driver.ledger.dropped["failures"].trajectories >= 2 * len(dropped)


def test_an_engine_that_ends_segments_early_says_so(tmp_path: Path) -> None:
    """Its own context is full before the limit that it was given."""

    class Small(ToyEngine):
        async def start(self, segments: Sequence[SegmentRequest]) -> None:
            await super().start([s for s in segments if s.token_ids[0]])
            full = [s.lease for s in segments if not s.token_ids[0]]
            self._out += [SegmentOutput(lease, reason="length") for lease in full]

    batches: list[Batch] = []

    async def work(driver: Driver) -> list[Batch]:
        batches.append(await driver.batch())
        return batches

    drive(tmp_path, [Small()], work, config=Config(groups=6))
    assert batches[0].dropped
    assert {d.error for d in batches[0].dropped} == {"the engine ended it after 0 of 64 tokens"}


@pytest.mark.parametrize("limit", [4, 12])
def test_all_tokens_came_but_not_the_end(limit: int, tmp_path: Path) -> None:
    """At its limit a trajectory is finished, though its lease died."""

    def swallows(output: SegmentOutput) -> SegmentOutput:
        return dataclasses.replace(output, reason="") if output.reason == "length" else output

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 4)
        assert any(s.reason == "lost" for s in driver.spans)
        return batches

    config = Config(groups=6, lease_timeout=10_000)
    engines = [ToyEngine(), ToyEngine(lies=swallows)]
    drive(tmp_path, engines, work, config=config, prompts=Prompts(limit=limit))


def test_a_call_that_is_not_answered(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 2)

    engines = [ToyEngine(), ToyEngine(stuck=True)]
    driver = drive(tmp_path, engines, work, command_timeout=0.1)
    assert "engine 1 did not answer start() within 0.1 s" in str(driver.failures[1])


def test_an_update_that_fails(tmp_path: Path) -> None:
    class Refuses(ToyEngine):
        async def update(self, version: int) -> None:
            if version == 2:
                raise Died("version 2 does not fit")
            await super().update(version)

    async def work(driver: Driver) -> list[Batch]:
        return await iterate(driver, 4)

    driver = drive(tmp_path, [ToyEngine(), Refuses()], work)
    assert isinstance(driver.failures[1], Died)


def test_the_last_engine_fails_its_update(tmp_path: Path) -> None:
    class Refuses(ToyEngine):
        async def update(self, version: int) -> None:
            raise Died("no")

    async def work(driver: Driver) -> list[Batch]:
        batch = await driver.batch()
        with pytest.raises(Died):
            await driver.publish(1)
        return [batch]

    drive(tmp_path, [Refuses()], work)


def test_an_engine_that_cannot_be_had_from_the_first() -> None:
    class Broken(ToyEngine):
        async def stats(self) -> EngineStats:
            raise Died("no weights")

    async def main() -> None:
        with pytest.raises(Died):
            async with Driver(BUDGET, [ToyEngine(), Broken()], Prompts()):
                raise AssertionError("not entered")
        with pytest.raises(EngineError, match="there is no engine"):
            async with Driver(BUDGET, [], Prompts()) as driver:
                await driver.batch()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_an_engine_of_impossible_size_is_not_there(tmp_path: Path) -> None:
    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 1)
        with pytest.raises(SchedulerError, match="KV cache of 0 tokens"):
            await driver.add(ToyEngine(version=1, kv_capacity=0))
        assert driver.engines == [0]
        return batches + await iterate(driver, 2, 2)  # which waits for no version of it

    driver = drive(tmp_path, [ToyEngine()], work)
    assert driver.failures == {}


def test_closing_waits_for_no_engine_that_holds_on_to_a_call(tmp_path: Path) -> None:
    let_go = asyncio.Event()

    class Clings(ToyEngine):
        async def start(self, segments: Sequence[SegmentRequest]) -> None:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

    async def main() -> None:
        async with Driver(BUDGET, [Clings()], Prompts()) as driver:
            waiting = asyncio.create_task(driver.batch())
            await asyncio.sleep(0.01)
        with pytest.raises(SchedulerError, match="closed"):
            await waiting
        let_go.set()

    run(main())


def test_a_closed_engine_has_failed(tmp_path: Path) -> None:
    engines = [ToyEngine(), ToyEngine()]

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 1)
        engines[1].close()
        return batches + await iterate(driver, 2, 2)

    driver = drive(tmp_path, engines, work)
    assert "the stream of engine 1 ended" in str(driver.failures[1])


@pytest.mark.parametrize("deployment", ["alternate", "overlap"])
def test_engines_come_and_go(deployment: str, tmp_path: Path) -> None:
    first, second, third = (ToyEngine() for _ in range(3))
    third.version = None  # a new one without weights

    async def work(driver: Driver) -> list[Batch]:
        batches = await iterate(driver, 2)
        waiting = asyncio.create_task(driver.batch())
        while not first.running:
            await asyncio.sleep(0.001)
        assert await driver.add(third) == 2
        while not first.running:
            await asyncio.sleep(0.001)
        await asyncio.gather(driver.remove(0), driver.remove(0))
        assert not first.running and driver.engines == [1, 2]
        with pytest.raises(SchedulerError, match="there is no engine 0"):
            await driver.remove(0)
        with pytest.raises(EngineError, match="serves version 9 cannot join"):
            await driver.add(ToyEngine(version=9))
        batches.append(await waiting)
        await driver.publish(3)
        batches += await iterate(driver, 3, 4)
        assert third.started and third.version is not None
        return batches

    config = Config(token_budget=400, deployment=deployment)
    driver = drive(tmp_path, [first, second], work, config=config)
    assert driver.failures == {}
    assert sum(len(call) for call in first.started) > 0
