"""The Scheduler against an independent model of what must always be true, over random worlds of
legal events and all combinations of policies."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kimisys.errors import SchedulerError
from kimisys.rollout import (
    EVENT,
    Action,
    Config,
    EndReason,
    EventKind,
    Scheduler,
    as_actions,
)

NO_ENGINE = 0xFFFFFFFF
TIMEOUT = 1_000  # microseconds
LIMIT = 40
SAMPLES = 3

PARTS: dict[str, list[Any]] = {
    "deployment": ["alternate", "overlap"],
    "placement": ["group_round_robin", "least_loaded", "kv_aware", "sticky"],
    "order": ["fifo", "longest_first", "probe_first"],
    "staleness": ["wait", "drop", "admission"],
    "concurrency": ["fixed", "kv"],
    "update": ["interrupt", "drain"],
    "token_budget": [0, 30, 200],
    "groups": [0, 1, 3],
    "over_issue": [1.0, 2.0],
    "segment_tokens": [0, 4],
    "live_limit": [0, 4],
    "max_staleness": [-1, 1, 3],
    "max_failures": [1, 3],
}


def legal(fields: dict[str, Any]) -> bool:
    try:
        Config(lease_timeout=TIMEOUT, **fields)
    except SchedulerError:
        return False
    return True


configs = (
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in PARTS.items()})
    .filter(legal)
    .map(lambda fields: Config(lease_timeout=TIMEOUT, **fields))
)


@dataclasses.dataclass
class Running:
    """A lease, as the world knows it."""

    engine: int
    group: int
    sample: int
    limit: int
    version: int
    made: int = 0
    pausing: bool = False


@dataclasses.dataclass
class Sample:
    tokens: int = 0
    versions: set[int] = dataclasses.field(default_factory=set)
    finished: bool = False
    lease: int | None = None


class World(RuleBasedStateMachine):
    """Engines, a trainer and prompts; it knows nothing of how the scheduler decides."""

    @initialize(config=configs)
    def begin(self, config: Config) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.now = 0
        self.log: list[np.ndarray] = []
        self.answers: list[bytes] = []
        self.leases: dict[int, Running] = {}
        self.dead: list[int] = []
        self.groups: dict[int, list[Sample]] = {}
        self.gone: dict[int, str] = {}  # group → handed over, or why it was dropped
        self.engines: dict[int, int] = {}  # number → version
        self.leaving: set[int] = set()
        self.updating: dict[int, int] = {}
        self.joined = 0
        self.wanted = 0
        self.version = 0
        self.ready = False
        self.batch: list[int] = []
        self.spent = 0
        self.tell(EventKind.VERSION_PUBLISHED, version=0)
        self.join()

    # The world's side of the contract.

    def tell(self, kind: EventKind, **fields: int) -> None:
        event = np.zeros(1, EVENT)
        event["engine"], event["version"] = NO_ENGINE, -1
        for name, value in {"time": self.now, "kind": kind, **fields}.items():
            event[name] = value
        actions = self.scheduler.handle(event)
        self.log.append(event)
        self.answers.append(actions.tobytes())
        for action in as_actions(actions):
            getattr(self, f"on_{action.kind}")(action)

    def on_start(self, action: Action) -> None:
        sample = self.groups[action.group][action.sample]
        assert sample.lease is None, "on two engines at once"
        assert not sample.finished and action.group not in self.gone
        assert action.tokens == sample.tokens
        assert action.lease not in self.leases and action.lease not in self.dead, "used again"
        assert action.engine in self.engines and action.engine not in self.leaving
        assert action.engine not in self.updating
        assert 1 <= action.limit <= LIMIT - sample.tokens
        if self.config.segment_tokens:
            assert action.limit <= self.config.segment_tokens
        assert action.deadline == self.now + TIMEOUT
        version = self.engines[action.engine]
        if self.config.deployment == "alternate":
            assert version == self.version and self.ready
        sample.lease = action.lease
        self.leases[action.lease] = Running(
            action.engine, action.group, action.sample, action.limit, version
        )
        assert sum(r.engine == action.engine for r in self.leases.values()) <= 4

    def on_continue(self, action: Action) -> None:
        assert action.tokens > 0
        self.on_start(action)

    def on_pause(self, action: Action) -> None:
        self.leases[action.lease].pausing = True

    def on_abort(self, action: Action) -> None:
        self.kill(action.lease)

    def on_requeue(self, action: Action) -> None:
        if action.lease in self.leases:
            self.kill(action.lease)
        assert self.groups[action.group][action.sample].tokens == action.tokens, "tokens lost"

    def on_hand_over(self, action: Action) -> None:
        assert action.group not in self.gone, "twice"
        samples = self.groups[action.group]
        assert all(s.finished and s.lease is None for s in samples)
        oldest = min((v for s in samples for v in s.versions), default=-1)
        assert action.version == oldest
        if self.config.max_staleness >= 0 and oldest >= 0:
            assert self.version - oldest <= self.config.max_staleness, "stale"
        self.gone[action.group] = "trained"
        self.batch.append(action.group)

    def on_batch(self, action: Action) -> None:
        assert self.ready and len(self.batch) == action.count > 0
        if self.config.groups:
            assert action.count <= self.config.groups
        if not self.config.token_budget:
            assert action.count == self.config.groups
        elif self.spent < self.config.token_budget:
            # Only admission may hold back what would be needed to spend it.
            assert self.config.staleness == "admission" and not self.leases
            left = [s for g, samples in self.groups.items() if g not in self.gone for s in samples]
            assert all(s.finished or not s.tokens for s in left)
        if self.config.deployment == "alternate":
            assert not self.leases, "the engines are at rest when the trainer's turn comes"
        self.ready, self.batch, self.spent = False, [], 0

    def on_drop(self, action: Action) -> None:
        assert action.group not in self.gone, "twice"
        assert action.drop in ("stale", "failures", "empty")
        self.gone[action.group] = action.drop
        assert all(r.group != action.group for r in self.leases.values()), "dropped while it runs"

    def on_update(self, action: Action) -> None:
        assert not any(r.engine == action.engine for r in self.leases.values()), "not idle"
        assert action.version == self.version
        self.updating[action.engine] = action.version

    def on_want(self, action: Action) -> None:
        assert self.wanted == 0 and action.count > 0
        self.wanted = action.count

    def kill(self, lease: int) -> None:
        running = self.leases.pop(lease)
        sample = self.groups[running.group][running.sample]
        sample.lease = None
        sample.finished |= sample.tokens == LIMIT  # whatever ended it, nothing is left to make
        self.dead.append(lease)

    def made(self, lease: int, tokens: int) -> None:
        running = self.leases[lease]
        running.made += tokens
        self.spent += tokens
        sample = self.groups[running.group][running.sample]
        sample.tokens += tokens
        if tokens:
            sample.versions.add(running.version)

    def pick(self, of: Any, among: list[int]) -> int | None:
        return among[of % len(among)] if among else None

    # What may happen.

    @rule(wait=st.integers(0, TIMEOUT // 2))
    def time(self, wait: int) -> None:
        self.now += wait
        self.tell(EventKind.TIME)
        due = self.scheduler.next_deadline()
        assert due is None or due > self.now or self.wanted

    @rule(count=st.integers(1, 4))
    def offer(self, count: int) -> None:
        for _ in range(min(count, self.wanted) if self.wanted else 1):
            self.wanted = max(0, self.wanted - 1)
            number = len(self.groups)
            self.groups[number] = [Sample() for _ in range(SAMPLES)]
            self.tell(EventKind.OFFERED, id=number, tokens=5, limit=LIMIT, count=SAMPLES)

    @rule(of=st.integers(0, 99), tokens=st.integers(0, LIMIT))
    def tokens(self, of: int, tokens: int) -> None:
        lease = self.pick(of, list(self.leases))
        if lease is not None:
            tokens = min(tokens, self.leases[lease].limit - self.leases[lease].made)
            self.made(lease, tokens)
            self.tell(EventKind.TOKENS, id=lease, tokens=tokens)

    @rule(
        of=st.integers(0, 99),
        tokens=st.integers(0, 9),
        reason=st.sampled_from(["stop", "stop", "length", "repetition", "failed", "paused"]),
    )
    def end(self, of: int, tokens: int, reason: str) -> None:
        lease = self.pick(of, list(self.leases))
        if lease is None:
            return
        running = self.leases[lease]
        left = running.limit - running.made
        tokens = left if reason == "length" else min(tokens, left)
        if reason == "paused" and not running.pausing:
            return
        self.made(lease, tokens)
        sample = self.groups[running.group][running.sample]
        sample.finished = reason in ("stop", "repetition")
        self.kill(lease)
        code = EndReason[reason.upper()]
        self.tell(EventKind.SEGMENT_ENDED, id=lease, tokens=tokens, reason=code)

    @rule(of=st.integers(0, 999), tokens=st.integers(0, 5))
    def late(self, of: int, tokens: int) -> None:
        lease = self.pick(of, self.dead)
        if lease is not None:
            before = self.scheduler.counts().spent
            self.tell(EventKind.TOKENS, id=lease, tokens=tokens)
            assert self.scheduler.counts().spent == before

    @rule()
    def join(self) -> None:
        if len(self.engines) < 3:
            number, self.joined = self.joined, self.joined + 1
            self.engines[number] = self.version
            self.tell(
                EventKind.ENGINE_JOINED, engine=number, tokens=100, count=4, version=self.version
            )

    @rule(of=st.integers(0, 9), dies=st.booleans())
    def part(self, of: int, dies: bool) -> None:
        engine = self.pick(of, [e for e in self.engines if dies or e not in self.leaving])
        if engine is None:
            return
        if not dies:
            self.leaving.add(engine)
            self.updating.pop(engine, None)
            self.tell(EventKind.ENGINE_LEFT, engine=engine)
        else:
            self.updating.pop(engine, None)
            if engine in self.leaving and not self.holds(engine):
                return
            del self.engines[engine]
            self.leaving.discard(engine)
            self.tell(EventKind.ENGINE_FAILED, engine=engine)
            assert not self.holds(engine)

    @rule(seed=st.integers(0, 1 << 30), rounds=st.integers(1, 40))
    def work(self, seed: int, rounds: int) -> None:
        """All that is honest and diligent, for a while: so that iterations come to their ends."""
        rng = random.Random(seed)
        for _ in range(rounds):
            self.now += 10
            if rng.random() < 0.3:
                self.publish()
            self.trainer()
            while self.updating:
                self.updated(0)
            if self.wanted:
                self.offer(4)
            for place in range(len(self.leases)):
                if rng.random() < 0.1:
                    self.end(
                        place, rng.randrange(9), rng.choice(["stop"] * 5 + ["length", "failed"])
                    )
                else:
                    self.tokens(place, rng.randrange(8))
            for lease in [n for n, r in self.leases.items() if r.pausing]:
                if lease in self.leases:
                    self.end(list(self.leases).index(lease), 0, "paused")

    def holds(self, engine: int) -> bool:
        return any(r.engine == engine for r in self.leases.values())

    @rule(of=st.integers(0, 9))
    def updated(self, of: int) -> None:
        engine = self.pick(of, list(self.updating))
        if engine is not None:
            self.engines[engine] = self.updating.pop(engine)
            self.tell(EventKind.ENGINE_UPDATED, engine=engine, version=self.engines[engine])

    @rule()
    def publish(self) -> None:
        if self.config.deployment == "overlap" or not self.ready:
            self.version += 1
            self.tell(EventKind.VERSION_PUBLISHED, version=self.version)

    @rule()
    def trainer(self) -> None:
        if not self.ready:
            self.ready = True
            self.wanted = 0
            self.tell(EventKind.TRAINER_READY)

    @invariant()
    def consistent(self) -> None:
        for engine in [e for e in self.leaving if not self.holds(e)]:
            self.leaving.discard(engine)
            self.engines.pop(engine, None)
        self.scheduler.audit()
        counts, ledger = self.scheduler.counts(), self.scheduler.ledger()
        assert counts.running == len(self.leases)
        assert counts.groups == len(self.groups) - len(self.gone)
        assert ledger.trained_groups == sum(v == "trained" for v in self.gone.values())
        assert ledger.dropped_groups == sum(v != "trained" for v in self.gone.values())
        for group, samples in self.groups.items():
            if group not in self.gone:
                assert sum(s.tokens for s in samples) <= SAMPLES * LIMIT

    def teardown(self) -> None:
        """The same events, alone and together, make the same decisions."""
        if not getattr(self, "log", None):
            return
        again = Scheduler(self.config)
        events = np.concatenate(self.log)
        assert again.handle(events).tobytes() == b"".join(self.answers)
        assert again.digest() == self.scheduler.digest()
        assert Scheduler(self.config).digest() != again.digest()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
