from collections import Counter

import pytest
from hypothesis import given
from sample_layouts import elements, pairs, sharded

from kimisys.errors import LayoutError, PlanError
from kimisys.reshard import (
    Buffer,
    Fragment,
    Layout,
    Padding,
    Place,
    Region,
    Tensor,
    plan,
    prove,
)


def test_rows_to_columns() -> None:
    source = sharded("w", "float32", (8, 8), 0, 4)
    destination = sharded("w", "bfloat16", (8, 8), 1, 2)
    made = plan(source, destination)
    assert repr(made) == "Plan(8 copies, 128 bytes, ranks [0, 1, 2, 3] -> ranks [0, 1])"
    assert (made.source, made.destination, made.nbytes) == (source, destination, 128)
    assert prove(made) == made.proof
    proof = made.proof
    assert (proof.destination_bytes, proof.copied_bytes, proof.padding_bytes) == (128, 128, 0)
    assert proof.copies == len(made.copies) == 8
    copy = next(c for c in made.copies if (c.source_rank, c.destination_rank) == (2, 1))
    assert (copy.tensor, copy.region, copy.extent) == ("w", Region((4, 4), (2, 4)), (2, 4))
    assert (copy.source_buffer, copy.source_offset, copy.source_strides) == ("w", 16, (32, 4))
    assert (copy.destination_offset, copy.destination_strides) == (32, (8, 2))
    assert (copy.source_dtype, copy.destination_dtype) == ("float32", "bfloat16")
    assert source.fragments[copy.source_fragment].rank == 2
    assert destination.fragments[copy.destination_fragment].rank == 1


def test_a_rank_of_a_plan_is_a_plan() -> None:
    made = plan(sharded("w", "int8", (8, 8), 0, 4), sharded("w", "int8", (8, 8), 1, 2))
    part = made.of_rank(1)
    assert part.destination == made.destination.of_rank(1)
    assert part.source == made.source
    assert [c.region for c in part.copies] == [
        c.region for c in made.copies if c.destination_rank == 1
    ]
    assert all(c.destination_rank == 1 for c in part.copies)
    assert part.proof.destination_bytes == 32
    with pytest.raises(PlanError, match=r"no destination rank 2; its ranks are \[0, 1\]"):
        made.of_rank(2)


@given(pairs())
def test_copies_write_each_destination_element_once_from_where_it_is(
    pair: tuple[Layout, Layout],
) -> None:
    source, destination = pair
    made = plan(source, destination)
    held = {
        (f.tensor, f.rank, f.buffer, place, byte)
        for f in source.fragments
        for place, byte in elements(f)
    }
    written: Counter[tuple[object, ...]] = Counter()
    for copy in made.copies:
        read = Fragment(
            copy.tensor,
            copy.region,
            copy.source_rank,
            copy.source_buffer,
            copy.source_offset,
            copy.source_strides,
        )
        for place, byte in elements(read):
            assert (copy.tensor, copy.source_rank, copy.source_buffer, place, byte) in held
        write = Fragment(
            copy.tensor,
            copy.region,
            copy.destination_rank,
            copy.destination_buffer,
            copy.destination_offset,
            copy.destination_strides,
        )
        for place, byte in elements(write):
            written[copy.tensor, copy.destination_rank, copy.destination_buffer, place, byte] += 1
    assert written == Counter(
        (f.tensor, f.rank, f.buffer, place, byte)
        for f in destination.fragments
        for place, byte in elements(f)
    )
    assert made.proof.copies == len(made.copies)
    assert plan(source, destination).copies == made.copies


def replicas(places: list[Place]) -> Layout:
    buffers = [Buffer(place.rank, "x", 4) for place in places]
    fragments = [Fragment("w", Region((0,), (4,)), p.rank, "x", 0, (1,)) for p in places]
    return Layout([Tensor("w", "int8", (4,))], buffers, fragments, (), places)


def test_of_replicas_the_same_device_serves_then_the_same_node() -> None:
    source = replicas([Place(0, node=1), Place(1, node=0, device=1), Place(2, node=0, device=0)])
    near = {Place(0): 2, Place(0, 0, 1): 1, Place(0, 0, 5): 1, Place(0, 1, 7): 0, Place(0, 9): 0}
    for place, rank in near.items():
        assert [c.source_rank for c in plan(source, replicas([place])).copies] == [rank]


def test_the_bytes_of_replicas_are_balanced_over_nics_then_over_ranks() -> None:
    far = replicas([Place(rank, node=9) for rank in range(12)])
    apart = replicas([Place(rank, node=0, device=rank, nic=rank) for rank in range(3)])
    assert Counter(c.source_rank for c in plan(apart, far).copies) == {0: 4, 1: 4, 2: 4}
    # Ranks 1 and 2 share a NIC.
    paired = replicas([Place(0, node=1), Place(1, node=0, device=1), Place(2, node=0, device=2)])
    assert Counter(c.source_rank for c in plan(paired, far).copies) == {0: 6, 1: 3, 2: 3}


