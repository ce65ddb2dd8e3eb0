"""Run folders with recorded rollouts, of engines that keep time exactly: a scheduler, and steps
counted token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kimisys._core.rollout import EVENT, ActionKind, Config, EndReason, EventKind, Lots, Scheduler
from kimisys.rollout.trace import Trace

STEP = np.dtype(
    [
        ("start", "f8"),
        ("seconds", "f8"),
        ("batch", "i8"),
        ("kv_tokens", "i8"),
        ("prefill_tokens", "i8"),
        ("new_tokens", "i8"),
    ]
)
MODEL = {"step": 4e-3, "sequence": 2e-4, "kv_token": 1e-6, "prefill_token": 5e-5}
UPDATE, TRAIN = 0.05, 0.4  # seconds


@dataclass
class Running:
    """A lease on an engine. context: tokens that it holds; rest: that it still makes."""

    lease: int
    context: int
    rest: int
    paused: bool = False
    cold: bool = True  # its KV is still to be computed


@dataclass
class Engine:
    """What runs, and when its step ends (seconds; None: idle)."""

    running: list[Running] = field(default_factory=list)
    begun: list[Running] = field(default_factory=list)  # that the step is of
    until: float | None = None
    steps: list[tuple[float, float, int, int, int, int]] = field(default_factory=list)


class World:
    """Plays `batches` iterations and writes them down."""

    def __init__(self, config: Config, lots: Lots, engines: int, trace: Path) -> None:
        self.scheduler = Scheduler(config)
        self.trace = Trace(trace, config)
        self.lots = lots
        self.engines = [Engine() for _ in range(engines)]
        self.now = 0.0
        self.offered = 0
        self.version = 0
        self.made: dict[tuple[int, int], int] = {}
        self.batches = 0
        self.updates: list[tuple[float, int]] = []  # when an engine will serve the version

    def tell(self, kind: EventKind, **fields: int) -> None:
        event = np.zeros(1, EVENT)
        event["time"], event["kind"], event["version"] = round(self.now * 1e6), int(kind), -1
        event["engine"] = 0xFFFFFFFF
        for name, value in fields.items():
            event[name] = int(value)
        actions, answers = self.scheduler.handle_each(event)
        self.trace.add(event, actions, answers, self.scheduler.digest())
        for action in actions:
            self.act(action)

    def act(self, action: np.void) -> None:
        kind, engine = ActionKind(int(action["kind"])), int(action["engine"])
        if kind in (ActionKind.START, ActionKind.CONTINUE):
            who = (int(action["group"]), int(action["sample"]))
            made = self.made.setdefault(who, 0)
            context = int(self.lots.prompt_tokens[who[0]]) + made
            length = int(self.lots.lengths[who[0] * self.lots.samples + who[1]])
            rest = min(length, self.lots.limit) - made
            run = Running(int(action["lease"]), context, rest)
            self.engines[engine].running.append(run)
            self.whose[run.lease] = who
        elif kind == ActionKind.PAUSE:
            for run in self.engines[engine].running:
                run.paused |= run.lease == int(action["lease"])
        elif kind == ActionKind.UPDATE:
            self.updates.append((self.now + UPDATE, engine))
        elif kind == ActionKind.WANT:
            self.wanted += int(action["count"])
        elif kind == ActionKind.BATCH:
            self.batches += 1

    whose: dict[int, tuple[int, int]]
    wanted: int

    def play(self, batches: int) -> None:
        """Until so many batches are complete."""
        self.whose, self.wanted = {}, 0
        for number in range(len(self.engines)):
            self.tell(EventKind.ENGINE_JOINED, engine=number, version=0, tokens=1 << 20, count=64)
        while True:
            done = self.batches
            self.tell(EventKind.TRAINER_READY)
            while self.batches == done:
                self.proceed()
            if self.batches == batches:
                break
            self.now += TRAIN
            self.version += 1
            self.tell(EventKind.VERSION_PUBLISHED, version=self.version)
        self.trace.close()

    def proceed(self) -> None:
        """What comes next: an offer, the end of an update, the end of a step."""
        while self.wanted > 0:
            self.wanted -= 1
            group, self.offered = self.offered, self.offered + 1
            self.tell(
                EventKind.OFFERED, id=group, count=self.lots.samples,
                tokens=self.lots.prompt_tokens[group], limit=self.lots.limit,
            )  # fmt: skip
        for engine in self.engines:
            if engine.until is None and engine.running:
                self.begin(engine)
        steps = [(e.until, n) for n, e in enumerate(self.engines) if e.until is not None]
        if self.updates and (not steps or min(self.updates)[0] <= min(steps)[0]):
            self.now, number = min(self.updates)
            self.updates.remove((self.now, number))
            self.tell(EventKind.ENGINE_UPDATED, engine=number, version=self.version)
            return
        self.now, number = min(steps)
        self.finish(self.engines[number])

    def begin(self, engine: Engine) -> None:
        engine.begun = list(engine.running)
        prefill = sum(run.context for run in engine.begun if run.cold)
        kv = sum(run.context for run in engine.begun)
        batch = len(engine.begun)
        seconds = (
            MODEL["step"] + MODEL["sequence"] * batch + MODEL["kv_token"] * kv
            + MODEL["prefill_token"] * prefill
        )  # fmt: skip
        engine.steps.append((self.now, seconds, batch, kv, prefill, batch))
        engine.until = self.now + seconds

    def finish(self, engine: Engine) -> None:
        engine.until = None
        for run in engine.begun:
            run.cold = False
            run.context += 1
            run.rest -= 1
            self.made[self.whose[run.lease]] += 1
            if run.rest and not run.paused:
                self.tell(EventKind.TOKENS, id=run.lease, tokens=1)
                continue
            engine.running.remove(run)
            reason = EndReason.PAUSED if run.rest else EndReason.STOP
            self.tell(EventKind.SEGMENT_ENDED, id=run.lease, tokens=1, reason=reason)


def write_recorded(folder: Path, config: Config, lots: Lots, batches: int) -> None:
    """A run's rollouts/trace and rollouts/steps-engineN.npy of two engines."""
    (folder / "rollouts").mkdir(parents=True)
    world = World(config, lots, 2, folder / "rollouts" / "trace")
    world.play(batches)
    for number, engine in enumerate(world.engines):
        np.save(
            folder / "rollouts" / f"steps-engine{number}.npy", np.array(engine.steps, dtype=STEP)
        )
