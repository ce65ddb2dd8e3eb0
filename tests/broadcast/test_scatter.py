"""Scatter against numpy: measured, applied and landed elements, over all ranks of an engine."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    Buffers,
    Values,
    allocate,
    assert_holds,
    layouts,
    random_values,
    scatter,
    split,
    tensors,
    whole,
)

from kimisys._core.broadcast import (
    Blocks,
    Record,
    Scatter,
    Staged,
    diff,
    digest,
    scatter_implementations,
)
from kimisys.broadcast import snapshot_layout
from kimisys.broadcast.rounds import rounds
from kimisys.reshard import Layout, plan

MASK = (1 << 64) - 1
DTYPES = ("uint8", "bfloat16", "float32", "int64")


def mix(counter: int, bits: int) -> int:
    word = (counter ^ bits) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 32) * 0x94D049BB133111EB & MASK
    return word ^ word >> 29


def record_of(offsets: list[int], descriptors: npt.NDArray[np.uint32], payload: bytes) -> Record:
    """The form in csrc/broadcast/record.h, written down a second time."""
    tables = np.array(offsets, np.uint64).tobytes() + descriptors.astype(np.uint32).tobytes()
    tables += bytes(-len(tables) % 8)
    nbytes = 128 + len(tables) + len(payload)
    words = [2, 1, MASK, nbytes, len(tables), len(payload), len(descriptors), len(offsets), 0, 0]
    body = struct.pack("<14Q", *words, 0, 0, 0, 0) + tables
    magic = 0x4452434552534D4B
    checksum = mix(magic, len(body))
    for index, (word,) in enumerate(struct.iter_unpack("<Q", body)):
        checksum += mix((8 * index + 1) * 0x9E3779B97F4A7C15 & MASK, word ^ word >> 32)
    return Record.parse(struct.pack("<2Q", magic, checksum & MASK) + body)


def publish(layout: Layout, before: Buffers, after: Buffers) -> tuple[Record, bytes]:
    """A record of one rank's changes; what is worth it goes whole, by reference."""
    snapshot = before[layout.buffers[0].rank, "snapshot"].copy()
    descriptors, payloads, _ = diff(layout, layout, after, snapshot, 1)
    begins = Blocks(layout).chunk_begins.tolist()
    offsets, payload = [], b""
    for begin, end in itertools.pairwise(begins):
        offsets.append(len(payload))
        payload += b"".join(payloads[begin:end])
        payload += bytes(-len(payload) % 8)
    return record_of(offsets, descriptors, payload), payload


def changed(values: Values, density: float, seed: int) -> Values:
    random = np.random.default_rng(seed)
    new = {}
    for name, old in values.items():
        fresh = random.integers(0, 1 << 8 * old.itemsize, old.shape, old.dtype, endpoint=False)
        new[name] = np.where(random.random(old.shape) < density, fresh, old)
    return new


def staged(scatters: Scatter, source: Layout, before: Buffers, after: Buffers) -> Iterator[Staged]:
    for rank in scatters.ranks:
        record, payload = publish(source.of_rank(rank), before, after)
        ranges = scatters.payload(rank, record).tolist()
        packed = b"".join(payload[at : at + nbytes] for at, nbytes in ranges)
        yield scatters.stage(rank, record, packed)


def land(
    scatters: Scatter,
    rank: int,
    blocks: npt.NDArray[np.uint32] | None,
    data: npt.NDArray[np.uint8],
    destinations: Buffers,
    limit: int,
    subtract: bool,
) -> npt.NDArray[np.uint64]:
    """Window by window, from memory that holds nothing but the windows' ranges."""
    total: npt.NDArray[np.uint64] | None = None
    for window in scatters.windows(rank, blocks, limit):
        image = np.full(window.end - window.begin, 0xCD, np.uint8)
        for at, nbytes in window.ranges.tolist():
            image[at - window.begin :][:nbytes] = data[at : at + nbytes]
        part = scatters.land(
            rank, window.blocks, image, window.begin, destinations, subtract, threads=2
        )
        total = part if total is None else total + part
    assert total is not None
    return total


