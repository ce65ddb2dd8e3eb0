"""A real vLLM engine in a Ray actor, as a rollout sees it: segments, streams, updates, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_checkpoints import (
    memory_buffers,
    memory_layout,
    random_model,
    reference,
    weights,
    write_config,
)
from transformers import PreTrainedModel

from kimisys.adapters.ray import ActorLostError, Actors
from kimisys.adapters.vllm.engine import EngineConfig
from kimisys.adapters.vllm.environment import environment
from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.errors import EngineError, VersionError
from kimisys.rollout.engine import SegmentOutput, SegmentRequest
from kimisys.trainer.engine_actor import EngineActor
from kimisys.trainer.engine_client import EngineClient
from kimisys.trainer.processes import processes

NAME = "engine 0"
PROMPTS = [[3, 1, 4, 1, 5, 9], [7] * 3, list(range(29)), [11]]
LENGTH = 60
SECONDS = 60.0


def engine_process() -> int:
    """The one actor's, among what this process has started."""
    started = psutil.Process().children(recursive=True)
    (found,) = [one.pid for one in started if "ray::EngineActor" in "".join(one.cmdline())]
    return found


@dataclass
class Run:
    """An engine actor that serves what was published."""

    actors: Actors
    publisher: Publisher
    folder: Path

    def publish(self, version: int) -> None:
        self.publisher.publish(version, memory_buffers(weights(self.model(version))))

    def model(self, version: int) -> PreTrainedModel:
        return random_model(self.folder, seed=version)

    def call(self, method: str, *arguments: object) -> object:
        return self.actors.wait({NAME: self.actors.begin(NAME, method, *arguments)})[NAME]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = write_config(tmp_path_factory.mktemp("model"), tied=True)
    live = memory_layout(weights(random_model(folder, seed=0)))
    with processes(SECONDS, "") as (actors, sockets):
        config = EngineConfig(folder, max_length=128, threads=1)
        actors.spawn(NAME, EngineActor, environment(1), config)
        with Publisher(live, snapshot_layout(live, None), 0, sockets / "rank0") as publisher:
            run = Run(actors, publisher, folder)
            run.call("start")
            run.call("connect", [str(publisher.address)], 16)
            run.publish(1)
            run.call("update", 1, False)
            yield run


def requests(prompts: Sequence[Sequence[int]], first: int, length: int) -> list[SegmentRequest]:
    """Greedy, with leases from `first` on."""
    return [
        SegmentRequest(first + i, prompt, length, 0.0, (), None) for i, prompt in enumerate(prompts)
    ]


async def collect(
    stream: AsyncIterator[Sequence[SegmentOutput]],
    into: dict[int, list[SegmentOutput]],
    enough: Callable[[], bool],
) -> None:
    """Outputs by lease, until there are enough."""
    async for outputs in stream:
        for output in outputs:
            into.setdefault(output.lease, []).append(output)
        if enough():
            return


