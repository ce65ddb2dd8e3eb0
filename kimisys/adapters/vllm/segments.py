"""Rollout segments on a vLLM engine: they begin and end while others run, and stream their tokens.

    segments = Segments(engine)                # an Engine that serves a version
    await segments.start([SegmentRequest(...)])
    async for outputs in segments.stream():    # of all leases, as they come
        ...

Implements kimisys.rollout.engine.Engine. ``Engine.generate``, ``probe`` and ``update`` go on
working beside it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kimisys.adapters.vllm.build import sampling
from kimisys.adapters.vllm.engine import Engine
from kimisys.adapters.vllm.loop import Live, Observer
from kimisys.errors import EngineError
from kimisys.rollout.engine import EngineStats, SegmentOutput, SegmentRequest

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine

Outputs = list[SegmentOutput]

_FLUSH_SECONDS = 0.02  # between two batches of outputs while nothing ends: not one per short step
_POLL_SECONDS = 60.0
_NO_VERSION = -1
_REASONS = {"stop": "stop", "length": "length"}


class _Segment(Live):
    """A lease, and what it has made that nobody has taken yet. In the engine's thread."""

    def __init__(self, owner: Segments, request: SegmentRequest) -> None:
        self.owner, self.request = owner, request
        self.request_id = ""  # at vLLM, once it runs
        self.version = _NO_VERSION
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.reason = self.error = ""
        self.told = True  # all that there is to tell

    def collect(self, output: EngineCoreOutput) -> bool:
        self.token_ids += output.new_token_ids
        if output.new_logprobs is not None:
            self.log_probs += output.new_logprobs.logprobs[:, 0].tolist()
        if output.finish_reason is None:
            self.owner.news(self)
            return False
        ended = str(output.finish_reason)
        reason = _REASONS.get(ended, "failed")
        error = "" if reason != "failed" else f"vLLM ended the request itself: {ended}"
        self.owner.end(self, reason, error)
        return True

    def take(self) -> SegmentOutput:
        """The news, which are none afterwards."""
        output = SegmentOutput(
            self.request.lease,
            self.token_ids,
            self.log_probs,
            self.version,
            self.reason,
            self.error,
        )
        self.token_ids, self.log_probs, self.told = [], [], True
        return output


