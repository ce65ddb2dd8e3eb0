"""What stands between the driver and an engine: who follows versions and how, and how busy it
was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from kimisys.adapters.ray import ActorLostError
from kimisys.errors import DigestError
from kimisys.rollout import EngineStats, SegmentOutput, SegmentRequest
from kimisys.trainer.rollout_engine import Followed, Following, RolloutEngine
from kimisys.trainer.watch import EngineMismatchError, Watch

REPORT = {"nbytes": 100, "digests": 3, "wire_nbytes": 40, "full_nbytes": 90}
EXPECTED = np.full((3, 16), -1.0, np.float32)


class ScriptedClient:
    """Refuses what arrives by deltas `damaged` times, and in full `damaged` - 1 times."""

    def __init__(self, damaged: int = 0, says: float = -1.0) -> None:
        self.damaged, self.says = damaged, says
        self.asked: list[tuple[int, bool]] = []

    async def update(self, version: int, full: bool = False) -> dict[str, Any]:
        self.asked.append((version, full))
        if len(self.asked) <= self.damaged:
            raise DigestError(f"version {version}: 'w' is not what was published")
        return REPORT

    async def probe(self, tokens: Sequence[int], version: int) -> np.ndarray:
        return np.full((3, 16), self.says, np.float32)

    async def stats(self) -> EngineStats:
        return EngineStats(version=1, kv_capacity=64, max_sequences=2)

    async def start(self, segments: Sequence[SegmentRequest]) -> None: ...

    async def stream(self) -> AsyncIterator[list[SegmentOutput]]:
        yield [SegmentOutput(1, [5], [-0.5], 1), SegmentOutput(2, [5], [-0.5], 1, "stop")]
        yield [SegmentOutput(1, [6], [-0.5], 1, "length")]


def follow(following: Following, client: ScriptedClient, version: int) -> None:
    asyncio.run(following(client, version))  # type: ignore[arg-type]


def test_an_engine_that_follows_is_counted_and_compared() -> None:
    watch = Watch(1e-3)
    following = Following(watch, [1, 2, 3, 4])
    following.expect(2, EXPECTED)
    client = ScriptedClient()
    follow(following, client, 2)
    assert client.asked == [(2, False)]
    assert (watch.syncs, watch.nbytes, watch.wire_nbytes, len(watch.sync_seconds)) == (
        1,
        100,
        40,
        1,
    )
    found = following.wait(1, lambda: None, 1.0)
    assert found.gap == 0.0 and found.seconds > 0


def test_a_damaged_version_is_pulled_in_full() -> None:
    watch = Watch(1e-3)
    following = Following(watch, [1, 2, 3, 4])
    following.expect(2, EXPECTED)
    client = ScriptedClient(damaged=1)
    follow(following, client, 2)
    assert client.asked == [(2, False), (2, True)]
    assert watch.digest_mismatches == 1
    with pytest.raises(DigestError):
        follow(following, ScriptedClient(damaged=2), 2)


def test_an_engine_that_computes_something_else_is_refused() -> None:
    following = Following(Watch(1e-3), [1, 2, 3, 4])
    following.expect(2, EXPECTED)
    with pytest.raises(EngineMismatchError, match="version 2"):
        follow(following, ScriptedClient(says=-1.5), 2)


def test_a_version_is_not_overwritten_while_an_engine_may_read_it() -> None:
    following = Following(Watch(1e-3), [1, 2, 3, 4])
    assert following.wait(2, lambda: None, 0.0) == Followed()  # nothing was published yet
    following.expect(2, EXPECTED)
    follow(following, ScriptedClient(), 2)
    with pytest.raises(ActorLostError, match="1 of 2 engines did not follow to version 2"):
        following.wait(2, lambda: None, 0.0)

    def dead() -> None:
        raise ActorLostError("engine 1 is lost")

    with pytest.raises(ActorLostError, match="engine 1 is lost"):
        following.wait(2, dead, 60.0)


def test_an_engine_that_others_let_follow_does_nothing() -> None:
    client = ScriptedClient()
    asyncio.run(RolloutEngine(client).update(7))  # type: ignore[arg-type]
    assert client.asked == []


def test_an_engine_without_bounds_queues_for_itself() -> None:
    async def stats(bounded: bool) -> EngineStats:
        return await RolloutEngine(ScriptedClient(), None, bounded).stats()  # type: ignore[arg-type]

    assert asyncio.run(stats(True)).max_sequences == 2
    unbounded = asyncio.run(stats(False))
    assert min(unbounded.max_sequences, unbounded.kv_capacity) > 1 << 30
    assert unbounded.version == 1


def test_it_is_busy_from_the_first_start_to_the_last_end() -> None:
    async def run() -> None:
        engine = RolloutEngine(ScriptedClient())  # type: ignore[arg-type]
        assert engine.busy_seconds == 0.0
        await engine.start([SegmentRequest(lease, [1], 4) for lease in (1, 2)])
        busy = []
        async for _ in engine.stream():
            first = engine.busy_seconds
            await asyncio.sleep(0.01)
            busy.append((first, engine.busy_seconds))
        assert busy[0][1] >= busy[0][0] + 0.01  # one lease is left
        assert busy[1][0] == busy[1][1] >= 0.01

    asyncio.run(run())