@given(st.data(), st.floats(0.0, 1.0), st.integers(0, 1 << 30))
@settings(max_examples=120, deadline=None)
def test_deltas_over_all_engine_ranks(data: st.DataObject, density: float, seed: int) -> None:
    table = data.draw(tensors(DTYPES))
    source = snapshot_layout(data.draw(layouts(table)))
    destination = data.draw(layouts(table, ranks=2))
    old = random_values(source, seed)
    new = changed(old, density, seed)
    before, after = scatter(source, old), scatter(source, new)
    covers = rounds(destination)
    implementation = data.draw(st.sampled_from(scatter_implementations()))
    summed = np.zeros((len(covers), len(source.tensors)), np.uint64)
    held = scatter(destination, old)
    for rank in destination.ranks:
        here = destination.of_rank(rank)
        mine = {key: bytes_ for key, bytes_ in held.items() if key[0] == rank}
        untouched = {key: bytes_.copy() for key, bytes_ in mine.items()}
        parts = [cover.of_rank(rank).layout for cover in covers]
        scatters = Scatter(plan(source, here), parts, implementation)
        records = list(staged(scatters, source, before, after))
        assert [each.rank for each in records] == scatters.ranks
        summed += scatters.measure(records, mine, threads=2)
        for key, bytes_ in mine.items():
            np.testing.assert_array_equal(bytes_, untouched[key])
        for each in records:
            if len(each.references):
                snapshot = after[each.rank, "snapshot"]
                summed += land(scatters, each.rank, each.references, snapshot, mine, 4096, True)
        count = scatters.apply(records, mine, threads=2)
        assert 0 <= count <= sum(f.region.elements for f in here.fragments)
        different = {key for key, bytes_ in mine.items() if (bytes_ != untouched[key]).any()}
        assert different <= scatters.touched(records)
    assert_holds(destination, held, new)
    published = digest(source.cover(), after) - digest(source.cover(), before)
    names = [tensor.name for tensor in source.tensors]
    for cover, sums in zip(covers, summed, strict=True):
        expected = [published[i] if name in cover.names else 0 for i, name in enumerate(names)]
        assert sums.tolist() == expected


@given(st.data(), st.integers(1, 5000), st.integers(0, 1 << 30))
@settings(max_examples=120, deadline=None)
def test_a_full_pull_is_the_plans_execution(data: st.DataObject, limit: int, seed: int) -> None:
    table = data.draw(tensors(DTYPES))
    source = snapshot_layout(data.draw(layouts(table)))
    destination = data.draw(layouts(table, ranks=1))
    snapshots = scatter(source, random_values(source, seed))
    expected, held = allocate(destination), allocate(destination)
    path = plan(source, destination)
    path.execute(snapshots, expected)
    covers = rounds(destination)
    scatters = Scatter(path, [cover.layout for cover in covers])
    sums = np.zeros((len(covers), len(source.tensors)), np.uint64)
    for rank in scatters.ranks:
        sums += land(scatters, rank, None, snapshots[rank, "snapshot"], held, limit, False)
    scatters.fill_padding(held)
    for key, bytes_ in expected.items():
        np.testing.assert_array_equal(held[key], bytes_)
    published = digest(source.cover(), snapshots)
    names = [tensor.name for tensor in source.tensors]
    for cover, found in zip(covers, sums, strict=True):
        want = [published[i] if name in cover.names else 0 for i, name in enumerate(names)]
        assert found.tolist() == want


@pytest.mark.parametrize("implementation", scatter_implementations())
def test_a_buffer_that_is_not_given_is_passed_over(implementation: str) -> None:
    source = snapshot_layout(split("w", "bfloat16", (64, 2048), 0, 2))
    destination = whole("w", "bfloat16", (64, 2048), 1)
    old = random_values(source)
    new = changed(old, 0.01, 1)
    scatters = Scatter(plan(source, destination), [destination], implementation)
    records = list(staged(scatters, source, scatter(source, old), scatter(source, new)))
    held = scatter(destination, old)
    assert scatters.apply(records, {}) == 0
    assert scatters.apply(records, held) == np.count_nonzero(old["w"] != new["w"])
    assert_holds(destination, held, new)
