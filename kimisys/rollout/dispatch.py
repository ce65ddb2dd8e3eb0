"""What the scheduler decides, done at the engines; what the engines say, told to the scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import ParamSpec

import numpy as np

from kimisys._core.rollout import (
    EVENT,
    Action,
    Config,
    EndReason,
    EventKind,
    RepetitionConfig,
    RepetitionDetector,
    Scheduler,
    as_actions,
)
from kimisys.errors import EngineError, SchedulerError
from kimisys.rollout.alarm import Alarm, clock
from kimisys.rollout.batch import Batch, Dropped, Gathering
from kimisys.rollout.buffer import Group, Prompt, ReplayBuffer
from kimisys.rollout.engine import EngineStats, SegmentOutput
from kimisys.rollout.events import record
from kimisys.rollout.lease import Lease, check_output
from kimisys.rollout.link import Link
from kimisys.rollout.sampling import Sampling
from kimisys.rollout.spans import Span
from kimisys.rollout.trace import Trace

P = ParamSpec("P")

_log = logging.getLogger(__name__)

_FINAL = ("stop", "repetition")


class Dispatch:
    """One Scheduler and what it works on. Never awaits: each event is dealt with, to the last
    action that follows from it, before the next one is looked at.

    links: engines that are at work, by number. news: set when something happened that a waiting
    caller may want to look at. batches: complete, not fetched yet. wanted: prompts that were asked
    for and did not come. version: the newest that is published, -1: none.
    """

    def __init__(
        self,
        config: Config,
        prompts: Callable[[int], Sequence[Prompt]],
        sampling: Sampling,
        repetition: RepetitionConfig | None,
        trace: Trace | None,
    ) -> None:
        self.scheduler = Scheduler(config)
        self.buffer = ReplayBuffer()
        self.links: dict[int, Link] = {}
        self.failures: dict[int, Exception] = {}
        self.spans: list[Span] = []
        self.batches: deque[Batch] = deque()
        self.news = asyncio.Event()
        self.wanted = 0
        self.version = -1
        self._timeout = config.lease_timeout
        self._prompts = prompts
        self._sampling = sampling
        self._repetition = repetition
        self._trace = trace
        self._fatal: Exception | None = None
        self._leases: dict[int, Lease] = {}
        self._detectors: dict[tuple[int, int], RepetitionDetector] = {}
        self._errors: dict[int, str] = {}  # group → what a segment of it failed with last
        self._gathering = Gathering()
        self._alarm = Alarm(lambda: self._guarded(self._say, EventKind.TIME))
        self._pending: deque[Action] = deque()
        self._acting = False
        self._do: dict[str, Callable[[Action], None]] = {
            "start": self._start,
            "continue": self._start,
            "pause": self._pause,
            "abort": self._lose,
            "requeue": self._requeue,
            "hand_over": self._hand_over,
            "batch": self._batch,
            "drop": self._drop,
            "update": self._update,
            "want": self._want,
        }

    # From the driver's callers.

    def join(self, links: Sequence[tuple[Link, EngineStats]]) -> None:
        """New engines, which are heard of from now on. Raises SchedulerError for numbers that no
        engine can have; then none of them is there."""
        newest = max((link.version for link, _ in links), default=-1)
        if newest > self.version and self.links:
            raise EngineError(
                f"an engine that serves version {newest} cannot join: {self.version} is the newest "
                "that was published; publish its version first"
            )
        now, records = clock(), []
        if newest > self.version:  # a run begins with what its engines serve
            self.version = newest
            records.append(record(now, EventKind.VERSION_PUBLISHED, version=newest))
        for link, stats in links:
            self.links[link.number] = link
            fields = {"version": link.version, "tokens": stats.kv_capacity}
            fields["count"] = stats.max_sequences
            records.append(record(now, EventKind.ENGINE_JOINED, engine=link.number, **fields))
        try:
            if records:
                self._tell(*records)
        except SchedulerError:
            for link, _ in links:
                del self.links[link.number]
            raise
        for link, _ in links:
            link.run()

    def leave(self, link: Link) -> None:
        """The engine gets nothing new, and what it has goes elsewhere."""
        if not link.leaving:
            link.leaving = True
            self._say(EventKind.ENGINE_LEFT, engine=link.number)

    def ready(self) -> None:
        """The trainer wants a batch, if it did not say so already."""
        if self._gathering.asked is None:
            self._gathering.asked = clock()
            self._say(EventKind.TRAINER_READY)
        self._offer()

    def publish(self, version: int) -> None:
        self._say(EventKind.VERSION_PUBLISHED, version=version)
        self.version = version

    def exhausted(self) -> bool:
        """Nothing goes on, and it is prompts that are missing."""
        counts = self.scheduler.counts()
        return self.wanted > 0 and counts.running == 0 and counts.waiting == 0

    def check(self) -> None:
        """Raises what is wrong with the whole of it."""
        if self._fatal is not None:
            raise self._fatal
        if not self.links:
            if self.failures:
                raise self.failures[max(self.failures)]
            raise EngineError("there is no engine; add one")

    def stop(self) -> None:
        """No timer is left."""
        self._alarm.stop()

    # Towards the scheduler.

    def _say(self, kind: EventKind, **fields: int) -> None:
        self._tell(record(clock(), kind, **fields))

    def _tell(self, *records: bytes) -> None:
        """Events, together. What follows from them is done when this returns; called from within
        what follows from others, it is done after those."""
        events = np.frombuffer(b"".join(records), EVENT)
        actions, answers = self.scheduler.handle_each(events)
        self._pending.extend(as_actions(actions))
        if self._trace is not None:
            self._trace.add(events, actions, answers, self.scheduler.digest())
        if self._acting:
            return
        self._acting = True
        try:
            while self._pending:
                action = self._pending.popleft()
                self._do[action.kind](action)
        finally:
            self._acting = False
        self._alarm.set(self.scheduler.next_deadline())
        self.news.set()

    def _offer(self) -> None:
        """Ask for the prompts that are wanted, until none come."""
        while self.wanted:
            prompts = self._prompts(self.wanted)
            if not prompts:
                return
            self.wanted = max(0, self.wanted - len(prompts))
            now, records = clock(), []
            for prompt in prompts:
                fields = {"id": self.buffer.offer(prompt), "tokens": len(prompt.token_ids)}
                fields |= {"limit": prompt.limit, "count": prompt.samples}
                records.append(record(now, EventKind.OFFERED, **fields))
            self._tell(*records)

    def _guarded(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """What goes wrong here is no engine's fault: the driver's callers are to hear of it."""
        try:
            work(*args, **kwargs)
        except Exception as error:
            self._fatal = self._fatal or error
            self.news.set()

    # From the engines (link.Listener).

    def on_outputs(self, link: Link, outputs: Sequence[SegmentOutput]) -> None:
        link.heard = clock()
        for output in outputs:
            if link.number not in self.links:
                return
            lease = self._leases.get(output.lease)
            try:
                check_output(link, output, lease)
            except EngineError as error:
                self.on_failed(link, error)
                return
            self._guarded(self._output, link, output, lease)

    def on_updated(self, link: Link, version: int) -> None:
        link.version = version
        self._guarded(self._say, EventKind.ENGINE_UPDATED, engine=link.number, version=version)

    def on_measured(self, link: Link, stats: EngineStats) -> None:
        kv_tokens = stats.kv_tokens
        self._guarded(self._say, EventKind.ENGINE_STATS, engine=link.number, tokens=kv_tokens)

    def on_failed(self, link: Link, error: Exception) -> None:
        if self.links.pop(link.number, None) is None:
            return
        _log.warning("engine %d failed: %s", link.number, error)
        self.failures[link.number] = error
        link.cancel()
        self.news.set()
        if link.leases or not link.leaving:  # the scheduler has forgotten one that left idle
            self._guarded(self._say, EventKind.ENGINE_FAILED, engine=link.number)

    def _output(self, link: Link, output: SegmentOutput, lease: Lease | None) -> None:
        count = len(output.token_ids)
        if lease is None:
            if count:
                self._late(link, output.lease, count)
            return
        reason, error = output.reason, output.error
        lease.made += count
        if reason == "length" and lease.made < lease.limit:
            reason = "failed"
            error = f"the engine ended it after {lease.made} of {lease.limit} tokens"
        if error:
            self._errors[lease.group] = error
        if count:
            self._gathering.tokens += count
            self.buffer.extend(lease.group, lease.sample, output.token_ids, output.log_probs)
            if reason != "stop" and self._loops(lease, output.token_ids):
                reason = "repetition"
        if reason:
            if not output.reason:
                link.abort(lease.number)
            self._end(lease, reason, count)
        else:
            self._say(EventKind.TOKENS, id=lease.number, tokens=count)

    def _late(self, link: Link, lease: int, count: int) -> None:
        """The scheduler ignores and counts what a dead lease sends."""
        try:
            self._say(EventKind.TOKENS, id=lease, tokens=count)
        except SchedulerError as error:  # it was never given
            self.on_failed(link, EngineError(f"engine {link.number} is left out: {error}"))

    def _loops(self, lease: Lease, token_ids: Sequence[int]) -> bool:
        if self._repetition is None:
            return False
        key = lease.group, lease.sample
        if key not in self._detectors:
            self._detectors[key] = RepetitionDetector(self._repetition)
        return self._detectors[key].feed(token_ids) is not None

    def _end(self, lease: Lease, reason: str, count: int) -> None:
        """count: tokens that the scheduler has not been told of."""
        self._forget(lease, reason)
        code = EndReason[reason.upper()]
        self._say(EventKind.SEGMENT_ENDED, id=lease.number, tokens=count, reason=code)

    def _forget(self, lease: Lease, reason: str) -> None:
        """The lease is over; what it made is kept. A trajectory that has reached its limit is
        finished, whatever ended the lease: there is nothing left to make."""
        now, link, group, sample = clock(), lease.link, lease.group, lease.sample
        del self._leases[lease.number]
        link.leases.discard(lease.number)
        final = reason if reason in _FINAL else ""
        if len(self.buffer.output(group, sample)) + lease.made == self.buffer.prompt(group).limit:
            final = final or "length"
        self.buffer.end(group, sample, now / 1e6, final)
        ran = lease.start / 1e6, now / 1e6, lease.made, lease.version, reason
        self.spans.append(Span(link.number, group, sample, *ran))

    # What the scheduler asks for.

    def _start(self, action: Action) -> None:
        link = self.links.get(action.engine)
        if link is None:
            return  # it failed a moment ago; the scheduler has been told, and requeues
        now, group, sample = clock(), action.group, action.sample
        output = self.buffer.output(group, sample)
        self._agree(action, len(output))
        if not link.leases:
            link.heard = now  # it had nothing to say before
        number, version, limit = action.lease, link.version, action.limit
        self._leases[number] = Lease(number, link, group, sample, limit, version, now)
        link.leases.add(number)
        self.buffer.begin(group, sample, link.number, version, now / 1e6)
        prompt = self.buffer.prompt(group)
        link.start(self._sampling.request(number, prompt, sample, output, limit))

    def _pause(self, action: Action) -> None:
        lease = self._leases.get(action.lease)
        if lease is not None and not lease.link.abort(action.lease):
            self._end(lease, "paused", 0)

    def _lose(self, action: Action) -> None:
        """The lease is dead: whatever comes of it later is late."""
        lease = self._leases.get(action.lease)
        if lease is None:
            return
        link = lease.link
        self._forget(lease, "lost")
        if link.number not in self.links:
            return
        link.abort(action.lease)
        silent = clock() - link.heard
        if silent >= self._timeout:
            fault = (
                f"engine {link.number} said nothing for {silent / 1e6:g} s while "
                f"{len(link.leases) + 1} segments ran there; see what it is doing, or give it "
                "longer (Config.lease_timeout)"
            )
            self.on_failed(link, EngineError(fault))

    def _requeue(self, action: Action) -> None:
        self._lose(action)
        self._agree(action, len(self.buffer.output(action.group, action.sample)))

    def _agree(self, action: Action, held: int) -> None:
        if action.tokens != held:
            raise SchedulerError(
                f"{action}: the buffer holds {held} tokens of sample {action.sample} of group "
                f"{action.group}, not {action.tokens}: a defect of the driver, please report it"
            )

    def _hand_over(self, action: Action) -> None:
        self._gathering.groups.append(self._take(action.group))

    def _drop(self, action: Action) -> None:
        for lease in [v for v in self._leases.values() if v.group == action.group]:
            self._forget(lease, "lost")
            lease.link.abort(lease.number)
        error = self._errors.get(action.group, "")
        self._gathering.dropped.append(Dropped(self._take(action.group), action.drop, error))

    def _take(self, group: int) -> Group:
        self._errors.pop(group, None)
        taken = self.buffer.take(group)
        for sample in range(taken.prompt.samples):
            self._detectors.pop((group, sample), None)
        return taken

    def _batch(self, action: Action) -> None:
        batch = self._gathering.finish(clock(), self.version)
        self.buffer.batch(batch.groups)
        self.batches.append(batch)
        if self._trace is not None:
            self._trace.flush()

    def _update(self, action: Action) -> None:
        link = self.links.get(action.engine)
        if link is not None:
            link.update(action.version)

    def _want(self, action: Action) -> None:
        self.wanted = action.count
        self._offer()
