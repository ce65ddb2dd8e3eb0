"""Pulls by deltas: exact, verified before they are written, and full where deltas do not lead."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import engine, training
from worlds import (
    AllReduce,
    Buffers,
    allocate,
    assert_holds,
    layouts,
    on_threads,
    tensors,
)

from kimisys.broadcast import Pulled, Subscriber
from kimisys.errors import BufferMismatchError, DigestError, SnapshotError, VersionError


def pull_all(
    subscribers: Mapping[int, Subscriber],
    version: int | None,
    landed: Buffers,
    combine: AllReduce | None = None,
    **options: object,
) -> dict[int, object]:
    combine = combine or AllReduce(len(subscribers))
    return on_threads(
        list(subscribers),
        lambda rank: subscribers[rank].pull(version, landed, combine, 1, **options),  # type: ignore[arg-type]
    )


def test_a_chain_brings_what_changed_and_nothing_else(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with training(folder) as (trainer, peers):
        subscriber = Subscriber(peers, destination, 0)
        trainer.publish()
        first = subscriber.pull(1, landed)
        assert first.base is None and first.touched == frozenset(landed)
        assert not first.replay({})
        copies = {where: memory.copy() for where, memory in landed.items()}
        before = {name: array.copy() for name, array in trainer.values.items()}
        for _ in range(4):
            after = trainer.next(names=("rows", "norm"))
        pulled = subscriber.pull(5, landed)
        assert (pulled.version, pulled.base, pulled.verified_fully) == (5, 1, False)
        assert_holds(destination, landed, after)
        differing = sum(int((before[name] != after[name]).sum()) for name in after)
        assert differing <= pulled.changed <= 4 * 0.02 * 64 * 96 + 100
        assert pulled.nbytes == 2 * pulled.changed
        assert pulled.full_nbytes == 2 * (64 * 96 + 32 * 2048 + 500)
        assert pulled.wire_nbytes < pulled.full_nbytes / 10
        assert pulled.touched == {(0, "rows"), (0, "norm")}
        assert {"read", "measure", "apply"} <= pulled.seconds.keys()
        del copies[0, "norm"]  # only some of the buffers have a copy
        assert pulled.replay(copies)
        for where, memory in copies.items():
            np.testing.assert_array_equal(memory, landed[where])


def test_what_is_held_already_is_not_pulled_again(folder: Path) -> None:
    landed = allocate(engine(1))
    with training(folder) as (trainer, peers):
        subscriber = Subscriber(peers, engine(1), 0)
        trainer.publish()
        subscriber.pull(None, landed)
        again = subscriber.pull(1, landed)
        assert (again.base, again.version, again.changed, again.touched) == (1, 1, 0, frozenset())
        assert again.wire_nbytes < 500 and again.replay({})
        assert subscriber.pull(1, landed, full=True).base is None


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layouts_any_history(folder: Path, data: st.DataObject) -> None:
    """Versions come at any density, whole or not; a rank pulls some of them, by a small log."""
    table = data.draw(tensors(("bfloat16", "float32", "uint8")))
    live = data.draw(layouts(table))
    destination = data.draw(layouts(table, ranks=2))
    log_nbytes = data.draw(st.sampled_from([0, 300, 600, 5000]))
    landed = allocate(destination)
    with training(folder, live, log_nbytes) as (trainer, peers):
        every = data.draw(st.integers(1, 5))
        subscribers = {r: Subscriber(peers, destination, r, every) for r in destination.ranks}
        for _ in range(data.draw(st.integers(1, 6))):
            trainer.change(data.draw(st.sampled_from([0, 0.05, 0.5, 1])))
            values = trainer.publish(trainer.version + data.draw(st.integers(1, 3)))
            if data.draw(st.booleans()):
                full = data.draw(st.integers(0, 3)) == 0
                asked = data.draw(st.sampled_from([None, trainer.version]))
                results = pull_all(subscribers, asked, landed, full=full)
                assert all(isinstance(r, Pulled) for r in results.values()), results
                assert len({(r.version, r.base) for r in results.values()}) == 1  # type: ignore[attr-defined]
                assert {r.version for r in results.values()} == {trainer.version}  # type: ignore[attr-defined]
                assert_holds(destination, landed, values)


def test_a_destination_that_has_drifted_is_found_before_anything_is_written(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with training(folder) as (trainer, peers):
        subscriber = Subscriber(peers, destination, 0)
        trainer.publish()
        subscriber.pull(1, landed)
        values = trainer.next(1.0, ("norm",))
        landed[0, "norm"][7] ^= 1
        before = {where: memory.copy() for where, memory in landed.items()}
        with pytest.raises(DigestError, match=r"version 2 at rank 0: .* in 'norm'; nothing of it"):
            subscriber.pull(2, landed)
        for where, memory in landed.items():
            np.testing.assert_array_equal(memory, before[where])
        assert subscriber.version == 1
        assert subscriber.pull(2, landed).base is None
        assert_holds(destination, landed, values)


def test_blocks_by_reference_land_in_the_last_step_alone(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with training(folder, log_nbytes=16 << 10) as (trainer, peers):
        subscriber = Subscriber(peers, destination, 0)
        trainer.publish()
        subscriber.pull(1, landed)
        trainer.next(0.01)
        values = trainer.next(1.0)
        pulled = subscriber.pull(3, landed)
        assert pulled.base == 1 and not pulled.replay({})
        assert pulled.wire_nbytes > pulled.full_nbytes / 2
        assert_holds(destination, landed, values)
        trainer.next(1.0)
        values = trainer.next(0.01)
        assert subscriber.pull(5, landed).base is None
        assert_holds(destination, landed, values)


def test_a_step_by_reference_that_does_not_fit_leaves_nothing_verified(folder: Path) -> None:
    landed = allocate(engine(1))
    with training(folder, log_nbytes=16 << 10) as (trainer, peers):
        subscriber = Subscriber(peers, engine(1), 0)
        trainer.publish()
        subscriber.pull(1, landed)
        trainer.next(1.0)
        np.asarray(trainer.publishers[0].memory)[:] ^= 1
        with pytest.raises(DigestError, match="do not serve"):
            subscriber.pull(2, landed)
        assert subscriber.version is None
        with pytest.raises(DigestError):
            subscriber.pull(2, landed)
        values = trainer.publish(full=True)
        subscriber.pull(3, landed)
        assert_holds(engine(1), landed, values)


def test_ranks_take_one_path(folder: Path) -> None:
    destination = engine(2)
    landed = allocate(destination)
    with training(folder) as (trainer, peers):
        subscribers = {rank: Subscriber(peers, destination, rank) for rank in (0, 1)}
        trainer.publish()
        pull_all(subscribers, 1, landed)
        subscribers[1] = Subscriber(peers, destination, 1)  # a new one, that holds nothing
        values = trainer.next()
        results = pull_all(subscribers, None, landed)
        assert [r.base for r in results.values()] == [None, None]  # type: ignore[attr-defined]
        assert_holds(destination, landed, values)
        values = trainer.next()
        results = pull_all(subscribers, 3, landed)
        assert [r.base for r in results.values()] == [2, 2], results  # type: ignore[attr-defined]
        assert_holds(destination, landed, values)


def test_a_rank_that_fails_is_not_waited_for(folder: Path) -> None:
    destination = engine(2)
    landed = allocate(destination)
    with training(folder) as (trainer, peers):
        subscribers = {rank: Subscriber(peers, destination, rank) for rank in (0, 1)}
        trainer.publish()
        values = {name: array.copy() for name, array in trainer.values.items()}
        for step in range(2):  # the first pull is full, the second one near
            combine = AllReduce(2)
            results = on_threads(
                [0, 1],
                lambda rank, combine=combine: subscribers[rank].pull(
                    None, landed if rank else {}, combine, 1
                ),
            )
            assert isinstance(results[0], BufferMismatchError), results
            assert isinstance(results[1], SnapshotError) and "ranks [0]" in str(results[1])
            results = pull_all(subscribers, None, landed)
            assert {type(r) for r in results.values()} == {Pulled}, results
            assert results[1].base == (1 if step else None)  # type: ignore[attr-defined]
            assert_holds(destination, landed, values)
            values = trainer.next()
        other = AllReduce(2)
        results = on_threads(
            [0, 1], lambda rank: subscribers[rank].pull(2 + rank, landed, other, 1)
        )
        assert all(isinstance(r, VersionError) for r in results.values()), results


def test_an_older_version_comes_from_the_log_but_not_from_the_data(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with training(folder) as (trainer, peers):
        near, new = Subscriber(peers, destination, 0), Subscriber(peers, destination, 0)
        trainer.publish()
        near.pull(1, landed)
        values = trainer.next()
        trainer.next()
        assert near.pull(2, landed).base == 1
        assert_holds(destination, landed, values)
        with pytest.raises(VersionError, match="has version 3, asked was 2"):
            new.pull(2, allocate(destination))
        with pytest.raises(VersionError, match="has version 3, asked was 4"):
            near.pull(4, landed)
        assert near.version == 2 and near.pull(None, landed).version == 3


def test_everything_is_verified_every_so_often(folder: Path) -> None:
    landed = allocate(engine(1))
    with training(folder) as (trainer, peers):
        subscriber = Subscriber(peers, engine(1), 0, verify_every=3)
        trainer.publish()
        subscriber.pull(None, landed)
        found = []
        for _ in range(7):
            trainer.next(0.0)
            found.append(subscriber.pull(None, landed).verified_fully)
        assert found == [False, False, True, False, False, True, False]
        landed[0, "rows"][5] ^= 1
        trainer.next(0.0)
        subscriber.pull(None, landed)  # nothing changed there: not seen
        trainer.next(0.0)
        with pytest.raises(DigestError, match="in 'rows'; do not serve"):
            subscriber.pull(None, landed)
        assert subscriber.version is None
        assert subscriber.pull(None, landed).base is None


def test_publishing_without_pause_does_not_starve_full_pulls(folder: Path) -> None:
    destination = engine(2)
    landed = allocate(destination)
    with training(folder, log_nbytes=1 << 20) as (trainer, peers):
        history = {1: trainer.publish()}
        stop = threading.Event()

        def publish_on() -> None:
            while not stop.is_set() and trainer.version < 20_000:
                values = trainer.change(0.001)
                history[trainer.version + 1] = values
                trainer.publish()
                history.pop(trainer.version - 2000, None)

        thread = threading.Thread(target=publish_on)
        thread.start()
        try:
            for _ in range(5):
                subscribers = {rank: Subscriber(peers, destination, rank) for rank in (0, 1)}
                for full in (True, False, False):
                    results = pull_all(subscribers, None, landed, full=full, timeout_seconds=20)
                    assert {type(r) for r in results.values()} == {Pulled}, results
                    version = results[0].version  # type: ignore[attr-defined]
                    assert_holds(destination, landed, history[version])
        finally:
            stop.set()
            thread.join(30)
