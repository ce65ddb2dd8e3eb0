"""What the scheduler decides, done at the engines; what the engines say, told to the scheduler."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import numpy as np

from kimisys._core.rollout import (
    EVENT,
    Action,
    Config,
    DropReason,
    EndReason,
    EventKind,
    RepetitionConfig,
    RepetitionDetector,
    Scheduler,
    as_actions,
)
from kimisys.errors import EngineError, SchedulerError
from kimisys.rollout.batch import Batch, Dropped
from kimisys.rollout.buffer import Group, Prompt, ReplayBuffer
from kimisys.rollout.engine import END_REASONS, EngineStats, SegmentOutput
from kimisys.rollout.link import Link
from kimisys.rollout.sampling import Sampling
from kimisys.rollout.spans import Span
from kimisys.rollout.trace import Trace

P = ParamSpec("P")

_log = logging.getLogger(__name__)

_NO_ENGINE = 0xFFFFFFFF
_RECORD = struct.Struct("=qIIQqqqqII")  # of an EVENT
_FINAL = ("stop", "repetition")
_REASONS = {
    "stop": EndReason.STOP,
    "length": EndReason.LENGTH,
    "paused": EndReason.PAUSED,
    "repetition": EndReason.REPETITION,
    "failed": EndReason.FAILED,
}


@dataclass
class _Lease:
    """A segment that runs. start: microseconds. made, limit: tokens of output in it."""

    number: int
    link: Link
    group: int
    sample: int
    limit: int
    version: int
    start: int
    made: int = 0


def record(
    time: int,
    kind: EventKind,
    *,
    engine: int = _NO_ENGINE,
    id: int = 0,
    tokens: int = 0,
    limit: int = 0,
    count: int = 0,
    version: int = -1,
    reason: EndReason = EndReason.NONE,
) -> bytes:
    """One EVENT."""
    return _RECORD.pack(
        time, int(kind), engine, id, tokens, limit, count, version, int(reason), 0
    )


class Dispatch:
    """One Scheduler and what it works on. Never awaits: each event is dealt with, to the last
    action that follows from it, before the next one is looked at.

    links: engines that are at work, by number. news: set when something happened that a waiting
    caller may want to look at. batches: complete, not fetched yet.
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
        self.fatal: Exception | None = None
        self.spans: list[Span] = []
        self.batches: deque[Batch] = deque()
        self.news = asyncio.Event()
        self.wanted = 0  # prompts that were asked for and did not come
        self.version = -1
        self.ready_at: int | None = None  # microseconds: since when a batch is asked for
        self._timeout = config.lease_timeout
        self._prompts = prompts
        self._sampling = sampling
        self._repetition = repetition
        self._trace = trace
        self._leases: dict[int, _Lease] = {}
        self._detectors: dict[tuple[int, int], RepetitionDetector] = {}
        self._errors: dict[int, str] = {}  # group → what a segment of it failed with
        self._pending: deque[Action] = deque()
        self._acting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0
        self._groups: list[Group] = []
        self._dropped: list[Dropped] = []
        self._made = 0
        self._number = 0
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

    # Towards the scheduler.

    def now(self) -> int:
        return time.monotonic_ns() // 1000

    def tell(self, *records: bytes) -> None:
        """Events, together; what follows from them is done when this returns, unless it is called
        from within what follows from others: then after those."""
        events = np.frombuffer(b"".join(records), EVENT)
        actions = self.scheduler.handle(events)
        if self._trace is not None:
            self._trace.add(events, actions, self.scheduler.digest())
        self._pending.extend(as_actions(actions))
        if self._acting:
            return
        self._acting = True
        try:
            while self._pending:
                action = self._pending.popleft()
                self._do[action.kind](action)
        finally:
            self._acting = False
        self._set_timer()
        self.news.set()

    def join(self, links: Sequence[tuple[Link, EngineStats]]) -> None:
        """New engines, which are heard of from now on."""
        now = self.now()
        newest = max((link.version for link, _ in links), default=-1)
        records = []
        if newest > self.version and not self.links:
            self.version = newest  # a run begins with what its engines serve
            records.append(record(now, EventKind.VERSION_PUBLISHED, version=newest))
        for link, stats in links:
            self.links[link.number] = link
            records.append(
                record(
                    now, EventKind.ENGINE_JOINED, engine=link.number, version=link.version,
                    tokens=stats.kv_capacity, count=stats.max_sequences,
                )  # fmt: skip
            )
            link.run()
        if records:
            self.tell(*records)

    def leave(self, link: Link) -> None:
        """The engine gets nothing new, and what it has goes elsewhere."""
        self.tell(record(self.now(), EventKind.ENGINE_LEFT, engine=link.number))

    def ready(self) -> None:
        """The trainer wants a batch, if it did not say so already."""
        if self.ready_at is None:
            now = self.now()
            self.ready_at = now
            self.tell(record(now, EventKind.TRAINER_READY))
        self.offer_wanted()

    def publish(self, version: int) -> None:
        self.tell(record(self.now(), EventKind.VERSION_PUBLISHED, version=version))
        self.version = version

    def exhausted(self) -> bool:
        """Nothing goes on, and it is prompts that are missing."""
        counts = self.scheduler.counts()
        return self.wanted > 0 and counts.running == 0 and counts.waiting == 0

    def check(self) -> None:
        """Raises what is wrong with the whole of it."""
        if self.fatal is not None:
            raise self.fatal
        if not self.links:
            if self.failures:
                raise self.failures[max(self.failures)]
            raise EngineError("there is no engine; add one")

    def offer_wanted(self) -> None:
        """Ask for prompts again that were wanted and did not come."""
        count, self.wanted = self.wanted, 0
        if not count:
            return
        try:
            prompts = self._prompts(count)
        except BaseException:
            self.wanted = count
            raise
        self.wanted = max(0, count - len(prompts))
        if prompts:
            now = self.now()
            self.tell(*(self._offer(now, prompt) for prompt in prompts))

    def _offer(self, now: int, prompt: Prompt) -> bytes:
        return record(
            now, EventKind.OFFERED, id=self.buffer.offer(prompt), count=prompt.samples,
            tokens=len(prompt.token_ids), limit=prompt.limit,
        )  # fmt: skip

    def _set_timer(self) -> None:
        """Sees to it that time passes for the scheduler when a deadline does."""
        due = self.scheduler.next_deadline()
        if due is None or (self._timer is not None and self._timer_at <= due):
            return  # a timer that is too early looks again
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer_at = due
        self._timer = loop.call_later(max(0, due - self.now()) / 1e6, self._elapsed)

    def _elapsed(self) -> None:
        self._timer = None
        self._guarded(self.tell, record(self.now(), EventKind.TIME))

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _guarded(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """What goes wrong here is no engine's fault: the driver's callers are to hear of it."""
        try:
            work(*args, **kwargs)
        except Exception as error:
            self.fatal = self.fatal or error
            self.news.set()

    # From the engines (link.Listener).

    def on_outputs(self, link: Link, outputs: Sequence[SegmentOutput]) -> None:
        link.heard = self.now()
        for output in outputs:
            if link.number not in self.links:
                return
            try:
                self._check(link, output)
            except EngineError as error:
                self.on_failed(link, error)
                return
            self._guarded(self._output, link, output)

    def on_updated(self, link: Link, version: int) -> None:
        link.version = version
        now = self.now()
        told = record(now, EventKind.ENGINE_UPDATED, engine=link.number, version=version)
        self._guarded(self.tell, told)

    def on_measured(self, link: Link, stats: EngineStats) -> None:
        told = record(
            self.now(), EventKind.ENGINE_STATS, engine=link.number, tokens=stats.kv_tokens
        )
        self._guarded(self.tell, told)

    def on_failed(self, link: Link, error: Exception) -> None:
        if self.links.pop(link.number, None) is None:
            return
        _log.warning("engine %d failed: %s", link.number, error)
        self.failures[link.number] = error
        link.cancel()
        told = record(self.now(), EventKind.ENGINE_FAILED, engine=link.number)
        self._guarded(self.tell, told)

    def _check(self, link: Link, output: SegmentOutput) -> None:
        """Raises EngineError for an output that no honest engine sends."""
        fault = None
        lease = self._leases.get(output.lease)
        if output.reason and output.reason not in END_REASONS:
            fault = f"ends with reason {output.reason!r}, which is none of {END_REASONS}"
        elif len(output.token_ids) != len(output.log_probs):
            fault = f"has {len(output.token_ids)} tokens and {len(output.log_probs)} log-probs"
        elif lease is None:
            return  # of an attempt that is dead
        elif lease.link is not link:
            fault = f"belongs to engine {lease.link.number}"
        elif lease.made + len(output.token_ids) > lease.limit:
            fault = f"has more than the {lease.limit} tokens that were asked for"
        elif output.token_ids and output.version != lease.version:
            fault = f"was made by version {output.version}, but the engine served {lease.version}"
        if fault is not None:
            raise EngineError(
                f"engine {link.number}: its output for lease {output.lease} {fault}; the engine is "
                "left out, mend its adapter"
            )

    def _output(self, link: Link, output: SegmentOutput) -> None:
        now, count = self.now(), len(output.token_ids)
        lease = self._leases.get(output.lease)
        if lease is None:  # the scheduler counts what came too late
            if count:
                self.tell(record(now, EventKind.TOKENS, id=output.lease, tokens=count))
            return
        reason = output.reason
        if count:
            lease.made += count
            self._made += count
            self.buffer.extend(lease.group, lease.sample, output.token_ids, output.log_probs)
            if reason not in _FINAL and self._loops(lease, output.token_ids):
                reason = "repetition"
        if reason:
            if output.error:
                self._errors[lease.group] = output.error
            if reason == "repetition" and not output.reason:
                link.abort(lease.number)
            self._end(lease, now, reason, count)
        elif count:
            self.tell(record(now, EventKind.TOKENS, id=lease.number, tokens=count))

    def _loops(self, lease: _Lease, token_ids: Sequence[int]) -> bool:
        if self._repetition is None:
            return False
        key = lease.group, lease.sample
        if key not in self._detectors:
            self._detectors[key] = RepetitionDetector(self._repetition)
        return self._detectors[key].feed(token_ids) is not None

    def _end(self, lease: _Lease, now: int, reason: str, count: int) -> None:
        """count: tokens that the scheduler has not been told of."""
        prompt = self.buffer.prompt(lease.group)
        final = reason in _FINAL or (
            reason == "length"
            and len(self.buffer.output(lease.group, lease.sample)) + lease.made >= prompt.limit
        )
        self._forget(lease, now, reason, reason if final else "")
        self.tell(
            record(
                now, EventKind.SEGMENT_ENDED, id=lease.number, tokens=count, reason=_REASONS[reason]
            )
        )

    def _forget(self, lease: _Lease, now: int, reason: str, final: str = "") -> None:
        """The lease is over; what it made is kept."""
        del self._leases[lease.number]
        lease.link.leases.discard(lease.number)
        if final:
            self._detectors.pop((lease.group, lease.sample), None)
        self.buffer.end(lease.group, lease.sample, now / 1e6, final)
        span = Span(
            lease.link.number, lease.group, lease.sample, lease.start / 1e6, now / 1e6, lease.made,
            lease.version, reason,
        )  # fmt: skip
        self.spans.append(span)

    # What the scheduler asks for.

    def _start(self, action: Action) -> None:
        link = self.links.get(action.engine)
        if link is None:
            return  # it failed a moment ago; the scheduler has been told, and requeues
        now = self.now()
        output = self.buffer.output(action.group, action.sample)
        self._agree(action, len(output))
        if not link.leases:
            link.heard = now  # it had nothing to say before
        lease = _Lease(
            action.lease, link, action.group, action.sample, action.limit, link.version, now
        )
        self._leases[action.lease] = lease
        link.leases.add(action.lease)
        self.buffer.begin(action.group, action.sample, link.number, link.version, now / 1e6)
        prompt = self.buffer.prompt(action.group)
        link.start(
            self._sampling.request(action.lease, prompt, action.sample, output, action.limit)
        )

    def _pause(self, action: Action) -> None:
        lease = self._leases.get(action.lease)
        if lease is not None and not lease.link.abort(action.lease):
            self._end(lease, self.now(), "paused", 0)

    def _lose(self, action: Action) -> None:
        """The lease is dead: whatever comes of it later is late."""
        lease = self._leases.get(action.lease)
        if lease is None:
            return
        now, link = self.now(), lease.link
        self._forget(lease, now, "lost")
        if link.number not in self.links:
            return
        link.abort(action.lease)
        if now - link.heard >= self._timeout:
            running = len(link.leases) + 1
            self.on_failed(
                link,
                EngineError(
                    f"engine {link.number} said nothing for {(now - link.heard) / 1e6:.0f} s while "
                    f"{running} segments ran there; see what it is doing, or give it longer "
                    "(Config.lease_timeout)"
                ),
            )

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
        self._groups.append(self._take(action.group))

    def _drop(self, action: Action) -> None:
        for lease in [v for v in self._leases.values() if v.group == action.group]:
            self._forget(lease, self.now(), "lost")
            lease.link.abort(lease.number)
        error = self._errors.get(action.group, "")
        self._dropped.append(Dropped(self._take(action.group), action.drop, error))

    def _take(self, group: int) -> Group:
        self._errors.pop(group, None)
        taken = self.buffer.take(group)
        for sample in range(taken.prompt.samples):
            self._detectors.pop((group, sample), None)
        return taken

    def _batch(self, action: Action) -> None:
        now = self.now()
        began, self.ready_at = self.ready_at, None
        groups, self._groups = self._groups, []
        dropped, self._dropped = self._dropped, []
        made, self._made = self._made, 0
        seconds = (now - (now if began is None else began)) / 1e6
        self.buffer.batch(groups)
        self.batches.append(Batch(self._number, groups, dropped, made, seconds, self.version))
        self._number += 1
        if self._trace is not None:
            self._trace.flush()

    def _update(self, action: Action) -> None:
        link = self.links.get(action.engine)
        if link is not None:
            link.update(action.version)

    def _want(self, action: Action) -> None:
        self.wanted = action.count
        self.offer_wanted()
