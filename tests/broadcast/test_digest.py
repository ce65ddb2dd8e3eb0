"""The digest against a reference written from its definition, and what it must notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import SIZES, layouts, random_values, scatter, split, tensors, whole

from kimisys.broadcast import digest, implementations
from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL = tuple(SIZES)


def mix(counter: int, bits: int) -> int:
    word = ((counter ^ bits) * FIRST) & MASK
    word = ((word ^ (word >> 32)) * SECOND) & MASK
    return word ^ (word >> 29)


def key(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return mix(value, 0)


def reference(name: str, values: np.ndarray) -> int:
    """The definition, on Python integers."""
    start = key(name)
    total = 0
    for index, value in enumerate(values.ravel().tolist()):
        total += mix((start + index * GOLDEN) & MASK, value ^ (value >> 32))
    return total & MASK


def dense(dtype: str, count: int, name: str = "t") -> Layout:
    return whole(name, dtype, (count,), 1)


@settings(deadline=None)
@given(st.data())
def test_any_layout_gives_the_reference(data: st.DataObject) -> None:
    table = data.draw(tensors(ALL))
    layout = data.draw(layouts(table))
    values = random_values(layout, data.draw(st.integers(0, 9)))
    buffers = scatter(layout, values)
    expected = [reference(t.name, values[t.name]) for t in layout.tensors]
    cover = layout.cover()
    for name in implementations():
        assert digest(cover, buffers, 1, name).tolist() == expected
    parts = [digest(cover.of_rank(rank), buffers, 2) for rank in cover.ranks]
    assert np.add.reduce(parts, dtype=np.uint64).tolist() == expected


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ALL)
def test_rows_columns_and_replicas_agree(axis: int, dtype: str) -> None:
    cut = split("t", dtype, (12, 20), axis, 4)
    values = random_values(cut)
    expected = [reference("t", values["t"])]
    assert digest(cut, scatter(cut, values)).tolist() == expected
    copies = whole("t", dtype, (12, 20), 3)
    assert digest(copies.cover(), scatter(copies, values)).tolist() == expected
    assert digest(copies, scatter(copies, values)).tolist() == [expected[0] * 3 & MASK]


@pytest.mark.parametrize("dtype", ALL)
def test_every_single_bit_counts(dtype: str) -> None:
    layout = dense(dtype, 33)
    buffers = scatter(layout, random_values(layout))
    memory = buffers[0, "t"]
    seen = {digest(layout, buffers).item()}
    for bit in range(memory.size * 8):
        memory[bit // 8] ^= 1 << (bit % 8)
        seen.add(digest(layout, buffers).item())
        memory[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == memory.size * 8 + 1


def test_swaps_moves_names_and_missing_zeros_count() -> None:
    def of(values: list[int], name: str = "t") -> int:
        layout = dense("bfloat16", len(values), name)
        return digest(layout, {(0, name): np.array(values, np.uint16)}).item()

    assert of([1, 2, 3]) != of([2, 1, 3])
    assert of([7, 0, 0]) != of([0, 7, 0])
    assert of([0, 0, 0]) != of([0, 0, 0, 0])
    assert of([0]) != 0
    assert of([1, 2, 3]) != of([1, 2, 3], "u")
    seen = {of([7 if i == j else 0 for i in range(64)]) for j in range(64)}
    assert len(seen) == 64


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 39), st.integers(0, 99))
def test_swapping_any_two_unequal_elements_counts(n: int, i: int, j: int, seed: int) -> None:
    layout = dense("float32", n)
    values = random_values(layout, seed)["t"]
    i, j = i % n, j % n
    swapped = values.copy()
    swapped[[i, j]] = values[[j, i]]
    same = digest(layout, {(0, "t"): values}) == digest(layout, {(0, "t"): swapped})
    assert same.item() == (values[i] == values[j])


def test_a_tensor_outside_the_layout_has_digest_zero() -> None:
    layout = Layout(
        [Tensor("a", "uint8", [2]), Tensor("b", "uint8", [2])],
        [Buffer(0, "m", 2), Buffer(0, "unused", 9)],
        [Fragment("b", Region([0], [2]), 0, "m", 0, [1])],
    )
    digests = digest(layout, {(0, "m"): b"xy"})
    assert digests.dtype == np.uint64 and digests.shape == (2,)
    assert digests.tolist() == [0, reference("b", np.frombuffer(b"xy", np.uint8))]


def test_large_tensors_use_all_threads_alike() -> None:
    layout = split("t", "bfloat16", (700, 1024), 1, 2)
    buffers = scatter(layout, random_values(layout))
    expected = digest(layout, buffers, 1, "naive").tolist()
    for name in implementations():
        assert digest(layout, buffers, 3, name).tolist() == expected


def test_implementations_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"generic", "naive"} <= set(implementations())
    layout = dense("uint8", 3)
    monkeypatch.setenv("KIMISYS_BROADCAST_IMPLEMENTATION", "imaginary")
    with pytest.raises(LayoutError, match=r"'imaginary'.*generic, naive"):
        digest(layout, {(0, "t"): b"abc"})
    assert digest(layout, {(0, "t"): b"abc"}, 0, "naive").item() != 0


def test_wrong_buffers_are_named() -> None:
    layout = dense("uint8", 3)
    with pytest.raises(BufferMismatchError, match=r"'t' of rank 0 with 3 bytes, got 4"):
        digest(layout, {(0, "t"): b"abcd"})
    with pytest.raises(BufferMismatchError, match=r"'t' of rank 0"):
        digest(layout, {})
    with pytest.raises(BufferMismatchError, match="C-contiguous"):
        digest(layout, {(0, "t"): np.zeros(6, np.uint8)[::2]})
    with pytest.raises(LayoutError, match="threads"):
        digest(layout, {(0, "t"): b"abc"}, -1)
