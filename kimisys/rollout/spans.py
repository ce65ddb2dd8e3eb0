"""Segments as they ran: what a picture of the engines is drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One lease.

    group, sample: the group's id in the buffer, and which of its samples.
    start, end: seconds of `time.monotonic`.
    tokens: of output that were kept.
    version: of the weights that the engine served.
    reason: "stop", "length", "paused", "repetition", "failed", or "lost": the lease died.
    """

    engine: int
    group: int
    sample: int
    start: float
    end: float
    tokens: int
    version: int
    reason: str
