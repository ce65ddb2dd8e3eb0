"""The Scheduler's binding: records, methods, errors, what it shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kimisys.errors import SchedulerError
from kimisys.rollout import ACTION, EVENT, Config, EndReason, EventKind, Scheduler, as_actions

NO_ENGINE = 0xFFFFFFFF


def test_records_are_those_of_the_core() -> None:
    assert EVENT.itemsize == 64 and ACTION.itemsize == 72
    assert EVENT.names is not None and EVENT.names[:4] == ("time", "kind", "engine", "id")
    scheduler = Scheduler(Config(groups=1))
    for wrong in (np.zeros(3), np.zeros((2, 2), EVENT), np.zeros(2, ACTION)):
        with pytest.raises(SchedulerError, match=r"dtype kimisys\.rollout\.EVENT"):
            scheduler.handle(wrong)
    assert len(scheduler.handle(np.zeros(0, EVENT))) == 0
    strided = np.zeros(6, EVENT)
    strided["engine"][::2] = NO_ENGINE
    strided["time"] = np.arange(6)
    assert len(scheduler.handle(strided[::2])) == 0  # not contiguous; three times kTime


def test_methods_and_records_say_the_same() -> None:
    by_method, by_record = Scheduler(Config(groups=1)), Scheduler(Config(groups=1))
    actions = by_method.published(1, 0) + by_method.joined(2, 7, 0, 1000, 4) + by_method.ready(3)
    actions += by_method.offered(4, 0, 1, 5, 9)
    actions += by_method.tokens(5, actions[-1].lease, 3) + by_method.stats(6, 7, 8)
    lease = next(a.lease for a in actions if a.kind == "start")
    actions += by_method.elapsed(7) + by_method.ended(8, lease, "stop", 2)
    kinds = [8, 4, 9, 1, 2, 10, 0, 3]
    events = np.zeros(8, EVENT)
    events["kind"], events["time"] = kinds, np.arange(1, 9)
    events["engine"], events["version"] = NO_ENGINE, -1
    events["version"][:2] = 0
    events["engine"][[1, 5]] = 7
    events["tokens"][[1, 3, 4, 5, 7]] = 1000, 5, 3, 8, 2
    events["count"][[1, 3]] = 4, 1
    events["limit"][3] = 9
    events["id"][[4, 7]] = lease
    events["reason"][7] = EndReason.STOP
    assert as_actions(by_record.handle(events)) == actions
    assert by_record.digest() == by_method.digest()
    assert [a.kind for a in actions][-2:] == ["hand_over", "batch"]
    assert "Action(hand_over, group=0" in repr(actions[-2])


def test_a_refused_event_says_what_was_decided_before_it() -> None:
    scheduler = Scheduler(Config(groups=1))
    scheduler.joined(0, 0, 0, 1000, 4)
    events = np.zeros(3, EVENT)
    events["kind"] = [EventKind.TRAINER_READY, EventKind.TIME, EventKind.SEGMENT_ENDED]
    events["engine"], events["id"] = NO_ENGINE, [0, 0, 55]
    with pytest.raises(SchedulerError, match="lease 55") as refused:
        scheduler.handle(events)
    error: Any = refused.value
    assert error.taken == 2
    assert [a.kind for a in as_actions(error.actions)] == ["want"]
    assert error.answers.tolist() == [0]


def test_configurations_print_and_compare() -> None:
    config = Config(groups=4, order="fifo", over_issue=1.5)
    assert repr(config) == "Config(order='fifo', groups=4, over_issue=1.5)"
    assert eval(repr(config), {"Config": Config}) == config == Config(**config.fields())
    assert hash(config) == hash(Config(**config.fields())) and config != config.replace(groups=5)
    assert config.replace(groups=5).groups == 5
    with pytest.raises(SchedulerError, match="it is one of: fifo, longest_first, probe_first"):
        Config(order="lifo", groups=1)
    with pytest.raises(SchedulerError, match="token_budget and groups are both 0"):
        Config()
    with pytest.raises(AttributeError):
        config.groups = 3  # type: ignore[misc]


def test_blockers_counts_and_the_ledger() -> None:
    scheduler = Scheduler(Config(groups=1))
    assert scheduler.next_deadline() is None
    scheduler.joined(0, 3, 0, 1000, 4)
    scheduler.ready(10)
    assert "prompts" in [b.kind for b in scheduler.blockers()]
    start = scheduler.offered(20, 5, 1, 7, 100)[0]
    blocker = next(b for b in scheduler.blockers() if b.kind == "running")
    assert (blocker.engine, blocker.group, blocker.since) == (3, 5, 20)
    assert repr(blocker).startswith("Blocker(running, since=20, engine=3, lease=")
    assert scheduler.next_deadline() == start.deadline == 20 + scheduler.config.lease_timeout
    scheduler.tokens(30, start.lease, 40)
    assert scheduler.counts().spent == 40 and "running=1" in repr(scheduler.counts())
    scheduler.ended(40, start.lease, "stop", 2)
    ledger = scheduler.ledger()
    assert ledger.trained.tokens == 42 and ledger.trained.count[6] == 1  # 32 to 63 tokens
    assert ledger.ended["stop"].trajectories == 1 and set(ledger.dropped) == {
        "stale", "failures", "empty",
    }  # fmt: skip
    assert ledger.stale[0] == 42 and len(ledger.stale) == 65
    with pytest.raises(SchedulerError, match="it is one of: stop, length"):
        scheduler.ended(50, start.lease, "done")
