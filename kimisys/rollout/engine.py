"""The engine protocol: all that rollouts ask of an inference engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

END_REASONS = ("stop", "length", "paused", "failed")


@dataclass(frozen=True)
class SegmentRequest:
    """One segment to make.

    lease: of the scheduler, never reused.
    token_ids: the prompt and the output so far.
    max_tokens: most new tokens.
    seed: None: the engine's own.
    """

    lease: int
    token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class SegmentOutput:
    """News of a segment.

    token_ids, log_probs: new since the last output; one natural logarithm per token, of the
        distribution that was sampled from.
    version: of the weights that made them.
    reason: "" while it goes on, or one of END_REASONS.
    error: why it failed.
    """

    lease: int
    token_ids: Sequence[int] = field(default_factory=list)
    log_probs: Sequence[float] = field(default_factory=list)
    version: int = -1
    reason: str = ""
    error: str = ""


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds now.

    version: None: it has no weights yet.
    kv_capacity, kv_tokens: tokens; all, and those in use.
    """

    version: int | None
    kv_capacity: int
    max_sequences: int
    kv_tokens: int = 0
    running: int = 0
    waiting: int = 0


class Engine(Protocol):
    """Runs segments. Whatever a method raises counts as the death of the engine."""

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        """Begin all of them; they run beside what runs already. Returns before they end."""

    async def abort(self, leases: Sequence[int]) -> None:
        """End them soon: what they have made comes in the stream with reason "paused". Leases that
        are not known, or have ended, are ignored."""

    async def stats(self) -> EngineStats: ...

    async def update(self, version: int) -> object:
        """Serve `version`, which is published. Called only when nothing runs."""

    def stream(self) -> AsyncIterator[Sequence[SegmentOutput]]:
        """The outputs of all leases as they come, several at a time. Ends when the engine is
        closed; raises what the engine failed with."""
