"""Events of a world with many trajectories at once, recorded with the scheduler itself, so that the
same stream can be told again: to it and to a plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.scheduling.plain import Answer, PlainScheduler
from kimisys.rollout import ACTION, EVENT, ActionKind, Config, EndReason, EventKind, Scheduler

SAMPLES, PROMPT_TOKENS, LIMIT = 8, 100, 4096
REPORT, LAST = 16, 7  # tokens of a report; and of a lease's end
ENDS = 0.1  # share of words that are the end
Plain = Callable[[PlainScheduler], None]


@dataclass
class World:
    """Engines that make tokens at random. `fill` brings `live` trajectories to run; `words` tells
    of them. Each event is kept twice: as a record, and as a call of a plain scheduler."""

    config: Config
    live: int
    engines: int
    seed: int = 0
    records: list[tuple[dict[str, int], Plain]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.rng = np.random.default_rng(self.seed)
        self.running: dict[int, tuple[int, int, int]] = {}  # lease: group, sample, what it may make
        self.pausing: list[int] = []
        self.offered = self.version = self.taken = 0

    def fill(self) -> None:
        """Engines join, the trainer is ready, prompts are offered until all engines are full."""
        room = -(-self.live // self.engines)
        for engine in range(self.engines):
            self._event(
                lambda plain: plain.joined(room),
                kind=EventKind.ENGINE_JOINED, engine=engine, tokens=2**40, count=room, version=0,
            )  # fmt: skip
        self._event(lambda plain: plain.begin(), kind=EventKind.TRAINER_READY)
        self._tell()

    def words(self, count: int) -> None:
        """`count` events or a few more."""
        end = len(self.records) + count
        while len(self.records) < end:
            leases = np.fromiter(self.running, np.int64, len(self.running))
            size = min(512, end - len(self.records), len(leases))
            for lease in self.rng.choice(leases, size, replace=False).tolist():
                self._word(lease, bool(self.rng.random() < ENDS))
            self._tell()

    def _word(self, lease: int, stopped: bool) -> None:
        group, sample, left = self.running[lease]
        if not stopped and left > REPORT:
            self.running[lease] = group, sample, left - REPORT
            self._event(
                lambda plain: plain.tokens(group, sample, REPORT),
                kind=EventKind.TOKENS, id=lease, tokens=REPORT,
            )  # fmt: skip
            return
        cut = left <= LAST
        tokens = left if cut else LAST
        self._end(lease, EndReason.LENGTH if cut else EndReason.STOP, tokens)

    def _end(self, lease: int, reason: EndReason, tokens: int) -> None:
        group, sample, _ = self.running.pop(lease)
        stopped = reason == EndReason.STOP
        self._event(
            lambda plain: plain.ended(group, sample, stopped, tokens),
            kind=EventKind.SEGMENT_ENDED, id=lease, tokens=tokens, reason=reason,
        )  # fmt: skip

    def _event(self, plain: Plain, **fields: int) -> None:
        self.records.append((fields, plain))

    def _tell(self) -> None:
        """Hand what is new to the scheduler, obey, and so on until it has nothing more to ask."""
        while self.taken < len(self.records):
            events = as_events(self.records, self.taken)
            self.taken = len(self.records)
            for action in self.scheduler.handle(events):
                self._obey(action)
            for lease in self.pausing:
                if lease in self.running:
                    self._end(lease, EndReason.PAUSED, 0)
            self.pausing = []

    def _obey(self, action: np.void) -> None:
        kind, lease = int(action["kind"]), int(action["lease"])
        if kind in (ActionKind.START, ActionKind.CONTINUE):
            place = int(action["group"]), int(action["sample"]), int(action["limit"])
            self.running[lease] = place
        elif kind == ActionKind.PAUSE:
            self.pausing.append(lease)
        elif kind == ActionKind.WANT:
            for _ in range(int(action["count"])):
                self._offer()
        elif kind == ActionKind.BATCH:
            self._turn()

    def _offer(self) -> None:
        group, self.offered = self.offered, self.offered + 1
        self._event(
            lambda plain: plain.offered(group, SAMPLES, LIMIT),
            kind=EventKind.OFFERED, id=group, tokens=PROMPT_TOKENS, count=SAMPLES, limit=LIMIT,
        )  # fmt: skip

    def _turn(self) -> None:
        """The trainer's, after a batch."""
        self.version += 1
        version = self.version
        self._event(
            lambda plain: plain.published(version),
            kind=EventKind.VERSION_PUBLISHED, version=version,
        )  # fmt: skip
        for engine in range(self.engines):
            self._event(
                lambda plain: None,
                kind=EventKind.ENGINE_UPDATED, engine=engine, version=version,
            )  # fmt: skip
        self._event(lambda plain: plain.begin(), kind=EventKind.TRAINER_READY)


def as_events(records: list[tuple[dict[str, int], Plain]], start: int = 0) -> np.ndarray:
    """EVENT[n] of those from `start` on, a microsecond apart."""
    chosen = records[start:]
    events = np.zeros(len(chosen), EVENT)
    events["time"] = np.arange(start, start + len(chosen))
    for name in ("kind", "engine", "id", "tokens", "limit", "count", "version", "reason"):
        default = {"engine": 2**32 - 1, "version": -1}.get(name, 0)
        events[name] = [int(fields.get(name, default)) for fields, _ in chosen]
    return events


def as_answers(actions: np.ndarray) -> list[Answer]:
    """ACTION[n] as a plain scheduler answers."""
    assert actions.dtype == ACTION
    names = {int(kind): kind.name.lower() for kind in ActionKind}
    counted = {"hand_over": "count", "batch": "count", "want": "count", "update": "version"}
    answers = []
    for action in actions:
        kind = names[int(action["kind"])]
        placed = kind in ("start", "continue", "pause")
        last = 0 if kind == "pause" else int(action[counted.get(kind, "limit")])
        answers.append(
            (
                kind,
                int(action["engine"]) if placed or kind == "update" else 0,
                int(action["group"]) if placed or kind == "hand_over" else 0,
                int(action["sample"]) if placed else 0,
                int(action["tokens"]),
                last,
            )
        )
    return answers


def same(ours: list[Answer], plain: list[Answer]) -> bool:
    """Whether they are the same in the same order, but for the pauses of an engine's leases, which
    come in no order."""
    mine, theirs = ([a for a in each if a[0] != "pause"] for each in (ours, plain))
    return mine == theirs and sorted(ours) == sorted(plain)
