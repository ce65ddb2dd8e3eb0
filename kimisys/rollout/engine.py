"""What a rollout needs of an engine: segments that begin, stream their tokens, and can be ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SegmentRequest:
    """One lease. token_ids: of the prompt and of the output so far. max_tokens: new ones.
    temperature: 0 is greedy. seed: makes the segment repeatable; None: the engine's own."""

    lease: int
    token_ids: Sequence[int]
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    seed: int | None


@dataclass(frozen=True)
class SegmentOutput:
    """What a lease has made since its last output. log_probs: natural, of each token under the
    distribution that it was sampled from. version: of the weights that made them. reason: "" while
    it goes on, else "stop", "length", "paused" or "failed". error: why it failed."""

    lease: int
    token_ids: list[int]
    log_probs: list[float]
    version: int
    reason: str
    error: str


@dataclass(frozen=True)
class EngineStats:
    """version: served, None before the first. kv_capacity, kv_tokens: tokens that the key-value
    cache holds at most, and now. max_sequences: in one step. running, waiting: sequences."""

    version: int | None
    kv_capacity: int
    max_sequences: int
    kv_tokens: int
    running: int
    waiting: int


class Engine(Protocol):
    """An engine, however far away."""

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        """Begin them, before the next step."""

    async def abort(self, leases: Sequence[int]) -> None:
        """They end soon, with reason "paused". Leases that are not known are ignored."""

    async def stats(self) -> EngineStats:
        """How full it is."""

    async def update(self, version: int) -> None:
        """Serve this version from now on; called when nothing runs."""

    def stream(self) -> AsyncIterator[Sequence[SegmentOutput]]:
        """The outputs of all leases as they come; ends when the engine is closed. Raises what the
        engine failed with."""
