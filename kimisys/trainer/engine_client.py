"""An engine in an actor, as a rollout sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from kimisys.adapters.ray import Actors
from kimisys.rollout.engine import EngineStats, SegmentOutput, SegmentRequest

_POLL_SECONDS = 30.0  # of one call that waits for outputs


class EngineClient:
    """The EngineActor called `name` among `actors`, from one event loop; it has been started.

    Implements kimisys.rollout.engine.Engine. Every call raises ActorLostError, naming the actor,
    when its process dies or does not answer in time, and what the engine raised there.
    """

    def __init__(self, actors: Actors, name: str) -> None:
        self._actors = actors
        self.name = name
        self._poll: Any = None  # what `stream` waits for; it outlives a stream that is left

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        """Begin them, all before the same step. Raises ValueError for a lease that is not new."""
        await self._call("segments_start", list(segments))

    async def abort(self, leases: Sequence[int]) -> None:
        """They end before the engine's next step, with reason "paused" and what they have made."""
        await self._call("segments_abort", list(leases))

    async def stats(self) -> EngineStats:
        """How full the engine is."""
        stats: EngineStats = await self._call("segments_stats")
        return stats

    async def update(self, version: int, full: bool = False) -> dict[str, Any]:
        """Pull, verify and serve `version`; returns what Engine.update reports. full: pull all of
        it, also where the changes would do. Raises DigestError for what it refused."""
        report: dict[str, Any] = await self._call("update", version, full)
        return report

    async def probe(self, token_ids: Sequence[int], version: int) -> np.ndarray:
        """Log-softmax after each token but the last: float32[tokens - 1, vocabulary]."""
        found: np.ndarray = await self._call("probe", list(token_ids), version)
        return found

    async def steps(self) -> np.ndarray:
        """kimisys.adapters.vllm.steps.STEP[steps of the engine since the last call]."""
        steps: np.ndarray = await self._call("segments_steps")
        return steps

    async def stream(self) -> AsyncIterator[list[SegmentOutput]]:
        """Outputs of all leases as they come; one stream at a time. A later one goes on where one
        was left. Ends when the engine is closed."""
        while True:
            if self._poll is None:
                self._poll = self._actors.begin(self.name, "segments_take", _POLL_SECONDS)
            outputs = await self._polled()
            if outputs is None:
                return
            if outputs:
                yield outputs

    async def _polled(self) -> list[SegmentOutput] | None:
        """The answer to the poll, which is over then; a wait that is cancelled leaves it."""
        limit = _POLL_SECONDS + self._actors.timeout_seconds
        try:
            outputs: list[SegmentOutput] | None
            outputs = await self._actors.answer(self.name, self._poll, limit)
        except Exception:
            self._poll = None
            raise
        self._poll = None
        return outputs

    async def _call(self, method: str, *arguments: Any) -> Any:
        call = self._actors.begin(self.name, method, *arguments)
        return await self._actors.answer(self.name, call)
