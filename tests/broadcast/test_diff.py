"""Comparing live weights with their snapshot, against numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    SIZES,
    WORDS,
    Buffers,
    Values,
    assert_holds,
    box,
    layouts,
    random_values,
    rounded,
    scatter,
    tensors,
    view,
    whole,
)

from kimisys._core.broadcast import Blocks, Changes, Diff, decode_block, diff, diff_implementations
from kimisys.broadcast import digest, snapshot_layout
from kimisys.errors import BufferMismatchError, LayoutError, SnapshotError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

KINDS = ("same", "gaps", "bitmap", "whole")
ALL = tuple(SIZES)

Positions = npt.NDArray[np.uint32]


def kind(descriptor: int) -> str:
    return KINDS[descriptor & 3]


def cast(values: npt.NDArray[np.unsignedinteger], dtype: str, wire: str) -> np.ndarray:
    """The bits as they are published, NaN included."""
    if dtype == wire:
        return values
    if wire == "float32":
        return values.astype(np.uint32) << 16
    nan = (values & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, np.uint16(0x7FC0), rounded(values))


def published(live: Layout, snapshot: Layout, values: Values) -> Values:
    wire = {t.name: t.dtype for t in snapshot.tensors}
    return {t.name: cast(values[t.name], t.dtype, wire[t.name]) for t in live.tensors}


def changed_some(values: Values, density: float, seed: int) -> Values:
    """A part of the elements with other bits, one of them perhaps at random."""
    random = np.random.default_rng(seed)
    result = {}
    for name, old in values.items():
        new = random.integers(0, 256, (*old.shape, old.itemsize), np.uint8)
        new = new.view(old.dtype).reshape(old.shape)
        result[name] = np.where(random.random(old.shape) < density, new, old)
    return result


def expected_block(
    snapshot: Layout, fragment: Fragment, region: Region, before: Values, after: Values
) -> tuple[Positions, npt.NDArray[np.unsignedinteger]]:
    at = tuple(slice(o, o + e) for o, e in zip(region.offset, region.extent, strict=True))
    old, new = before[fragment.tensor][at].ravel(), after[fragment.tensor][at].ravel()
    positions = np.flatnonzero(old != new)
    return positions.astype(np.uint32), new


def check(snapshot: Layout, changes: Changes, before: Values, after: Values) -> None:
    """Descriptors and payloads say what changed, block by block, and nothing else."""
    blocks = Blocks(snapshot)
    dtypes = {t.name: t.dtype for t in snapshot.tensors}
    payloads, total = changes.payloads, 0
    for i, (index, region) in enumerate(zip(blocks.fragments, blocks.regions, strict=True)):
        fragment = snapshot.fragments[index]
        positions, new = expected_block(snapshot, fragment, region, before, after)
        word, size = int(changes.descriptors[i]), SIZES[dtypes[fragment.tensor]]
        total += positions.size
        assert word >> 7 == len(payloads[i])
        assert len(payloads[i]) <= new.nbytes
        if kind(word) == "same":
            assert positions.size == 0
        elif kind(word) == "whole":
            np.testing.assert_array_equal(np.frombuffer(payloads[i], new.dtype), new)
        else:
            found, values = decode_block(word, payloads[i], new.size, size)
            np.testing.assert_array_equal(found, positions)
            np.testing.assert_array_equal(np.frombuffer(values, new.dtype), new[positions])
    assert changes.changed == total
    assert changes.nbytes == sum(map(len, payloads))


def snapshot_key(layout: Layout) -> tuple[int, str]:
    return layout.buffers[0].rank, layout.buffers[0].name


class Side:
    """One rank's live buffers and snapshot, compared with one implementation."""

    def __init__(self, live: Layout, snapshot: Layout, rank: int, name: str) -> None:
        self.live, self.snapshot = live.of_rank(rank), snapshot.of_rank(rank)
        self.counted = snapshot.cover().of_rank(rank)
        self.diff = Diff(self.live, self.snapshot, self.counted)
        self.name = name
        self.memory = np.full(self.snapshot.buffers[0].nbytes, 0xEE, np.uint8)

    def digests(self) -> npt.NDArray[np.uint64]:
        return digest(self.counted, {snapshot_key(self.snapshot): self.memory}, 1)

    def copy(self, values: Values) -> None:
        sums = self.diff.copy(self.buffers(values), self.memory, 1, self.name)
        np.testing.assert_array_equal(sums, self.digests())

    def compare(self, values: Values) -> Changes:
        before = self.digests()
        changes = self.diff.compare(self.buffers(values), self.memory, 2, self.name)
        np.testing.assert_array_equal(before + changes.increments, self.digests())
        assert_holds(
            self.snapshot,
            {snapshot_key(self.snapshot): self.memory},
            published(self.live, self.snapshot, values),
        )
        return changes

    def buffers(self, values: Values) -> Buffers:
        return scatter(self.live, values)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_layout_and_every_implementation_finds_what_numpy_finds(data: st.DataObject) -> None:
    wire = data.draw(st.sampled_from([None, "bfloat16", "float32"]))
    dtypes = ALL if wire is None else ("float32", "bfloat16", "int64", "uint8")
    live = data.draw(layouts(data.draw(tensors(dtypes))))
    snapshot = snapshot_layout(live, wire)
    first = random_values(live, data.draw(st.integers(0, 9)))
    second = changed_some(first, data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])), 1)
    third = changed_some(second, 0.1, 2)
    for name in diff_implementations():
        for rank in snapshot.ranks:
            side = Side(live, snapshot, rank, name)
            side.copy(first)
            gaps = side.memory.copy()
            steps = [published(live, snapshot, values) for values in (first, second, third)]
            check(side.snapshot, side.compare(second), steps[0], steps[1])
            check(side.snapshot, side.compare(third), steps[1], steps[2])
            check(side.snapshot, side.compare(third), steps[2], steps[2])
            for fragment in side.snapshot.fragments:
                key = {snapshot_key(side.snapshot): gaps}
                view(side.snapshot, fragment, key)[...] = steps[2][fragment.tensor][box(fragment)]
            np.testing.assert_array_equal(side.memory, gaps)  # padding is as it was


