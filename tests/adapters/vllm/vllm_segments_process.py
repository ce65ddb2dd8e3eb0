"""An Engine and its Segments in a process of their own, for tests; see vllm_engine_process.

Run as a script this file is the child.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_engine_process import EngineProcess, serve

from kimisys.adapters.vllm.engine import Engine
from kimisys.adapters.vllm.segments import Segments
from kimisys.rollout.engine import EngineStats, SegmentOutput, SegmentRequest

TAKE_SECONDS = 0.2


@dataclass
class Made:
    """What a lease has made so far, as its outputs told. outputs: how many there were."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str = ""
    error: str = ""
    outputs: int = 0


class SegmentsProcess(EngineProcess):
    """The parent's side. made: by lease."""

    script = __file__

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made: dict[int, Made] = {}
        self._lease = 0

    def start(self, requests: Sequence[dict[str, Any]]) -> list[int]:
        """Begins them, each under a new lease; they are fields of SegmentRequest."""
        leases = list(range(self._lease, self._lease + len(requests)))
        self._lease += len(requests)
        self.made |= {lease: Made() for lease in leases}
        given = [{"lease": lease, **one} for lease, one in zip(leases, requests, strict=True)]
        self.call("start", given)
        return leases

    def take(self) -> list[int] | None:
        """Adds the next batch of outputs to `made`: whose they were; None when there is no more."""
        outputs = self.call("take", TAKE_SECONDS)
        if outputs is None:
            return None
        seen = [output["lease"] for output in outputs]
        assert len(seen) == len(set(seen)), "a lease is twice in a batch"
        for output in (SegmentOutput(**output) for output in outputs):
            made = self.made[output.lease]
            assert not made.reason, "an output after the last"
            assert len(output.token_ids) == len(output.log_probs)
            made.token_ids += output.token_ids
            made.log_probs += output.log_probs
            made.versions += [output.version] * len(output.token_ids)
            made.reason, made.error = output.reason, output.error
            made.outputs += 1
        return seen

    def finish(self, leases: Iterable[int]) -> list[Made]:
        """Takes until all of them have ended."""
        waiting = list(leases)
        self.until(lambda: all(self.made[lease].reason for lease in waiting))
        return [self.made[lease] for lease in waiting]

    def until(self, reached: Callable[[], bool]) -> None:
        """Takes until `reached`."""
        for _ in range(10_000):
            if reached():
                return
            assert self.take() is not None, "the engine is closed"
        raise AssertionError("what was waited for did not come")

    def stats(self) -> EngineStats:
        return EngineStats(**self.call("stats"))


class Served:
    """The child's side: an Engine's methods, and those of Segments in terms of JSON."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._segments = engine, Segments(engine)
        self.take, self.abort = self._segments.take, self._segments.abort
        self.stats = self._segments.stats

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            request["stop_token_ids"] = tuple(request.get("stop_token_ids", ()))
            request.setdefault("seed", None)
        await self._segments.start([SegmentRequest(**request) for request in requests])

    async def steps(self) -> dict[str, list[Any]]:
        found = self._segments.steps()
        assert found.dtype.names is not None
        return {name: found[name].tolist() for name in found.dtype.names}

    async def affinities(self) -> list[list[int]]:
        """Of every thread of this process."""
        threads = os.listdir("/proc/self/task")
        return [sorted(os.sched_getaffinity(int(thread))) for thread in threads]

    async def break_model(self) -> None:
        """The next step finds a model that fails."""

        def take_away(llm: Any) -> None:
            def fail(*_: Any, **__: Any) -> None:
                raise MemoryError("no room for activations")

            llm.engine_core.engine_core.model_executor.execute_model = fail

        self._engine.loop.shared(take_away)

    async def stream_of_closed(self) -> list[list[SegmentOutput]]:
        """What the stream still tells after the engine was closed."""
        await self._engine.close()
        return [outputs async for outputs in self._segments.stream()]


if __name__ == "__main__":
    channel = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is not an answer
    asyncio.run(serve(json.loads(sys.argv[1]), channel, Served))
