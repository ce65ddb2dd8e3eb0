"""The vLLM engine as an actor: a thin shell, so that Ray stays out of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kimisys.adapters.ray import Actor
from kimisys.adapters.vllm.engine import Engine, EngineConfig, Sample
from kimisys.adapters.vllm.segments import Segments
from kimisys.errors import EngineError
from kimisys.rollout.engine import EngineStats, SegmentOutput, SegmentRequest


class EngineActor(Actor):
    """One engine in a process of its own; `start` comes first."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._segments: Segments | None = None

    async def start(self) -> None:
        """Start vLLM; no weights are read."""
        self._engine = await Engine.start(self._config)
        self._segments = Segments(self._engine)

    async def connect(self, addresses: Sequence[str], verify_every: int) -> None:
        """Plan the pull from the publishers at `addresses`."""
        await self._started().connect(addresses, verify_every=verify_every)

    async def update(self, version: int, full: bool) -> dict[str, Any]:
        """Pull, verify, pack and serve `version`; returns what Engine.update reports."""
        return await self._started().update(version, full=full)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        max_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
        seed: int,
        version: int,
    ) -> list[list[Sample]]:
        """Sample under `version`, and no other."""
        return await self._started().generate(
            prompts, samples, max_tokens, temperature, stop_token_ids, seed, version
        )

    async def probe(self, token_ids: Sequence[int], version: int) -> np.ndarray:
        """Log-softmax after each token but the last: float32[tokens - 1, vocabulary]."""
        return await self._started().probe(token_ids, version)

    async def segments_start(self, segments: Sequence[SegmentRequest]) -> None:
        """Begin them, all before the same step."""
        await self._streaming().start(segments)

    async def segments_abort(self, leases: Sequence[int]) -> None:
        """End them before the next step."""
        await self._streaming().abort(leases)

    async def segments_take(self, seconds: float) -> list[SegmentOutput] | None:
        """What has come since the last call, waited for so long; None when the engine is closed."""
        return await self._streaming().take(seconds)

    async def segments_stats(self) -> EngineStats:
        """How full the engine is."""
        return await self._streaming().stats()

    async def segments_steps(self) -> np.ndarray:
        """kimisys.adapters.vllm.steps.STEP[steps since the last call]."""
        return self._streaming().steps()

    async def close(self) -> None:  # type: ignore[override]
        """End the engine and its worker processes."""
        if self._engine is not None:
            await self._engine.close()

    def _streaming(self) -> Segments:
        self._started()
        assert self._segments is not None
        return self._segments

    def _started(self) -> Engine:
        if self._engine is None:
            raise EngineError("the engine is not started: call start first")
        return self._engine