def matrix(dtype: str, rows: int, columns: int, row_bytes: int, begin: int) -> Layout:
    """A whole matrix at byte `begin` of a buffer, its rows `row_bytes` apart."""
    nbytes = begin + rows * row_bytes
    return Layout(
        [Tensor("t", dtype, [rows, columns])],
        [Buffer(0, "m", nbytes)],
        [Fragment("t", Region([0, 0], [rows, columns]), 0, "m", begin, [row_bytes, SIZES[dtype]])],
    )


@pytest.mark.parametrize("name", diff_implementations())
@pytest.mark.parametrize(
    ("dtype", "wire"),
    [(dtype, None) for dtype in ("uint8", "bfloat16", "float32", "int64")]
    + [("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_long_rows_at_any_alignment(name: str, dtype: str, wire: str | None) -> None:
    random = np.random.default_rng(3)
    for columns in (1, 31, 32, 33, 64, 127, 1000, 2051, 4096):
        size = SIZES[dtype]
        gap, begin = size * int(random.integers(0, 3)), size * int(random.integers(0, 40))
        live = matrix(dtype, 7, columns, columns * size + gap, begin)
        snapshot = snapshot_layout(live, wire)
        side = Side(live, snapshot, 0, name)
        values = random_values(live, columns)
        side.copy(values)
        for density in (0.002, 0.02, 0.4, 1.0):
            after = changed_some(values, density, columns)
            steps = [published(live, snapshot, v) for v in (values, after)]
            check(snapshot, side.compare(after), *steps)
            values = after


@pytest.mark.parametrize("name", diff_implementations())
@pytest.mark.parametrize("shape", [(300, 1024), (5, 9, 4096), (70, 3, 5, 600), (600_000,)])
def test_many_blocks_with_rows_and_planes(name: str, shape: tuple[int, ...]) -> None:
    live = whole("t", "bfloat16", shape, 1)
    snapshot = snapshot_layout(live)
    side = Side(live, snapshot, 0, name)
    values = random_values(live)
    side.copy(values)
    for density in (0.001, 0.1, 0.97):
        after = changed_some(values, density, 5)
        check(snapshot, side.compare(after), values, after)
        values = after


@pytest.mark.parametrize("name", diff_implementations())
def test_bits_decide_not_numbers(name: str) -> None:
    """-0.0 is not 0.0, NaNs are what their bits are, and NaN masters are published as one NaN."""
    bits = np.array([0x0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x3F800000], np.uint32)
    live = whole("t", "float32", (6,), 1)
    same, narrow = snapshot_layout(live), snapshot_layout(live, "bfloat16")
    values = {"t": bits}
    for snapshot, word in ((same, np.uint32), (narrow, np.uint16)):
        side = Side(live, snapshot, 0, name)
        side.copy(values)
        other = {"t": bits[[1, 0, 3, 4, 2, 5]]}
        changes = side.compare(other)
        assert changes.changed == (5 if word is np.uint32 else 2)
        check(snapshot, changes, *(published(live, snapshot, v) for v in (values, other)))


def test_a_digest_counts_the_part_that_cover_leaves() -> None:
    """Two ranks overlap: the second counts only the rows that the first does not hold."""
    tensor = Tensor("t", "bfloat16", [6, 700])
    buffers = [Buffer(rank, "m", 4 * 700 * 2) for rank in range(2)]
    fragments = [
        Fragment("t", Region([0, 0], [4, 700]), 0, "m", 0, [1400, 2]),
        Fragment("t", Region([2, 0], [4, 700]), 1, "m", 0, [1400, 2]),
    ]
    live = Layout([tensor], buffers, fragments)
    snapshot = snapshot_layout(live)
    values = random_values(live)
    for density in (0.01, 0.9):
        after = changed_some(values, density, 4)
        for name in diff_implementations():
            total = np.zeros(1, np.uint64)
            for rank in range(2):
                side = Side(live, snapshot, rank, name)
                side.copy(values)
                total += side.compare(after).increments
            whole_layout = whole("t", "bfloat16", (6, 700), 1)
            sums = [digest(whole_layout, scatter(whole_layout, v)) for v in (values, after)]
            np.testing.assert_array_equal(total, sums[1] - sums[0])


def entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


@pytest.mark.parametrize(
    "density", [0.0001, 0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3]
)
def test_random_changes_cost_their_entropy(density: float) -> None:
    live = whole("t", "bfloat16", (4096, 1024), 1)
    snapshot = snapshot_layout(live)
    values = random_values(live)
    random = np.random.default_rng(7)
    after = values["t"] ^ (random.random((4096, 1024)) < density).astype(np.uint16)
    memory = values["t"].copy()
    descriptors, payloads, changed = diff(live, snapshot, {(0, "t"): after}, memory)
    np.testing.assert_array_equal(memory, after)
    chunks = len(Blocks(snapshot).chunk_begins) - 1
    nbytes = sum(map(len, payloads)) + 4 * len(descriptors) + 8 * chunks + 12
    p = changed / after.size
    assert nbytes <= 1.15 * (entropy(p) / (8 * p) + 2) * changed
    assert nbytes <= 1.01 * after.nbytes


@pytest.mark.parametrize("cluster", ["rows", "columns", "runs", "one block", "everything"])
def test_clusters_never_cost_more_than_full(cluster: str) -> None:
    shape = (1024, 1024)
    live = whole("t", "bfloat16", shape, 1)
    mask = np.zeros(shape, bool)
    random = np.random.default_rng(8)
    if cluster == "rows":
        mask[random.random(1024) < 0.1] = True
    elif cluster == "columns":
        mask[:, random.random(1024) < 0.1] = True
    elif cluster == "runs":
        mask.reshape(-1, 256)[random.random(4096) < 0.3] = True
    elif cluster == "one block":
        mask[:512, :512] = True
    else:
        mask[...] = True
    before = random_values(live)["t"]
    after = before ^ mask.astype(np.uint16)
    memory = before.copy()
    descriptors, payloads, changed = diff(live, snapshot_layout(live), {(0, "t"): after}, memory, 1)
    assert changed == mask.sum()
    nbytes = sum(map(len, payloads)) + 4 * len(descriptors) + 8 + 12
    assert nbytes <= 2 * changed + mask.size / 8 + 100
    assert nbytes <= 1.01 * after.nbytes
    if cluster in ("one block", "everything"):
        assert {kind(int(word)) for word in descriptors} <= {"whole", "same"}


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_payloads_are_refused_or_stay_in_bounds(data: st.DataObject) -> None:
    elements, size = data.draw(st.integers(1, 3000)), data.draw(st.sampled_from([1, 2, 4, 8]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    dtype = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64"}[size]
    live = whole("t", dtype, (elements,), 1)
    before = random.integers(0, 99, elements).astype(WORDS[size])
    mask = random.random(elements) < data.draw(st.sampled_from([0.001, 0.01, 0.2, 0.6]))
    after = before ^ mask.astype(before.dtype)
    [word], [payload], _ = diff(live, snapshot_layout(live), {(0, "t"): after}, before.copy(), 1)
    mutated = bytearray(payload)
    for _ in range(data.draw(st.integers(0, 3))):
        if mutated:
            mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del mutated[data.draw(st.integers(0, len(mutated))) :]
        word = (int(word) & 127) | len(mutated) << 7
    if data.draw(st.booleans()):
        word = int(word) ^ 1 << data.draw(st.integers(0, 6))
    try:
        positions, values = decode_block(int(word), bytes(mutated), elements, size)
    except SnapshotError:
        return
    assert 0 < positions.size == len(values) // size
    assert (np.diff(positions.astype(np.int64)) > 0).all() and positions[-1] < elements


def test_what_does_not_pair_is_refused_by_name() -> None:
    live = whole("t", "float16", (4, 4), 1)
    other = Layout(
        live.tensors,
        [Buffer(0, "m", 16)],
        [Fragment("t", Region([0, 0], [2, 4]), 0, "m", 0, [8, 2])],
    )
    with pytest.raises(LayoutError, match=r"'t' \[0:2, 0:4\].*snapshot_layout"):
        Diff(live, other)
    with pytest.raises(LayoutError, match="cannot be published"):
        Diff(live, whole("t", "float32", (4, 4), 1))
    with pytest.raises(LayoutError, match="has one buffer"):
        Diff(live, whole("t", "float16", (4, 4), 2))
    with pytest.raises(LayoutError, match="counted by rank 0"):
        Diff(other, other, live)
    memory = np.zeros((4, 4), np.uint16)
    with pytest.raises(BufferMismatchError, match="'t' of rank 0"):
        diff(live, live, {}, memory)
    with pytest.raises(BufferMismatchError, match="32 writable"):
        diff(live, live, {(0, "t"): memory}, memory[:2].copy())
    with pytest.raises(BufferMismatchError, match="read-only"):
        diff(live, live, {(0, "t"): memory}, memory.tobytes())
    with pytest.raises(LayoutError, match=r"'imaginary'.*generic, naive"):
        diff(live, live, {(0, "t"): memory}, memory.copy(), 0, "imaginary")
    with pytest.raises(LayoutError, match="threads"):
        diff(live, live, {(0, "t"): memory}, memory.copy(), -1)


def test_implementations_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diff_implementations()[-2:] == ["generic", "naive"]
    monkeypatch.setenv("KIMISYS_BROADCAST_IMPLEMENTATION", "imaginary")
    live = whole("t", "uint8", (4,), 1)
    with pytest.raises(LayoutError, match="imaginary"):
        diff(live, live, {(0, "t"): bytes(4)}, bytearray(4))
