"""An engine as the driver of a run sees it: who lets it follow versions, and how busy it was."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kimisys.adapters.ray import ActorLostError
from kimisys.errors import DigestError
from kimisys.rollout import EngineStats, SegmentOutput, SegmentRequest
from kimisys.trainer.engine_client import EngineClient
from kimisys.trainer.engines import Sync
from kimisys.trainer.watch import Watch, probe_gap

_BOUNDLESS = 1 << 31  # more than any engine has, and the scheduler takes


@dataclass(frozen=True)
class Followed:
    """What following a version took. seconds: the slowest engine's. gap: the largest difference of
    a probe's log-probabilities from the trainer's."""

    seconds: float = 0.0
    gap: float = 0.0


class Following:
    """Lets engines take a version each when nothing runs there (--deployment disaggregated), and
    compares at once what they compute with the trainer: the same checks as those of a whole sync.

    probe: tokens. Called in the event loop of the rollouts; all else is the master's.
    """

    def __init__(self, watch: Watch, probe: Sequence[int]) -> None:
        self._watch, self._probe = watch, probe
        self._version = 0
        self._expected = np.zeros((0, 0), np.float32)
        self._followed: list[Followed] = []
        self._changed = threading.Condition()

    def expect(self, version: int, log_probs: np.ndarray) -> None:
        """The trainer's log-softmax after each token of the probe but the last, under `version`,
        which is about to be published to the engines."""
        with self._changed:
            self._version, self._expected, self._followed = version, log_probs, []

    def wait(self, engines: int, check: Callable[[], None], seconds: float) -> Followed:
        """Wait until so many engines serve what is expected: before the ranks overwrite it.

        check: raises what has ended the rollouts. Raises ActorLostError after `seconds`.
        """
        if not self._version:
            return Followed()
        deadline = time.monotonic() + seconds
        with self._changed:
            while len(self._followed) < engines:
                check()
                self._changed.wait(1.0)
                if time.monotonic() > deadline:
                    raise ActorLostError(
                        f"{engines - len(self._followed)} of {engines} engines did not follow to "
                        f"version {self._version} within {seconds:.0f} s; see what they are doing, "
                        "or give them longer (--ready-timeout)"
                    )
            slowest = max(one.seconds for one in self._followed)
            return Followed(slowest, max(one.gap for one in self._followed))

    async def __call__(self, client: EngineClient, version: int) -> None:
        """Let an engine take `version`; one that arrives damaged is refused, and pulled in full.

        Raises DigestError when that is refused too, EngineMismatchError.
        """
        start = time.perf_counter()
        try:
            report = await client.update(version)
        except DigestError:
            self._watch.digest_mismatches += 1
            report = await client.update(version, full=True)
        seconds = time.perf_counter() - start
        gap = probe_gap(self._expected, await client.probe(self._probe, version))
        self._watch.note_probe(version, gap, served=True)
        with self._changed:
            self._watch.sync_seconds.append(seconds)
            self._watch.note_sync(Sync.of(version, [report]))
            self._followed.append(Followed(seconds, gap))
            self._changed.notify_all()


class RolloutEngine:
    """The engine protocol of kimisys.rollout over `client`.

    following: None: whoever publishes lets the engine follow before he tells the driver. bounded:
    whether the scheduler heeds what the engine holds; otherwise the engine queues what is too much.
    """

    def __init__(
        self, client: EngineClient, following: Following | None = None, bounded: bool = True
    ) -> None:
        self._client, self._following, self._bounded = client, following, bounded
        self._running: set[int] = set()
        self._since, self._busy = 0.0, 0.0

    @property
    def busy_seconds(self) -> float:
        """In which something ran, so far."""
        return self._busy + (time.monotonic() - self._since if self._running else 0.0)

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        if not self._running:
            self._since = time.monotonic()
        self._running.update(segment.lease for segment in segments)
        await self._client.start(segments)

    async def abort(self, leases: Sequence[int]) -> None:
        await self._client.abort(leases)

    async def stats(self) -> EngineStats:
        stats = await self._client.stats()
        if self._bounded:
            return stats
        return replace(stats, kv_capacity=_BOUNDLESS, max_sequences=_BOUNDLESS)

    async def update(self, version: int) -> None:
        if self._following is not None:
            await self._following(self._client, version)

    async def stream(self) -> AsyncIterator[Sequence[SegmentOutput]]:
        async for outputs in self._client.stream():
            ended = {output.lease for output in outputs if output.reason} & self._running
            self._running -= ended
            if ended and not self._running:
                self._busy += time.monotonic() - self._since
            yield outputs
