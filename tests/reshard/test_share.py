"""The shares of a plan: what each source rank writes when all of them fill one destination."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from sample_layouts import (
    allocate,
    cast_bits,
    elements,
    expected,
    pairs,
    random_bits,
    sharded,
)

from kimisys.errors import BufferMismatchError, PlanError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor, plan, prove


@given(pairs())
def test_shares_write_each_destination_byte_once(pair: tuple[Layout, Layout]) -> None:
    """Marks: each share runs alone over its own ones and its own zeros; a byte that it writes is
    the same after both."""
    source, destination = pair
    whole = plan(source, destination)
    written = {key: np.zeros(len(array), int) for key, array in allocate(destination).items()}
    memory = expected(source, random_bits(list(source.tensors), 3))
    for rank in source.ranks:
        part = whole.of_source(rank)
        assert prove(part) == part.proof
        assert all(copy.source_rank == rank for copy in part.copies)
        own = {key: array for key, array in memory.items() if key[0] == rank}
        over_ones, over_zeros = allocate(destination, 255), allocate(destination, 0)
        part.execute(own, over_ones)
        part.execute(own, over_zeros)
        for key, count in written.items():
            count += over_ones[key] == over_zeros[key]
        assert part.proof.destination_bytes == sum(
            int((over_ones[key] == over_zeros[key]).sum()) for key in written
        )
    if source.ranks:
        assert all((count == 1).all() for count in written.values())


@given(pairs())
def test_shares_together_are_the_plan(pair: tuple[Layout, Layout]) -> None:
    source, destination = pair
    whole = plan(source, destination)
    shares = [whole.of_source(rank) for rank in source.ranks]
    assert Counter(map(repr, whole.copies)) == Counter(repr(c) for s in shares for c in s.copies)
    values = random_bits(list(source.tensors), 4)
    memory, filled = expected(source, values), allocate(destination, 170)
    for share in shares:
        share.execute(memory, filled)
    dtypes = {tensor.name: tensor.dtype for tensor in source.tensors}
    cast = {t.name: cast_bits(values[t.name], dtypes[t.name], t.dtype) for t in destination.tensors}
    if shares:
        for key, array in expected(destination, cast).items():
            np.testing.assert_array_equal(filled[key], array)


def test_a_share_leaves_every_other_byte_alone() -> None:
    source = sharded("w", "float32", (6, 8), 1, 4)
    destination = sharded("w", "float32", (6, 8), 0, 1)
    share = plan(source, destination).of_source(2)
    buffers = allocate(destination, 7)
    share.execute({(2, "w"): np.full(6 * 2 * 4, 9, np.uint8)}, buffers)
    (fragment,) = destination.fragments
    for place, byte in elements(fragment):
        mine = place[1] in (4, 5)
        assert (buffers[0, "w"][byte : byte + 4] == (9 if mine else 7)).all()
    assert share.proof.destination_bytes == share.nbytes == 6 * 2 * 4


def test_a_share_asks_for_no_buffer_that_it_does_not_write() -> None:
    both = Layout.merge([sharded("v", "int8", (4,), 0, 1), sharded("w", "int8", (4,), 0, 2)])
    share = plan(both, Layout.merge([both.of_rank(0), moved(both, 5)])).of_source(1)
    written = {(c.destination_rank, c.destination_buffer) for c in share.copies}
    assert written == {(5, "w")}
    share.execute({(1, "w"): np.ones(2, np.uint8)}, {(5, "w"): np.zeros(2, np.uint8)})
    with pytest.raises(BufferMismatchError, match="destination buffer 'w' of rank 5 is missing"):
        share.execute({(1, "w"): np.ones(2, np.uint8)}, {})


def moved(layout: Layout, rank: int) -> Layout:
    """What rank 1 of `layout` holds, as if `rank` held it."""
    part = layout.of_rank(1)
    return Layout(
        part.tensors,
        [Buffer(rank, b.name, b.nbytes) for b in part.buffers],
        [
            Fragment(f.tensor, f.region, rank, f.buffer, f.byte_offset, f.byte_strides)
            for f in part.fragments
        ],
    )


def test_the_lowest_rank_writes_the_padding() -> None:
    source = sharded("w", "int8", (4,), 0, 2)
    destination = Layout(
        [Tensor("w", "int8", (4,))],
        [Buffer(0, "x", 7)],
        [Fragment("w", Region((0,), (4,)), 0, "x", 0, (1,))],
        [Padding(0, "x", 4, 3)],
    )
    proofs = [plan(source, destination).of_source(rank).proof for rank in (0, 1)]
    assert [p.padding_bytes for p in proofs] == [3, 0]
    assert [p.destination_bytes for p in proofs] == [5, 2]


def test_padding_of_no_bytes_asks_for_no_buffer() -> None:
    source = sharded("w", "int8", (4,), 0, 2)
    destination = Layout(
        [Tensor("w", "int8", (4,))],
        [Buffer(0, "x", 2), Buffer(0, "y", 2)],
        [Fragment("w", Region((2 * i,), (2,)), 0, "xy"[i], 0, (1,)) for i in (0, 1)],
        [Padding(0, "y", 0, 0)],
    )
    written = np.zeros(2, np.uint8)
    share = plan(source, destination).of_source(0)
    share.execute({(0, "w"): np.ones(2, np.uint8)}, {(0, "x"): written})
    assert written.all()


def test_a_share_says_whose_it_is() -> None:
    whole = plan(sharded("w", "int8", (8,), 0, 2), sharded("w", "int8", (8,), 0, 1))
    assert whole.share_of is None and "share" not in repr(whole)
    share = whole.of_source(1)
    assert share.share_of == 1
    assert repr(share).endswith("share of source rank 1)")


def test_a_share_of_nobody_is_refused() -> None:
    whole = plan(sharded("w", "int8", (8,), 0, 2), sharded("w", "int8", (8,), 0, 1))
    with pytest.raises(PlanError, match=r"no source rank 2; its ranks are \[0, 1\]"):
        whole.of_source(2)
    with pytest.raises(PlanError, match="already the share of source rank 0"):
        whole.of_source(0).of_source(1)
    assert whole.of_source(0).of_source(0).copies == whole.of_source(0).copies
    assert whole.of_source(1).of_rank(0).copies == whole.of_source(1).copies
