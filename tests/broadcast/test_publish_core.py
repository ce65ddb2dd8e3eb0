"""The core of publishing, for any layout, against a plan that copies and a digest of the copy."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Buffers, Values, layouts, random_values, scatter, tensors

from kimisys._core.broadcast import PublisherCore
from kimisys.broadcast import Snapshot, digest, snapshot_layout
from kimisys.errors import BufferMismatchError, LayoutError, SnapshotError, VersionError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, plan

DTYPES = ("float32", "bfloat16", "uint8", "int64")


def changed(values: Values, density: float, random: np.random.Generator) -> Values:
    """New bits for some elements; none of them a NaN, whose payload a cast need not keep."""
    result: Values = {}
    for name, old in values.items():
        bits = random.integers(0, 0x7F, (*old.shape, old.itemsize), dtype=np.uint8)
        new = bits.view(old.dtype).reshape(old.shape)
        result[name] = np.where(random.random(old.shape) < density, new, old)
    return result


def expected(live: Layout, snapshot: Layout, rank: int, buffers: Buffers) -> Buffers:
    here = snapshot.of_rank(rank)
    filled = {(b.rank, b.name): np.zeros(b.nbytes, np.uint8) for b in here.buffers}
    plan(live.of_rank(rank), here).execute(buffers, filled)
    return filled


@settings(max_examples=40)
@given(st.data())
def test_any_layout_is_published(data: st.DataObject) -> None:
    live = data.draw(layouts(data.draw(tensors(DTYPES))))
    wire = data.draw(st.sampled_from([None, "bfloat16"]))
    try:
        snapshot = snapshot_layout(live, wire)
    except LayoutError:  # no scaled picture of a buffer of several sizes
        snapshot = snapshot_layout(live)
    log_nbytes = data.draw(st.sampled_from([0, 300, 1000, 1 << 16]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    for rank in snapshot.ranks:
        here = snapshot.of_rank(rank)
        memory = Snapshot.create(here.buffers[0].nbytes, len(here.tensors), log_nbytes)
        counted = snapshot.cover().of_rank(rank)
        core = PublisherCore(live.of_rank(rank), here, counted, memory)
        values = {name: np.zeros_like(bits) for name, bits in random_values(live).items()}
        for version in range(1, 6):
            full = version > 1 and data.draw(st.booleans())
            values = changed(values, data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])), random)
            buffers = scatter(live.of_rank(rank), values)
            done = core.publish(version, buffers, full=full, threads=2)
            filled = expected(live, snapshot, rank, buffers)
            assert bytes(memoryview(memory)) == filled[rank, "snapshot"].tobytes()
            offer = memory.published()
            assert offer.version == version
            assert offer.digests.tolist() == digest(counted, filled).tolist()
            if full or version == 1 or log_nbytes == 0:
                assert done.base is None
            elif log_nbytes == 1 << 16:  # the others may be too small for a record's tables
                assert done.base == version - 1
            assert done.changed <= done.elements
            assert (done.record_nbytes == 0) == (done.base is None)


def vector(elements: int) -> tuple[Layout, Layout]:
    table = [Tensor("t", "float32", (elements,))]
    fragment = Fragment("t", Region((0,), (elements,)), 0, "live", 0, (4,))
    live = Layout(table, [Buffer(0, "live", 4 * elements)], [fragment])
    return live, snapshot_layout(live, "bfloat16")


def test_what_is_refused_changes_nothing() -> None:
    live, snapshot = vector(1000)
    memory = Snapshot.create(2000, 1, 4096)
    core = PublisherCore(live, snapshot, snapshot, memory)
    buffers = {(0, "live"): np.ones(1000, np.float32)}
    core.publish(3, buffers)
    before = bytes(memory.mapped())
    with pytest.raises(VersionError, match="after version 3"):
        core.publish(3, buffers)
    with pytest.raises(VersionError, match="negative"):
        core.publish(-1, buffers)
    with pytest.raises(BufferMismatchError, match="live"):
        core.publish(4, {})
    with pytest.raises(BufferMismatchError, match="4000"):
        core.publish(4, {(0, "live"): np.ones(999, np.float32)})
    with pytest.raises(LayoutError, match="threads"):
        core.publish(4, buffers, threads=-1)
    with pytest.raises(LayoutError, match="nosuch"):
        core.publish(4, buffers, implementation="nosuch")
    assert bytes(memory.mapped()) == before
    assert core.publish(4, buffers).base == 3


def test_a_begun_version_that_was_never_committed_makes_the_next_one_full() -> None:
    live, snapshot = vector(1000)
    memory = Snapshot.create(2000, 1, 4096)
    core = PublisherCore(live, snapshot, snapshot, memory)
    buffers = {(0, "live"): np.ones(1000, np.float32)}
    core.publish(1, buffers)
    assert core.publish(2, buffers).base == 1
    memory.begin(3)
    np.asarray(memoryview(memory))[:100] = 7
    assert core.publish(3, buffers).base is None
    sums = digest(snapshot, {(0, "snapshot"): memory})
    assert memory.published().digests.tolist() == sums.tolist()


def test_two_publishes_at_once_are_refused() -> None:
    elements = 1 << 24
    live, snapshot = vector(elements)
    memory = Snapshot.create(2 * elements, 1, 4096)
    core = PublisherCore(live, snapshot, snapshot, memory)
    buffers = {(0, "live"): np.ones(elements, np.float32)}
    refused: list[str] = []
    done = threading.Event()

    def interfere() -> None:
        while not done.is_set():
            try:
                core.publish(0, buffers)  # where the other is not at it, the version is refused
            except SnapshotError as error:
                refused.append(str(error))
            except VersionError:
                pass

    core.publish(1, buffers)
    thread = threading.Thread(target=interfere)
    thread.start()
    version = 2
    while not refused and version < 1000:
        try:
            core.publish(version, buffers)
        except SnapshotError as error:
            refused.append(str(error))
        version += 1
    done.set()
    thread.join()
    assert "another thread publishes" in refused[0]