def test_regions_that_overlap_without_fitting_are_cut() -> None:
    inner = Fragment("w", Region((1, 1), (4, 4)), 0, "x", 0, (4, 1))
    outer = Fragment("w", Region((0, 0), (6, 6)), 1, "x", 0, (6, 1))
    source = Layout(
        [Tensor("w", "int8", (6, 6))],
        [Buffer(0, "x", 16), Buffer(1, "x", 36)],
        [inner, outer],
        (),
        [Place(1, node=1)],
    )
    made = plan(source, sharded("w", "int8", (6, 6), 0, 1))
    assert Counter(c.source_rank for c in made.copies) == {0: 1, 1: 4}
    assert made.copies[0].region == inner.region


def test_a_fused_parameter_interleaved_by_rows_is_one_tiling() -> None:
    tensors = [Tensor("gate", "bfloat16", (3, 4)), Tensor("up", "bfloat16", (3, 2))]
    fused = [
        Fragment("gate", Region((0, 0), (3, 4)), 0, "gate_up", 0, (12, 2)),
        Fragment("up", Region((0, 0), (3, 2)), 0, "gate_up", 8, (12, 2)),
    ]
    destination = Layout(tensors, [Buffer(0, "gate_up", 36)], fused)
    source = Layout.merge(
        [sharded("gate", "bfloat16", (3, 4), 0, 1), sharded("up", "bfloat16", (3, 2), 0, 1)]
    )
    assert plan(source, destination).proof.destination_bytes == 36


ROWS = sharded("w", "float32", (8, 8), 0, 4)
COLUMNS = sharded("w", "float32", (8, 8), 1, 2)


def refused(source: Layout, destination: Layout, *words: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(source, destination)
    for word in words:
        assert word in str(error.value)


def test_an_element_without_a_source_is_refused() -> None:
    without_1 = Layout.merge([ROWS.of_rank(rank) for rank in (0, 2, 3)])
    refused(
        without_1,
        COLUMNS,
        "tensor 'w' region [2:4, 0:4]",
        "destination rank 0",
        "source ranks [0, 2, 3]",
    )
    refused(Layout(ROWS.tensors, [], []), COLUMNS, "'w' region [0:8, 0:4]", "rank 0", "no source")
    other = sharded("v", "float32", (8, 8), 1, 2)
    refused(ROWS, other, "'v'", "destination rank 0", "[0, 1, 2, 3]")


def test_shapes_and_dtypes_that_disagree_are_refused() -> None:
    shape = sharded("w", "float32", (4, 8), 1, 2)
    refused(ROWS, shape, "'w'", "(8, 8)", "(4, 8)", "[0, 1, 2, 3]", "[0, 1]")
    half = sharded("w", "float16", (8, 8), 1, 2)
    refused(ROWS, half, "'w'", "[0:8, 0:4]", "rank 0", "float32", "float16")


def halves(nbytes: int, second: int, padding: list[Padding]) -> Layout:
    return Layout(
        [Tensor("w", "int8", (8,))],
        [Buffer(3, "x", nbytes)],
        [
            Fragment("w", Region((0,), (4,)), 3, "x", 0, (1,)),
            Fragment("w", Region((4,), (4,)), 3, "x", second, (1,)),
        ],
        padding,
    )


def test_destination_bytes_written_twice_or_never_are_refused() -> None:
    source = sharded("w", "int8", (8,), 0, 1)
    assert plan(source, halves(8, 4, [])).proof.padding_bytes == 0
    assert plan(source, halves(12, 8, [Padding(3, "x", 4, 4)])).proof.padding_bytes == 4
    where = "of buffer 'x' on destination rank 3"
    twice = "tensor 'w' region [0:4] and by tensor 'w' region [4:8]"
    refused(source, halves(6, 2, []), f"bytes [2:4) {where}", "written twice", twice)
    refused(source, halves(12, 8, []), f"bytes [4:8) {where}", "not be written", "'w' region [4:8]")
    refused(source, halves(9, 4, []), f"bytes [8:9) {where}", "not be written", "end of the buffer")
    refused(source, halves(8, 4, [Padding(3, "x", 7, 1)]), f"[7:8) {where}", "padding")
    repeated = Fragment("w", Region((0,), (8,)), 0, "x", 0, (0,))
    refused(
        source,
        Layout([Tensor("w", "int8", (8,))], [Buffer(0, "x", 1)], [repeated]),
        "written twice",
        "'w' region [0:8]",
        "rank 0",
    )


def test_what_the_destination_does_not_want_need_not_be_there() -> None:
    table = [Tensor("w", "float32", (8, 8)), Tensor("only in the table", "int8", (3,))]
    destination = Layout(table, COLUMNS.buffers, COLUMNS.fragments)
    assert plan(ROWS, destination).nbytes == 256
    empty = Tensor("empty", "int8", (0, 3))
    fragment = Fragment("empty", Region((0, 0), (0, 3)), 0, "e", 0, (3, 1))
    assert plan(ROWS, Layout([empty], [Buffer(0, "e", 0)], [fragment])).copies == []
    assert plan(Layout([], [], []), Layout([], [], [])).proof.destination_bytes == 0


def test_a_scalar_is_copied() -> None:
    scalar = Layout(
        [Tensor("s", "int64", ())],
        [Buffer(0, "x", 8)],
        [Fragment("s", Region((), ()), 0, "x", 0, ())],
    )
    assert [c.region for c in plan(scalar, scalar).copies] == [Region((), ())]
    with pytest.raises(LayoutError):
        Layout(scalar.tensors, scalar.buffers, [Fragment("s", Region((0,), (1,)), 0, "x", 0, (8,))])
