"""An engine as the driver has it: commands in order, each with a deadline; its stream; its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from kimisys.errors import EngineError
from kimisys.rollout.engine import Engine, EngineStats, SegmentOutput, SegmentRequest

T = TypeVar("T")

_MEASURE_SECONDS = 1.0  # between two looks at what the KV cache holds
_STOP_SECONDS = 10.0  # that an engine's methods get to end when they are cancelled


class Listener(Protocol):
    """Who is told what an engine does; nothing here may raise."""

    def on_outputs(self, link: Link, outputs: Sequence[SegmentOutput]) -> None: ...
    def on_updated(self, link: Link, version: int) -> None: ...
    def on_measured(self, link: Link, stats: EngineStats) -> None: ...
    def on_failed(self, link: Link, error: Exception) -> None: ...


class Link:
    """The tasks that talk to one engine.

    Commands queued in one turn of the event loop reach the engine together: all that is aborted in
    one call, then all that begins in another.

    version: served, -1: none. heard: microseconds of the driver's clock, the last word.
    seconds: the longest that a command may take.
    """

    def __init__(self, number: int, engine: Engine, listener: Listener, seconds: float) -> None:
        self.number = number
        self.engine = engine
        self.version = -1
        self.heard = 0
        self.leaving = False
        self.leases: set[int] = set()
        self._listener = listener
        self._seconds = seconds
        self._aborts: list[int] = []
        self._starts: dict[int, SegmentRequest] = {}
        self._update: int | None = None
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self) -> EngineStats:
        """The engine's first word; raises what it raises, or EngineError after the deadline."""
        stats = await self.within("stats", self.engine.stats())
        self.version = -1 if stats.version is None else stats.version
        return stats

    def run(self) -> None:
        """Begin to listen and to pass on commands."""
        for work in (self._read(), self._command(), self._measure()):
            self._tasks.append(asyncio.create_task(self._guard(work)))

    def start(self, request: SegmentRequest) -> None:
        self._starts[request.lease] = request
        self._wake.set()

    def abort(self, lease: int) -> bool:
        """False: it had not been sent yet, and will not be; nothing is heard of it."""
        if self._starts.pop(lease, None) is not None:
            return False
        self._aborts.append(lease)
        self._wake.set()
        return True

    def update(self, version: int) -> None:
        self._update = version
        self._wake.set()

    def cancel(self) -> None:
        """End the tasks soon. What runs at the engine goes on there."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def stop(self) -> None:
        """`cancel`, and wait until they have ended; not for an engine that holds on to a call."""
        self.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)

    async def within(self, what: str, answer: Awaitable[T]) -> T:
        """The answer, or EngineError after the deadline."""
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                return await answer
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise EngineError(
                f"engine {self.number} did not answer {what}() within {self._seconds:g} s; see "
                "what it is doing, or give it longer (command_timeout)"
            ) from error

    async def _guard(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            self._listener.on_failed(self, error)

    async def _read(self) -> None:
        stream = self.engine.stream()
        try:
            async for outputs in stream:
                self._listener.on_outputs(self, outputs)
        finally:
            close = getattr(stream, "aclose", None)  # generators have it, other iterators need not
            if close is not None:
                with contextlib.suppress(Exception):
                    await close()
        raise EngineError(f"the stream of engine {self.number} ended: the engine was closed")

    async def _command(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._aborts:
                aborts, self._aborts = self._aborts, []
                await self.within("abort", self.engine.abort(aborts))
            if self._starts:
                starts, self._starts = list(self._starts.values()), {}
                await self.within("start", self.engine.start(starts))
            if self._update is not None:
                version, self._update = self._update, None
                await self.within("update", self.engine.update(version))
                self._listener.on_updated(self, version)

    async def _measure(self) -> None:
        while True:
            await asyncio.sleep(_MEASURE_SECONDS)
            if self.leases:
                stats = await self.within("stats", self.engine.stats())
                self._listener.on_measured(self, stats)
