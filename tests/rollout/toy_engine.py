"""An engine that really generates, in the event loop, with a speed and with faults to choose.

The first output token comes from the seed and decides the length; every later one follows from the
context. So `whole` can say what a trajectory must be, however it was cut, moved and continued.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kimisys.rollout import EngineStats, Prompt, SegmentOutput, SegmentRequest

PROMPT_TOKENS = 3
VOCABULARY = 1000


def prompt(key: int, samples: int = 2, limit: int = 64) -> Prompt:
    return Prompt(key, [key % 7, 11, 13], samples, limit)


def long_tailed(first: int) -> int:
    """Tokens of a trajectory that begins with `first`: mostly short, at times very long."""
    return 3 + first % 17 if first % 10 else 60 + first // 10


def following(context: Sequence[int]) -> int:
    return (context[-1] * 31 + context[-2] * 7 + len(context)) % VOCABULARY


def log_prob(token: int) -> float:
    return -(token + 1) / VOCABULARY


def whole(prompt: Prompt, first: int, length: Callable[[int], int]) -> list[int]:
    """The trajectory as it must be."""
    context = [*prompt.token_ids, first]
    while len(context) - PROMPT_TOKENS < min(length(first), prompt.limit):
        context.append(following(context))
    return context[PROMPT_TOKENS:]


@dataclass
class Running:
    request: SegmentRequest
    context: list[int]
    made: int = 0


@dataclass
class ToyEngine:
    """One token for each sequence in a step of `step` seconds.

    Faults: `fault(engine)` is called before each step and may change anything, or raise: the
    stream then raises it.
    """

    step: float = 0.001
    version: int | None = 0
    kv_capacity: int = 1 << 20
    max_sequences: int = 16
    length: Callable[[int], int] = long_tailed
    fault: Callable[[ToyEngine], None] = lambda engine: None
    deaf: bool = False  # abort() does nothing
    loops: Callable[[int], bool] = lambda first: False  # says the first token for ever
    silent: bool = False  # steps make nothing
    stuck: bool = False  # start() does not return
    lies: Callable[[SegmentOutput], SegmentOutput] = lambda output: output
    refuses: Callable[[SegmentRequest], bool] = lambda request: False
    running: dict[int, Running] = field(default_factory=dict)
    waiting: list[Running] = field(default_factory=list)
    steps: int = 0
    started: list[list[int]] = field(default_factory=list)  # leases by call of start()
    updates: list[int] = field(default_factory=list)
    most: int = 0  # sequences at once
    closed: bool = False
    _out: list[SegmentOutput] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, segments: Sequence[SegmentRequest]) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.started.append([s.lease for s in segments])
        for segment in segments:
            assert segment.lease not in self.running
            if self.refuses(segment):
                self._out.append(SegmentOutput(segment.lease, reason="failed", error="too long"))
            else:
                self.waiting.append(Running(segment, list(segment.token_ids)))
        self._wake.set()

    async def abort(self, leases: Sequence[int]) -> None:
        if self.deaf:
            return
        for lease in leases:
            if self.running.pop(lease, None) is not None or self._unqueue(lease):
                self._out.append(self._output(lease, [], "paused"))
        self._wake.set()

    async def stats(self) -> EngineStats:
        held = sum(len(r.context) for r in self.running.values())
        return EngineStats(
            self.version, self.kv_capacity, self.max_sequences, held, len(self.running),
            len(self.waiting),
        )  # fmt: skip

    async def update(self, version: int) -> None:
        assert not self.running and not self.waiting, "update while something runs"
        await asyncio.sleep(self.step)
        self.version = version
        self.updates.append(version)

    async def stream(self) -> AsyncIterator[Sequence[SegmentOutput]]:
        while not self.closed:
            if not (self._out or self.running or self.waiting):
                self._wake.clear()
                await self._wake.wait()
            self.fault(self)
            self._step()
            await asyncio.sleep(self.step)
            if self._out:
                out, self._out = self._out, []
                yield [self.lies(output) for output in out]

    def close(self) -> None:
        self.closed = True
        self._wake.set()

    def _unqueue(self, lease: int) -> bool:
        before = len(self.waiting)
        self.waiting = [r for r in self.waiting if r.request.lease != lease]
        return len(self.waiting) < before

    def _step(self) -> None:
        self.steps += 1
        if self.silent:
            return
        while self.waiting and len(self.running) < self.max_sequences:
            begun = self.waiting.pop(0)
            self.running[begun.request.lease] = begun
        self.most = max(self.most, len(self.running))
        for lease, sequence in list(self.running.items()):
            token = self._token(sequence)
            sequence.context.append(token)
            sequence.made += 1
            first = sequence.context[PROMPT_TOKENS]
            reason = ""
            made = len(sequence.context) - PROMPT_TOKENS
            if made >= self.length(first) and not self.loops(first):
                reason = "stop"
            elif sequence.made == sequence.request.max_tokens:
                reason = "length"
            if reason:
                del self.running[lease]
            self._out.append(self._output(lease, [token], reason))

    def _token(self, sequence: Running) -> int:
        if len(sequence.context) == PROMPT_TOKENS:
            return random.Random(sequence.request.seed).randrange(VOCABULARY)
        if self.loops(sequence.context[PROMPT_TOKENS]):
            return sequence.context[-1]
        return following(sequence.context)

    def _output(self, lease: int, tokens: list[int], reason: str) -> SegmentOutput:
        version = -1 if self.version is None else self.version
        return SegmentOutput(lease, tokens, [log_prob(t) for t in tokens], version, reason)
