"""From live trainer shards through snapshots into an engine's layout, bit-exact or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import (
    AllReduce,
    Buffers,
    Values,
    allocate,
    assert_holds,
    layouts,
    on_threads,
    random_values,
    rounded,
    scatter,
    split,
    tensors,
    whole,
)

from kimisys.broadcast import (
    Peers,
    Publisher,
    Pulled,
    Subscriber,
    connect,
    snapshot_layout,
)
from kimisys.errors import (
    BufferMismatchError,
    DigestError,
    LayoutError,
    PlanError,
    SnapshotError,
    VersionError,
)
from kimisys.reshard import Layout


@contextlib.contextmanager
def publishers(
    folder: Path, live: Layout, wire_dtype: str | None = None
) -> Iterator[list[Publisher]]:
    snapshot = snapshot_layout(live, wire_dtype)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Publisher(live, snapshot, rank, folder / f"{rank}.sock"))
            for rank in live.ranks
        ]


def publish(trainers: list[Publisher], version: int, live: Buffers) -> None:
    for trainer in trainers:
        trainer.publish(version, {w: b for w, b in live.items() if w[0] == trainer.rank}, 1)


def joined(trainers: list[Publisher]) -> Peers:
    return connect([trainer.address for trainer in trainers], 10)


# A row-split and a column-split matrix and a norm on both trainer ranks.
LIVE = Layout.merge(
    [
        split("rows", "float32", (8, 6), 0, 2),
        split("columns", "float32", (6, 8), 1, 2),
        whole("norm", "float32", (5,), 2),
    ]
)


def engine(ranks: int, dtype: str = "bfloat16") -> Layout:
    """The other way around: rows by columns, columns by rows, the norm everywhere."""
    return Layout.merge(
        [
            split("rows", dtype, (8, 6), 1, ranks),
            split("columns", dtype, (6, 8), 0, ranks),
            whole("norm", dtype, (5,), ranks),
        ]
    )


def numbers(seed: int) -> Values:
    random = np.random.default_rng(seed)
    return {
        t.name: random.standard_normal(t.shape, np.float32).view(np.uint32) for t in LIVE.tensors
    }


def as_bfloat16(values: Values) -> Values:
    return {name: rounded(bits) for name, bits in values.items()}


def test_versions_follow_each_other_in_place(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        subscriber = Subscriber(peers, destination, 0)
        assert subscriber.source == peers.layout and subscriber.absent == ()
        for version in (1, 2, 10):
            values = numbers(version)
            publish(trainers, version, scatter(LIVE, values))
            assert {trainer.version for trainer in trainers} == {version}
            base = subscriber.version
            pulled = subscriber.pull(version, landed, threads=1)
            assert_holds(destination, landed, as_bfloat16(values))
            assert (pulled.version, pulled.base, pulled.digests_checked) == (version, base, 3)
            assert subscriber.version == version
            assert pulled.total_seconds >= sum(pulled.seconds.values()) > 0
            if base is None:
                assert pulled.nbytes == pulled.full_nbytes == 2 * (48 + 48 + 5)
                assert pulled.verified_fully


def pull_all(
    subscribers: Mapping[int, Subscriber], version: int, landed: Buffers
) -> dict[int, object]:
    combine = AllReduce(len(subscribers))
    return on_threads(
        list(subscribers), lambda rank: subscribers[rank].pull(version, landed, combine, 1)
    )


def test_ranks_combine_their_digests(folder: Path) -> None:
    destination = engine(2)
    landed = allocate(destination)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        subscribers = {rank: Subscriber(peers, destination, rank) for rank in (0, 1)}
        results = pull_all(subscribers, 1, landed)
        assert [type(r) for r in results.values()] == [Pulled, Pulled], results
        assert_holds(destination, landed, as_bfloat16(numbers(1)))
        with pytest.raises(LayoutError, match=r"rank 0 holds only a part of .*pass combine"):
            subscribers[0].pull(1, landed)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_layout_to_any_layout(folder: Path, data: st.DataObject) -> None:
    table = data.draw(tensors(("bfloat16", "float32", "uint8")))
    live = data.draw(layouts(table))
    destination = data.draw(layouts(table, ranks=2))
    values = random_values(live)
    landed = allocate(destination)
    with publishers(folder, live) as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(live, values))
        subscribers = {rank: Subscriber(peers, destination, rank) for rank in destination.ranks}
        results = pull_all(subscribers, 1, landed)
        assert all(isinstance(r, Pulled) for r in results.values()), results
        assert_holds(destination, landed, values)


def flip(memory: memoryview, byte: int) -> None:
    memory[byte] ^= 0x10


def test_a_flipped_byte_of_a_snapshot_is_caught_and_named(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        subscriber = Subscriber(peers, destination, 0)
        owners = {f.tensor: f.byte_offset for f in trainers[0].layout.fragments}
        for name, offset in owners.items():
            flip(trainers[0].memory, offset + 3)
            with pytest.raises(DigestError, match=f"not what was published in '{name}'; "):
                subscriber.pull(1, landed)
            assert subscriber.version is None
            flip(trainers[0].memory, offset + 3)
        subscriber.pull(1, landed)


def test_a_flipped_replica_is_caught_where_it_is_read(folder: Path) -> None:
    """Rank 1 reads the norm from trainer rank 1, whose copy is not in the published digest."""
    destination = engine(2)
    landed = allocate(destination)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        subscribers = {rank: Subscriber(peers, destination, rank) for rank in (0, 1)}
        (read,) = (c for c in subscribers[1].plan.copies if c.tensor == "norm")
        assert read.source_rank == 1
        flip(trainers[1].memory, read.source_offset)
        results = pull_all(subscribers, 1, landed)
        for result in results.values():
            assert isinstance(result, DigestError) and "published in 'norm';" in str(result)


def test_every_landed_byte_of_every_replica_is_verified(folder: Path) -> None:
    destination = engine(2)
    landed = allocate(destination)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(3)))
        subscribers = {r: Subscriber(peers, destination, r) for r in (0, 1)}

        def verify_all() -> dict[int, object]:
            combine = AllReduce(2)
            return on_threads([0, 1], lambda rank: subscribers[rank].verify(landed, combine))

        for rank, name in landed:
            for byte in (0, 3, 9):
                pull_all(subscribers, 1, landed)
                assert list(verify_all().values()) == [3, 3]
                flip(memoryview(landed[rank, name]), byte)
                for found in verify_all().values():
                    assert isinstance(found, DigestError) and f"in '{name}';" in str(found)
                assert {each.version for each in subscribers.values()} == {None}
                for found in verify_all().values():
                    assert isinstance(found, VersionError)


def test_versions_must_match(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    before = {where: memory.copy() for where, memory in landed.items()}
    live = scatter(LIVE, numbers(1))
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        subscriber = Subscriber(peers, destination, 0)
        with pytest.raises(VersionError, match=r"0\.sock \(trainer rank 0\): .*no version yet"):
            subscriber.pull(1, landed)
        publish(trainers, 1, live)
        publish(trainers[:1], 2, live)
        with pytest.raises(VersionError, match=r"0\.sock.*has version 2, asked was 1"):
            subscriber.pull(1, landed)
        with pytest.raises(VersionError, match=r"1\.sock.*has version 1, asked was 2"):
            subscriber.pull(2, landed)
        for where, memory in landed.items():
            np.testing.assert_array_equal(memory, before[where])


@pytest.mark.parametrize("version", [1, 0, -1, 1 << 63, "2", 2.0, None])
def test_refused_versions_change_nothing(folder: Path, version: object) -> None:
    destination = engine(1)
    live = scatter(LIVE, numbers(1))
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, live)
        with pytest.raises(VersionError):
            publish(trainers[:1], version, live)  # type: ignore[arg-type]
        Subscriber(peers, destination, 0).pull(1, allocate(destination))


class Broken(Mapping[tuple[int, str], object]):
    """Knows its keys, and fails when asked for a value."""

    def __init__(self, buffers: Mapping[tuple[int, str], object]) -> None:
        self._buffers = buffers

    def __getitem__(self, key: tuple[int, str]) -> object:
        raise RuntimeError("no value")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)


def test_wrong_buffers_leave_the_last_version_readable(folder: Path) -> None:
    destination = engine(1)
    live = scatter(LIVE, numbers(1))
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, live)
        subscriber = Subscriber(peers, destination, 0)
        with pytest.raises(BufferMismatchError, match="'norm' of rank 0"):
            trainers[0].publish(2, {w: b for w, b in live.items() if w[1] != "norm"})
        with pytest.raises(BufferMismatchError, match="'rows' of rank 0"):
            trainers[0].publish(2, live | {(0, "rows"): np.zeros(3, np.uint8)})
        with pytest.raises(LayoutError, match="threads"):
            trainers[0].publish(2, live, -1)
        for buffers, threads in ((None, 0), (live, "x"), (live, 1 << 70), (Broken(live), 0)):
            with pytest.raises((TypeError, RuntimeError)):
                trainers[0].publish(2, buffers, threads)  # type: ignore[arg-type]
        assert trainers[0].version == 1
        subscriber.pull(1, allocate(destination))
        with pytest.raises(BufferMismatchError, match="'columns' of rank 0 is missing"):
            subscriber.pull(1, {})
        publish(trainers, 2, live)


def test_a_publish_that_fails_half_way_is_unreadable(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)
    live = scatter(LIVE, numbers(1))
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, live)
        subscriber = Subscriber(peers, destination, 0)
        trainers[1]._snapshot.begin(2)  # and what comes after it fails
        died = r"1\.sock \(trainer rank 1\): .*failed or died"
        with pytest.raises(SnapshotError, match=died):
            subscriber.pull(1, landed, timeout_seconds=0.05)
        with pytest.raises(BufferMismatchError):
            trainers[1].publish(2, {})  # writes nothing, but heals nothing either
        with pytest.raises(SnapshotError, match="failed or died"):
            subscriber.pull(1, landed, timeout_seconds=0.05)
        publish(trainers, 2, live)
        assert subscriber.pull(2, landed).base is None


def test_destinations_that_cannot_be_verified_are_refused(folder: Path) -> None:
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        with pytest.raises(LayoutError, match=r"published as bfloat16, the destination holds fl"):
            Subscriber(peers, engine(1, "float32"), 0)
        with pytest.raises(LayoutError, match=r"holds 24 of the 48 elements of 'columns'"):
            Subscriber(peers, engine(2).of_rank(0), 0)
        with pytest.raises(PlanError, match="'extra'"):
            Subscriber(peers, whole("extra", "bfloat16", (2,), 1), 0)
        with pytest.raises(ValueError, match="verify_every is 0"):
            Subscriber(peers, engine(1), 0, verify_every=0)


def test_absent_tensors_are_listed_and_not_compared(folder: Path) -> None:
    destination = whole("norm", "bfloat16", (5,), 1)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        subscriber = Subscriber(peers, destination, 0)
        assert subscriber.absent == ("columns", "rows")
        landed = allocate(destination)
        assert subscriber.pull(1, landed).digests_checked == 1
        assert_holds(destination, landed, {"norm": as_bfloat16(numbers(1))["norm"]})


def test_replicas_of_whole_tensors_need_no_combine(folder: Path) -> None:
    destination = whole("norm", "bfloat16", (5,), 2)
    with publishers(folder, LIVE, "bfloat16") as trainers, joined(trainers) as peers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        landed = allocate(destination)
        assert Subscriber(peers, destination, 1).pull(1, landed).digests_checked == 1


def test_closed_peers_refuse_to_be_read(folder: Path) -> None:
    destination = engine(1)
    with publishers(folder, LIVE, "bfloat16") as trainers:
        publish(trainers, 1, scatter(LIVE, numbers(1)))
        peers = joined(trainers)
        subscriber = Subscriber(peers, destination, 0)
        subscriber.pull(1, allocate(destination))
        peers.close()
        peers.close()
        with pytest.raises(SnapshotError, match="closed"):
            subscriber.pull(1, allocate(destination))
        with pytest.raises(SnapshotError, match="closed"):
            Subscriber(peers, destination, 0)


def test_publishing_goes_on_when_nobody_can_connect_any_more(folder: Path) -> None:
    """The memory outlives the socket: subscribers that have it keep pulling."""
    destination = engine(1)
    with publishers(folder, LIVE, "bfloat16") as trainers:
        peers = joined(trainers)
        publish(trainers, 1, scatter(LIVE, numbers(1)))
    with peers:
        Subscriber(peers, destination, 0).pull(1, allocate(destination))