class Segments(Observer):
    """The segments of one engine; its methods may be called from one event loop.

    A lease that ends frees its place at once. A lease's tokens are all of one version, as an update
    waits until nothing runs. A request that vLLM refuses ends with reason "failed"; when the engine
    itself fails the stream raises, and the leases are lost.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises EngineError for an engine that has ended."""
        self._engine = engine
        self._leases: dict[int, _Segment] = {}
        self._news: list[_Segment] = []
        self._urgent = False  # something ended
        self._flushed = 0.0
        self._lock = threading.Lock()  # of the three below
        self._poll: Future[None] | None = None
        self._batch: Outputs = []
        self._end: tuple[EngineError, bool] | None = None
        engine.loop.observe(self)

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        """Begin them, all before the same step.

        Raises ValueError for a lease that is known already, EngineError for an engine that has
        ended; nothing has begun then. Whatever else is wrong with one, its output tells.
        """
        if self._end is not None:
            raise self._end[0]
        begun = {request.lease: _Segment(self, request) for request in segments}
        known = begun.keys() & self._leases.keys()
        if known or len(begun) != len(segments):
            twice = sorted(known) or [request.lease for request in segments]
            raise ValueError(f"leases {twice} are not new; each attempt at a segment has its own")
        self._leases.update(begun)  # first: they may be aborted while they wait for their turn
        self._engine.loop.shared(partial(self._admit, list(begun.values())))

    async def abort(self, leases: Sequence[int]) -> None:
        """They end before the next step, with reason "paused" and what they have made."""
        with suppress(EngineError):  # one that has ended tells so in the stream
            self._engine.loop.soon(partial(self._abort, list(leases)))

    async def stats(self) -> EngineStats:
        """How full the engine is. Raises EngineError when it has ended."""
        if self._end is not None:
            raise self._end[0]
        steps = self._engine.steps
        running, waiting = steps.counts
        waiting += sum(not segment.request_id for segment in list(self._leases.values()))
        return EngineStats(
            self._engine.version,
            steps.kv_capacity,
            steps.max_sequences,
            steps.kv_tokens,
            running,
            waiting,
        )

    async def update(self, version: int) -> dict[str, Any]:
        """Pull, verify and serve `version`; as Engine.update, whose report it returns."""
        return await self._engine.update(version)

    def steps(self) -> np.ndarray:
        """kimisys.adapters.vllm.steps.STEP[steps of the engine since the last call]."""
        return self._engine.steps.take()

    async def stream(self) -> AsyncIterator[Outputs]:
        """Outputs as they come; one stream at a time. A later one goes on where one was left.

        Ends when the engine is closed. Raises EngineError when it has failed.
        """
        while (outputs := await self.take(_POLL_SECONDS)) is not None:
            if outputs:
                yield outputs

    async def take(self, seconds: float) -> Outputs | None:
        """What has come since the last call, waited for so long; None when the engine is closed.

        Each lease is there once. Nothing is lost if the call is cancelled. Raises EngineError when
        the engine has failed.
        """
        with self._lock:
            poll = self._poll
            if poll is None and not self._batch and self._end is None:
                poll = self._poll = Future()
                poll.set_running_or_notify_cancel()  # so that no waiter can cancel it
        if poll is not None:
            with suppress(EngineError):  # the end answers the poll
                self._engine.loop.soon(lambda llm: self._flush())
            waiting = asyncio.wrap_future(poll)
            try:
                await asyncio.wait([waiting], timeout=seconds)
            finally:
                waiting.cancel()
            if not poll.done():
                return []
        with self._lock:
            outputs, self._batch = self._batch, []
            if outputs or self._end is None:
                return outputs
            error, closed = self._end
        if closed:
            return None
        raise error

    # What follows runs in the engine's thread.

    def step_ended(self, new_tokens: int) -> None:
        self._flush()

    def ended(self, error: EngineError, closed: bool) -> None:
        with self._lock:
            self._end = self._end or (error, closed)
            self._batch += [segment.take() for segment in self._news]
            self._news = []
            self._answer()
        self._leases.clear()

    def news(self, segment: _Segment) -> None:
        """`segment` has something to tell."""
        if segment.told:
            segment.told = False
            self._news.append(segment)

    def end(self, segment: _Segment, reason: str, error: str = "") -> None:
        """`segment` has ended, and tells so."""
        segment.reason, segment.error = reason, error
        self._leases.pop(segment.request.lease, None)  # after `ended` it knows none
        self._urgent = True
        self.news(segment)

    def _flush(self) -> None:
        """Hands over what there is to tell, if it is waited for and due."""
        if not self._news or self._poll is None:
            return
        now = time.monotonic()
        if not self._urgent and now < self._flushed + _FLUSH_SECONDS:
            return
        self._flushed, self._urgent = now, False
        with self._lock:
            self._batch += [segment.take() for segment in self._news]
            self._news = []
            self._answer()

    def _answer(self) -> None:
        """Wakes who waits. With the lock."""
        poll, self._poll = self._poll, None
        if poll is not None:
            poll.set_result(None)

    def _admit(self, segments: Sequence[_Segment], llm: LLMEngine) -> None:
        for segment in segments:
            if segment.reason:
                continue  # aborted before its turn came
            try:
                self._begin(segment, llm)
            except EngineError as error:  # it serves no more, whatever is asked
                self.ended(error, closed=False)
                return
            except Exception as error:
                self.end(segment, "failed", f"{type(error).__name__}: {error}")
        self._flush()

    def _begin(self, segment: _Segment, llm: LLMEngine) -> None:
        """Raises what vLLM, or the engine, has against it."""
        request = segment.request
        segment.version = self._engine.served()
        self._engine.check("the segment", request.token_ids, request.max_tokens)
        params = sampling(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            stop_token_ids=list(request.stop_token_ids),
            seed=request.seed,
            logprobs=0,
        )
        made = self._engine.loop.request(llm, request.token_ids, params)
        self._engine.loop.add(llm, made, segment)
        segment.request_id = made.request_id

    def _abort(self, leases: Sequence[int], llm: LLMEngine) -> None:
        ids = []
        for lease in leases:
            segment = self._leases.get(lease)
            if segment is not None:
                ids += [segment.request_id] if segment.request_id else []
                self.end(segment, "paused")
        self._engine.loop.drop(llm, ids)
        self._flush()
