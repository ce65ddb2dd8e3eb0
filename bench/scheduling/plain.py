"""A scheduler of the same semantics as a plain Python state machine, for one of the policies.

Whole or budgeted iterations in turns with the trainer, first in first out, each trajectory to the
engine with the fewest. It keeps no deadlines, no staleness, no ledger and no digest, and trusts its
caller: less than what it is compared with.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

Answer = tuple[str, int, int, int, int, int]
"""What to do: kind, engine, group, sample, tokens, limit or count; 0 where there is none."""


class Trajectory:
    """One sample of a group."""

    __slots__ = ("engine", "finished", "group", "limit", "number", "running", "sample", "tokens")

    def __init__(self, group: int, number: int, sample: int, limit: int) -> None:
        self.group, self.number, self.sample, self.limit = group, number, sample, limit
        self.tokens, self.engine = 0, -1
        self.running = self.finished = False


class PlainScheduler:
    """See the head of this file. budget: output tokens of an iteration, or 0: whole ones;
    groups: most of a batch, or with a budget 0: all."""

    def __init__(self, budget: int, groups: int) -> None:
        self.budget, self.groups = budget, groups
        self.answers: list[Answer] = []
        self.room: list[int] = []  # by engine
        self.sequences: list[int] = []
        self.leases: list[dict[tuple[int, int], Trajectory]] = []
        self.all: dict[tuple[int, int], Trajectory] = {}
        self.of_group: dict[int, list[Trajectory]] = {}
        self.queue: list[tuple[bool, int, int, Trajectory]] = []
        self.unadmitted: deque[int] = deque()
        self.complete: list[tuple[int, int]] = []  # number, group; a heap
        self.unfinished: dict[int, int] = {}
        self.offers = self.admitted = self.running = self.spent = self.wanted = 0
        self.ready = self.closing = False

    def joined(self, max_sequences: int) -> None:
        """One more engine; its number is how many there were."""
        self.room.append(max_sequences)
        self.sequences.append(0)
        self.leases.append({})
        self._settle()

    def begin(self) -> None:
        """The trainer is ready."""
        self.ready, self.wanted = True, 0
        self._settle()

    def offered(self, group: int, samples: int, limit: int) -> None:
        """A prompt."""
        made = [Trajectory(group, self.offers, sample, limit) for sample in range(samples)]
        self.offers += 1
        self.of_group[group] = made
        self.unfinished[group] = samples
        self.all.update({(group, one.sample): one for one in made})
        self.unadmitted.append(group)
        self.wanted = max(self.wanted - 1, 0)
        if not self.wanted:
            self._settle()

    def tokens(self, group: int, sample: int, count: int) -> None:
        """A trajectory that runs made more."""
        self.all[group, sample].tokens += count
        before, self.spent = self.spent, self.spent + count
        if before < self.budget <= self.spent:
            self._settle()

    def ended(self, group: int, sample: int, stopped: bool, count: int) -> None:
        """Its lease ended, by the model or by a limit or as asked."""
        one = self.all[group, sample]
        one.tokens += count
        self.spent += count
        one.running = False
        self.running -= 1
        self.sequences[one.engine] -= 1
        del self.leases[one.engine][group, sample]
        if stopped or one.tokens == one.limit:
            one.finished = True
            self.unfinished[group] -= 1
            if not self.unfinished[group]:
                heappush(self.complete, (one.number, group))
        else:
            self._wait(one)
        self._settle()

    def published(self, version: int) -> None:
        """Engines, which are idle, are to take it."""
        for engine in range(len(self.room)):
            self.answers.append(("update", engine, 0, 0, 0, version))

    def _wait(self, one: Trajectory) -> None:
        heappush(self.queue, (one.tokens == 0, one.number, one.sample, one))

    def _settle(self) -> None:
        if self.budget:
            done = self.ready and bool(self.complete) and self.spent >= self.budget
        else:
            done = self.ready and len(self.complete) >= self.groups
        if done and self.running:
            if not self.closing:
                for lease in self.leases:
                    for one in lease.values():
                        self.answers.append(
                            ("pause", one.engine, one.group, one.sample, one.tokens, 0)
                        )
            self.closing = True
            return
        self.closing = False
        if done:
            self._hand_over()
        if self.ready:
            self._start()
            self._want()

    def _hand_over(self) -> None:
        count = total = 0
        while self.complete and (not self.groups or count < self.groups):
            _, group = heappop(self.complete)
            made = self.of_group.pop(group)
            tokens = sum(one.tokens for one in made)
            for one in made:
                del self.all[group, one.sample]
            self.answers.append(("hand_over", 0, group, 0, tokens, len(made)))
            count, total = count + 1, total + tokens
        self.answers.append(("batch", 0, 0, 0, total, count))
        self.admitted -= count
        self.ready, self.spent = False, 0

    def _may_admit(self) -> bool:
        if not self.unadmitted:
            return False
        if self.budget:
            return self.spent < self.budget or self.admitted == len(self.complete)
        return self.admitted < self.groups

    def _admit(self) -> None:
        self.admitted += 1
        for one in self.of_group[self.unadmitted.popleft()]:
            self._wait(one)

    def _start(self) -> None:
        while not self.budget and self._may_admit():
            self._admit()
        while True:
            if not self.queue:
                for _ in range(len(self.room)):
                    if not self._may_admit():
                        break
                    self._admit()
            engine = min(range(len(self.room)), key=self.sequences.__getitem__, default=-1)
            if not self.queue or engine < 0 or self.sequences[engine] >= self.room[engine]:
                return
            self._lease(heappop(self.queue)[-1], engine)

    def _lease(self, one: Trajectory, engine: int) -> None:
        limit = one.limit - one.tokens
        if self.spent < self.budget:
            limit = min(limit, self.budget - self.spent)
        one.engine, one.running = engine, True
        self.running += 1
        self.sequences[engine] += 1
        self.leases[engine][one.group, one.sample] = one
        kind = "continue" if one.tokens else "start"
        self.answers.append((kind, engine, one.group, one.sample, one.tokens, limit))

    def _want(self) -> None:
        if self.wanted:
            return
        ahead, engines = len(self.unadmitted), len(self.room)
        if self.budget:
            self.wanted = 2 * engines - ahead if ahead < engines else 0
        else:
            self.wanted = max(self.groups - self.admitted - ahead, 0)
        if self.wanted:
            self.answers.append(("want", 0, 0, 0, 0, self.wanted))