def tokens(outputs: Sequence[SegmentOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_trajectory_goes_on_over_aborts_streams_and_versions(run: Run) -> None:
    """Streams are left and taken up again: nothing is lost, nothing comes twice."""
    groups = run.call("generate", PROMPTS, 1, LENGTH, 0.0, [], 0, 1)
    whole = [one.token_ids for (one,) in groups]  # type: ignore[attr-defined]
    count = len(PROMPTS)
    seen: dict[int, list[SegmentOutput]] = {}

    async def rollout() -> dict[str, object]:
        client = EngineClient(run.actors, NAME)
        await client.start(requests(PROMPTS, 0, LENGTH))
        await collect(client.stream(), seen, lambda: len(seen) == count)
        await client.abort([*range(count), 777])
        async with aclosing(client.stream()) as stream:
            await collect(stream, seen, lambda: all(seen[i][-1].reason for i in range(count)))
        for i, prompt in enumerate(PROMPTS):
            begun = tokens(seen[i])
            (request,) = requests([prompt + begun], count + i, LENGTH - len(begun))
            await client.start([request])
        waiting = asyncio.ensure_future(anext(client.stream()))
        await asyncio.sleep(0)
        waiting.cancel()
        ended = range(count, 2 * count)
        await collect(
            client.stream(), seen, lambda: all(i in seen and seen[i][-1].reason for i in ended)
        )
        run.publish(2)
        report = await client.update(2)
        await client.start(requests([[*PROMPTS[0], *whole[0]]], 100, 20))
        await collect(client.stream(), seen, lambda: 100 in seen and bool(seen[100][-1].reason))
        with pytest.raises(VersionError, match="only increase"):
            await client.update(1)
        return report

    report = asyncio.run(rollout())
    assert report["version"] == 2 and report["digests"]
    for i in range(count):
        assert seen[i][-1].reason == "paused" and seen[count + i][-1].reason == "length"
        assert tokens(seen[i]) + tokens(seen[count + i]) == whole[i]
    assert {output.version for lease in seen if lease != 100 for output in seen[lease]} == {1}
    (final,) = {output.version for output in seen[100]}
    assert final == 2
    given, made = [*PROMPTS[0], *whole[0]], tokens(seen[100])
    rows = reference(run.model(2), given + made)[len(given) - 1 :]
    found = [value for output in seen[100] for value in output.log_probs]
    np.testing.assert_allclose(found, rows[np.arange(20), made], atol=1e-4)


def test_an_idle_engine_tells_how_it_is(run: Run) -> None:
    async def ask() -> None:
        client = EngineClient(run.actors, NAME)
        stats = await client.stats()
        assert (stats.kv_tokens, stats.running, stats.waiting) == (0, 0, 0)
        assert stats.kv_capacity > 100_000 and stats.max_sequences == 512
        steps = await client.steps()
        assert steps["new_tokens"].sum() > 2 * LENGTH and (steps["seconds"] > 0).all()
        assert len(await client.steps()) == 0
        assert stats.version is not None
        probed = await client.probe(PROMPTS[0], stats.version)
        expected = reference(run.model(stats.version), PROMPTS[0])
        np.testing.assert_allclose(probed, expected, atol=1e-4)
        with pytest.raises(ValueError, match="leases"):
            await client.start([*requests([[1]], 5000, 1), *requests([[1]], 5000, 1)])

    asyncio.run(ask())


def test_an_engine_that_hangs_and_then_dies_is_named(run: Run) -> None:
    """The last test of the file, as the engine is gone afterwards."""
    pid = engine_process()

    async def lose() -> None:
        client = EngineClient(run.actors, NAME)
        await client.start(requests(PROMPTS, 9000, LENGTH))
        os.kill(pid, signal.SIGSTOP)
        run.actors._timeout = 1.0
        with pytest.raises(ActorLostError, match=rf"no answer from {NAME} within 1 s"):
            await client.stats()
        stream = client.stream()
        waiting = asyncio.ensure_future(collect(stream, {}, lambda: False))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorLostError, match=f"{NAME} is lost"):
            await waiting
        run.actors._timeout = SECONDS
        with pytest.raises(ActorLostError, match=f"{NAME} is lost"):
            await client.start(requests([[1]], 9100, 1))

    asyncio.run(lose())


def test_the_stream_of_an_engine_that_closes_ends(run: Run) -> None:
    """One that never started says so."""
    name = "engine 1"
    config = EngineConfig(run.folder, max_length=128, threads=1)
    run.actors.spawn(name, EngineActor, environment(1), config)

    async def close() -> None:
        client = EngineClient(run.actors, name)
        with pytest.raises(EngineError, match="not started"):
            await client.stats()
        await run.actors.answer(name, run.actors.begin(name, "start"))
        stream = asyncio.ensure_future(collect(client.stream(), {}, lambda: False))
        await asyncio.sleep(0.1)
        await run.actors.answer(name, run.actors.begin(name, "close"))
        await asyncio.wait_for(stream, SECONDS)

    asyncio.run(close())
