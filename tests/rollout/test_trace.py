"""Traces: what was recorded decides the same again; what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from driving import BUDGET, Prompts, iterate
from toy_engine import ToyEngine
from virtual_time import run

from kimisys.errors import SchedulerError
from kimisys.rollout import (
    EVENT,
    ActionKind,
    Config,
    Driver,
    EventKind,
    Scheduler,
    Trace,
    read_trace,
    replay,
)

CHUNK_HEAD = 24


def recorded(path: Path, config: Config = BUDGET, batches: int = 4) -> int:
    """A trace of a run over two engines; returns the scheduler's digest after it."""

    async def main() -> int:
        engines = [ToyEngine(), ToyEngine(max_sequences=5)]
        async with Driver(config, engines, Prompts(), trace=path) as driver:
            await iterate(driver, batches)
        return driver.scheduler.digest()

    return run(main())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "trace"
    recorded(path)
    return path


def test_a_run_is_recorded_whole(trace: Path, tmp_path: Path) -> None:
    recording = read_trace(trace)
    assert recording.config == BUDGET and recording.unread == 0
    events = recording.events
    assert events.dtype == EVENT and (np.diff(events["time"]) >= 0).all()
    assert (events["kind"] == EventKind.TRAINER_READY).sum() == 4
    scheduler = Scheduler(recording.config)
    scheduler.handle(events)
    assert scheduler.digest() == recorded(tmp_path / "again")  # virtual time: the same run


def test_a_replay_says_which_event_each_action_answers(trace: Path) -> None:
    again = replay(trace)
    assert again.equal and again.first_difference is None and again.config == BUDGET
    scheduler = Scheduler(again.config)
    answers = []
    for index, event in enumerate(again.events):
        count = len(scheduler.handle(again.events[index : index + 1]))
        answers += [index] * count
        assert event["time"] == again.events["time"][index]
    np.testing.assert_array_equal(again.answers, answers)
    assert (again.actions["kind"] == ActionKind.BATCH).sum() == 4


@pytest.mark.parametrize("field", ["token_budget", "placement"])
def test_another_configuration_differs_where_it_decides_otherwise(field: str, trace: Path) -> None:
    other = {"token_budget": 350, "placement": "group_round_robin"}[field]
    again = replay(trace, config=BUDGET.replace(**{field: other}))
    assert not again.equal
    first = again.first_difference
    assert first is not None and 0 <= first.event < len(again.events)
    # The oracle: both schedulers, event by event.
    recorded, replayed = Scheduler(BUDGET), Scheduler(again.config)
    for index in range(first.event):
        event = again.events[index : index + 1]
        assert recorded.handle(event).tobytes() == replayed.handle(event).tobytes()
    event = again.events[first.event : first.event + 1]
    assert recorded.handle(event).tobytes() != replayed.handle(event).tobytes()
    assert first.recorded != first.replayed


def test_every_cut_is_seen_and_what_is_whole_can_be_had(trace: Path, tmp_path: Path) -> None:
    data = trace.read_bytes()
    whole = read_trace(trace)
    ends = _chunk_ends(trace)
    assert len(ends) > 3 and ends[-1] == len(data)
    cut = tmp_path / "cut"
    for size in {*range(0, len(data), 997), *(e + d for e in ends for d in (-1, 1)), len(data) - 9}:
        if size > len(data):
            continue
        cut.write_bytes(data[:size])
        if size < ends[0]:
            with pytest.raises(SchedulerError, match=r"header|begin with"):
                read_trace(cut, partial=True)
            continue
        if size not in ends:
            with pytest.raises(SchedulerError, match=r"damaged at byte \d+"):
                replay(cut)
        again = replay(cut, partial=True)
        before = max(e for e in ends if e <= size)
        assert again.equal and again.unread == size - before
        assert again.events.tobytes() == whole.events[: len(again.events)].tobytes()


def _chunk_ends(path: Path) -> list[int]:
    """The offset after the header and after each chunk, from the chunks themselves."""
    sizes = [
        CHUNK_HEAD + c.events.nbytes + c.actions.nbytes + c.answers.nbytes
        for c in read_trace(path).chunks
    ]
    start = path.stat().st_size - sum(sizes)
    return [start + sum(sizes[:n]) for n in range(len(sizes) + 1)]


def test_every_damaged_byte_is_seen(trace: Path, tmp_path: Path) -> None:
    data = bytearray(trace.read_bytes())
    damaged = tmp_path / "damaged"
    for offset in [*range(60), *range(60, len(data), 1013)]:
        data[offset] ^= 0x40
        damaged.write_bytes(data)
        with pytest.raises(SchedulerError):
            replay(damaged)
        data[offset] ^= 0x40


def test_a_decision_that_was_written_otherwise_is_found(trace: Path, tmp_path: Path) -> None:
    """As if another scheduler had recorded it: the file is sound, a decision is not this one's."""
    recording = read_trace(trace)
    path = tmp_path / "other"
    writer = Trace(path, recording.config)
    changed = recording.chunks[1].actions.copy()
    changed["engine"][7] += 1
    for number, chunk in enumerate(recording.chunks):
        actions = changed if number == 1 else chunk.actions
        writer.add(chunk.events, actions, chunk.answers, chunk.digest)
        writer.flush()
    writer.close()
    again = replay(path)
    first = again.first_difference
    assert not again.equal and first is not None
    before = len(recording.chunks[0].events)
    assert first.event == before + recording.chunks[1].answers[7]
    assert first.recorded is not None and first.replayed is not None
    assert first.recorded.engine == first.replayed.engine + 1
    assert len(again.actions) == len(recording.chunks[0].actions) + 7


def test_an_event_that_this_scheduler_refuses_is_the_difference(tmp_path: Path) -> None:
    events = np.zeros(2, EVENT)
    events["kind"] = [EventKind.TRAINER_READY, EventKind.SEGMENT_ENDED]
    events["id"] = [0, 77]
    scheduler = Scheduler(BUDGET)
    actions, answers = scheduler.handle_each(events[:1])
    writer = Trace(tmp_path / "trace", BUDGET)
    writer.add(events, actions, answers, scheduler.digest())
    writer.close()
    first = replay(tmp_path / "trace").first_difference
    assert first is not None and first.event == 1 and "lease 77" in first.error


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match="cannot write the trace"):
        Trace(tmp_path / "no" / "folder", BUDGET)
    with pytest.raises(SchedulerError, match="cannot read the trace"):
        replay(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SchedulerError, match="does not begin with"):
        replay(tmp_path / "text", partial=True)


def test_a_disk_that_is_full_is_named() -> None:
    with pytest.raises(SchedulerError, match="cannot write the trace /dev/full: No space"):
        Trace(Path("/dev/full"), BUDGET)


def test_a_recording_has_what_was_decided(trace: Path) -> None:
    recording, again = read_trace(trace), replay(trace)
    assert len(recording.chunks) > 1
    assert recording.actions.tobytes() == again.actions.tobytes()
    np.testing.assert_array_equal(recording.answers, again.answers)
