"""Runs a Scheduler against engines, from an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from kimisys._core.rollout import (
    Blocker,
    Config,
    Ledger,
    RepetitionConfig,
    Scheduler,
)
from kimisys.errors import SchedulerError
from kimisys.rollout.batch import Batch
from kimisys.rollout.buffer import Prompt, ReplayBuffer
from kimisys.rollout.dispatch import Dispatch
from kimisys.rollout.engine import Engine
from kimisys.rollout.link import Link
from kimisys.rollout.sampling import Sampling
from kimisys.rollout.spans import Span
from kimisys.rollout.trace import Trace

_CLOSE_SECONDS = 10.0  # that an engine gets to take its last abort


class Driver:
    """Keeps engines at work and hands over batches.

        async with Driver(config, engines, prompts) as driver:
            batch = await driver.batch()    # train on batch.groups, and
            await driver.publish(version)   # when engines can fetch the new weights

    config: what the scheduler does.
    engines: numbered from 0. One that fails is left out from then on, what ran there goes on
        elsewhere, and `failures` says why; `add` and `remove` change them while it runs.
    prompts: called with how many more the scheduler wants; answers that many, more or fewer. When
        it answers none it is asked again by the next `batch`.
    temperature, stop_token_ids: of all segments.
    seed: seeds of segments come from it and from the prompt's key, the sample and the tokens so
        far. None: the engines' own.
    repetition: stop trajectories that loop.
    trace: a file to record all events and decisions in, see `replay`.
    command_timeout: seconds that an engine may take to answer a call.

    Everything runs in the event loop of `async with`. Engines belong to the caller: closing the
    driver aborts what runs there and leaves them open.
    """

    def __init__(
        self,
        config: Config,
        engines: Sequence[Engine],
        prompts: Callable[[int], Sequence[Prompt]],
        *,
        temperature: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = 0,
        repetition: RepetitionConfig | None = None,
        trace: Path | None = None,
        command_timeout: float = 300.0,
    ) -> None:
        self._overlap = config.deployment == "overlap"
        self._timeout = command_timeout
        self._engines = list(engines)
        self._links: list[Link] = []  # all that ever were, by number
        self._trace = None if trace is None else Trace(trace, config)
        self._dispatch = Dispatch(
            config,
            prompts,
            Sampling(temperature, tuple(stop_token_ids), seed),
            repetition,
            self._trace,
        )
        self._awaited = False
        self._closed = False

    async def __aenter__(self) -> Driver:
        """Raises what an engine raises that cannot be had from the first."""
        try:
            links = [self._link(engine) for engine in self._engines]
            await self._join(links)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def batch(self) -> Batch:
        """The next batch: tells the scheduler that the trainer is ready, and waits.

        A call that is cancelled loses nothing: the next one gets the batch. Raises what the last
        engine failed with when none is left, what `prompts` raised, and SchedulerError when there
        are no prompts any more and what is there does not make a batch.
        """
        if self._awaited:
            raise SchedulerError("batch() is awaited already; one batch at a time")
        self._awaited = True
        try:
            self._check()
            if not self._dispatch.batches:
                self._dispatch.ready()
            await self._until(self._has_batch)
            return self._dispatch.batches.popleft()
        finally:
            self._awaited = False

    async def publish(self, version: int) -> None:
        """Engines can fetch `version` now: they are told to. Returns when every engine serves it;
        with deployment "overlap" at once, and the engines follow while they work."""
        self._check()
        self._dispatch.publish(version)
        if not self._overlap:
            links = self._dispatch.links
            await self._until(
                lambda: bool(links) and all(link.version >= version for link in links.values())
            )

    async def add(self, engine: Engine) -> int:
        """A further engine; returns its number."""
        self._check_open()
        link = self._link(engine)
        await self._join([link])
        return link.number

    async def remove(self, engine: int) -> None:
        """Nothing new goes to the engine; returns when what ran there has ended, to go on
        elsewhere. It stays open."""
        self._check_open()
        link = self._dispatch.links.get(engine)
        if link is None:
            raise SchedulerError(f"there is no engine {engine}: {sorted(self._dispatch.links)} run")
        self._dispatch.leave(link)
        links = self._dispatch.links
        await self._until(lambda: not link.leases or engine not in links)
        links.pop(engine, None)
        await link.stop()

    async def close(self) -> None:
        """Aborts what runs and lets go of the engines; no task is left."""
        if self._closed:
            return
        self._closed = True
        self._dispatch.news.set()
        try:
            await asyncio.gather(*(self._let_go(link) for link in self._links))
        finally:
            self._dispatch.stop()  # last: outputs that were under way set timers
            if self._trace is not None:
                self._trace.close()

    @property
    def buffer(self) -> ReplayBuffer:
        """What was offered and is not trained."""
        return self._dispatch.buffer

    @property
    def scheduler(self) -> Scheduler:
        """To look at: counts(), digest(), audit(). Events are the driver's."""
        return self._dispatch.scheduler

    @property
    def ledger(self) -> Ledger:
        """Lengths dispatched against lengths trained."""
        return self._dispatch.scheduler.ledger()

    def blockers(self) -> list[Blocker]:
        """What keeps the batch from being complete, worst first."""
        return self._dispatch.scheduler.blockers()

    @property
    def version(self) -> int:
        """The newest that is published; -1: none."""
        return self._dispatch.version

    @property
    def engines(self) -> list[int]:
        """Numbers of those that are at work."""
        return sorted(self._dispatch.links)

    @property
    def failures(self) -> dict[int, Exception]:
        """What engines failed with, by number."""
        return dict(self._dispatch.failures)

    @property
    def spans(self) -> list[Span]:
        """Segments that ended since `take_spans` was called, in the order of their ends."""
        return list(self._dispatch.spans)

    def take_spans(self) -> list[Span]:
        """`spans`, which are then forgotten: a long run has many."""
        spans, self._dispatch.spans = self._dispatch.spans, []
        return spans

    def _link(self, engine: Engine) -> Link:
        self._links.append(Link(len(self._links), engine, self._dispatch, self._timeout))
        return self._links[-1]

    async def _join(self, links: Sequence[Link]) -> None:
        stats = await asyncio.gather(*(link.join() for link in links))
        self._check_open()
        self._dispatch.join(list(zip(links, stats, strict=True)))

    async def _let_go(self, link: Link) -> None:
        leases = sorted(link.leases)
        await link.stop()
        if leases and link.number in self._dispatch.links:
            # It may be what the run ended of: there is nobody left who could act on its error.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(min(self._timeout, _CLOSE_SECONDS)):
                    await link.engine.abort(leases)

    def _has_batch(self) -> bool:
        if self._dispatch.batches:
            return True
        self._check()
        if self._dispatch.exhausted():
            counts = self._dispatch.scheduler.counts()
            raise SchedulerError(
                f"no prompts are left: {counts.complete} of {counts.groups} groups are complete "
                f"and do not make a batch; {self._dispatch.wanted} more were wanted"
            )
        return False

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._check()
            self._dispatch.news.clear()
            await self._dispatch.news.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise SchedulerError("the driver is closed")

    def _check(self) -> None:
        self._check_open()
        self._dispatch.check()
