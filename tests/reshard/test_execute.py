import mmap
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_layouts import (
    ITEMSIZE,
    Buffers,
    allocate,
    cast_bits,
    expected,
    is_nan,
    pairs,
    random_bits,
    sharded,
)

from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.reshard import (
    Buffer,
    Fragment,
    Layout,
    Padding,
    Place,
    Region,
    Tensor,
    implementations,
    plan,
)

NUMBER_CASTS = [("float32", "bfloat16"), ("bfloat16", "float32")]


def same(written: Buffers, wanted: Buffers) -> bool:
    return all(np.array_equal(written[key], wanted[key]) for key in wanted)


@settings(max_examples=300)
@given(pairs(), st.integers(0, 2**32), st.sampled_from(implementations()), st.integers(0, 3))
def test_every_byte_is_what_the_definition_says(
    pair: tuple[Layout, Layout], seed: int, implementation: str, threads: int
) -> None:
    source, destination = pair
    values = random_bits(list(source.tensors), seed)
    wanted = {
        t.name: cast_bits(values[t.name], s.dtype, t.dtype)
        for s, t in zip(source.tensors, destination.tensors, strict=True)
    }
    made = plan(source, destination)
    sources, destinations = expected(source, values), allocate(destination, fill=0xEE)
    made.execute(sources, destinations, threads=threads, implementation=implementation)
    assert same(destinations, expected(destination, wanted))
    assert same(sources, expected(source, values))
    for rank in destination.ranks:
        part = made.of_rank(rank)
        destinations = allocate(part.destination, fill=0xEE)
        part.execute(sources, destinations, threads=threads, implementation=implementation)
        assert same(destinations, expected(part.destination, wanted))


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("source", "destination"), NUMBER_CASTS)
def test_casts_agree_with_pytorch_on_every_kind_of_number(
    source: str, destination: str, transposed: bool, implementation: str
) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    # Each upper half with lower halves around the rounding points: ties, just above, just below.
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (upper[:, None] | lower) if source == "float32" else (upper >> 16).astype(np.uint16)
    bits = bits.reshape(256, -1)
    shape = bits.shape
    from_strides = (ITEMSIZE[source], 256 * ITEMSIZE[source])
    dense = (shape[1] * ITEMSIZE[source], ITEMSIZE[source])
    held = Layout(
        [Tensor("w", source, shape)],
        [Buffer(0, "x", bits.nbytes)],
        [Fragment("w", Region((0, 0), shape), 0, "x", 0, from_strides if transposed else dense)],
    )
    stored = np.ascontiguousarray(bits.T if transposed else bits)
    wanted = cast_bits(bits, source, destination)
    written = np.zeros_like(wanted)
    plan(held, sharded("w", destination, shape, 0, 1)).execute(
        {(0, "x"): stored}, {(0, "w"): written}, implementation=implementation
    )
    assert np.array_equal(written, wanted)
    assert np.array_equal(is_nan(written, destination), is_nan(bits, source))


@pytest.mark.parametrize("implementation", implementations()[:-1])
@pytest.mark.parametrize(
    ("source", "destination"),
    [("uint8", "uint8"), ("bfloat16", "bfloat16"), ("int64", "int64"), *NUMBER_CASTS],
)
def test_large_plans_are_split_and_streamed_and_still_right(
    source: str, destination: str, implementation: str
) -> None:
    shape = (2 * 40 * 2**20 // 4096 // ITEMSIZE[destination], 2048)
    held = sharded("w", source, shape, 1, 2)
    wanted = sharded("w", destination, shape, 0, 2)
    bits = random_bits(list(held.tensors), 7)["w"]
    sources = {
        (rank, "w"): np.ascontiguousarray(part) for rank, part in enumerate(np.split(bits, 2, 1))
    }
    destinations = allocate(wanted, fill=0xEE)
    plan(held, wanted).execute(sources, destinations, 2, implementation)
    cast = cast_bits(bits, source, destination)
    for rank, part in enumerate(np.split(cast, 2, 0)):
        assert np.array_equal(destinations[rank, "w"], part.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("kind", ["transposed", "spread", "few columns", "few rows"])
@pytest.mark.parametrize(("source", "destination"), [("bfloat16", "bfloat16"), *NUMBER_CASTS])
def test_what_is_gathered_or_transposed_past_the_caches_is_right(
    source: str, destination: str, kind: str
) -> None:
    """Odd shapes, into elements off their alignment and off a cache line; every implementation."""
    size, item = ITEMSIZE[source], ITEMSIZE[destination]
    count = (33 << 20) // item  # enough to be streamed
    short = {"few columns": 5, "few rows": 3}.get(kind, 2053)
    long = count // short | 1
    shape = (short, long) if kind == "few rows" else (long, short)
    stored = random_bits([Tensor("w", source, shape[::-1])], 5)["w"]
    strides = (size, shape[0] * size)
    if kind == "spread":
        stored = random_bits([Tensor("w", source, (shape[0], 2 * shape[1]))], 5)["w"]
        strides = (2 * shape[1] * size, 2 * size)
    bits = stored[:, ::2] if kind == "spread" else stored.T
    held = Layout(
        [Tensor("w", source, shape)],
        [Buffer(0, "x", stored.nbytes)],
        [Fragment("w", Region((0, 0), shape), 0, "x", 0, strides)],
    )
    cast = np.ascontiguousarray(cast_bits(bits, source, destination)).reshape(-1).view(np.uint8)
    for offset in (1, item):
        wanted = Layout(
            [Tensor("w", destination, shape)],
            [Buffer(0, "y", offset + cast.nbytes)],
            [Fragment("w", Region((0, 0), shape), 0, "y", offset, (shape[1] * item, item))],
            [Padding(0, "y", 0, offset)],
        )
        made = plan(held, wanted)
        assert made.nbytes > 32 << 20
        for implementation in implementations():
            written = allocate(wanted, fill=0xEE)[0, "y"]
            made.execute({(0, "x"): stored}, {(0, "y"): written}, 2, implementation)
            assert np.array_equal(written[offset:], cast), (implementation, offset)
            assert not written[:offset].any()


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(("source", "destination"), [("bfloat16", "bfloat16"), *NUMBER_CASTS])
def test_a_matrix_scattered_into_column_shards_is_right(
    source: str, destination: str, implementation: str
) -> None:
    """Uneven shards with rows of 2 to 8 KiB and one held twice: large enough to be streamed."""
    cuts, rows = [0, 1024, 2050, 4096], 8200
    held = sharded("w", source, (rows, cuts[-1]), 0, 1)
    fragments = [
        Fragment("w", Region((0, left), (rows, right - left)), rank, "w", 0, (size, item))
        for rank, (left, right) in enumerate([*pairwise(cuts), (0, 1024)])
        for item in [ITEMSIZE[destination]]
        for size in [(right - left) * item]
    ]
    buffers = [Buffer(f.rank, "w", rows * f.byte_strides[0]) for f in fragments]
    wanted = Layout([Tensor("w", destination, (rows, cuts[-1]))], buffers, fragments)
    bits = random_bits(list(held.tensors), 3)["w"]
    destinations = allocate(wanted, fill=0xEE)
    plan(held, wanted).execute({(0, "w"): bits}, destinations, 2, implementation)
    cast = cast_bits(bits, source, destination)
    for fragment in fragments:
        left, width = fragment.region.offset[1], fragment.region.extent[1]
        part = np.ascontiguousarray(cast[:, left : left + width])
        assert np.array_equal(destinations[fragment.rank, "w"], part.reshape(-1).view(np.uint8))


ROWS = sharded("w", "int8", (8, 8), 0, 2)
PLAN = plan(ROWS, sharded("w", "int8", (8, 8), 1, 2))


def memory() -> tuple[Buffers, Buffers]:
    sources = allocate(PLAN.source)
    for rank in (0, 1):
        sources[rank, "w"][:] = np.arange(32 * rank, 32 * rank + 32)
    return sources, allocate(PLAN.destination, fill=0xEE)


def refused(sources: object, destinations: object, *words: str) -> None:
    with pytest.raises(BufferMismatchError) as error:
        PLAN.execute(sources, destinations)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_missing_short_and_long_buffers_are_refused_before_anything_is_written(side: str) -> None:
    for change, word in [(None, "missing"), (31, "31 bytes"), (33, "33 bytes")]:
        sources, destinations = memory()
        changed = sources if side == "source" else destinations
        untouched = destinations[0, "w"]
        if change is None:
            del changed[1, "w"]
        else:
            changed[1, "w"] = np.zeros(change, np.uint8)
        refused(sources, destinations, f"{side} buffer 'w' of rank 1", word)
        assert np.all(untouched == 0xEE)


def test_memory_of_the_wrong_kind_is_refused_before_anything_is_written() -> None:
    sources, destinations = memory()
    destinations[1, "w"].setflags(write=False)
    refused(sources, destinations, "'w' of rank 1", "read-only")
    refused(sources, {**destinations, (1, "w"): bytes(32)}, "'w' of rank 1", "read-only")
    gaps = np.zeros(64, np.uint8)[::2]
    refused({**sources, (1, "w"): gaps}, destinations, "source buffer 'w' of rank 1", "ndarray")
    tensor = torch.zeros(32, dtype=torch.uint8)
    refused({**sources, (1, "w"): tensor}, destinations, "Tensor", "numpy()")
    refused({**sources, (1, "w"): None}, destinations, "NoneType")
    assert np.all(destinations[0, "w"] == 0xEE)


@pytest.mark.parametrize("implementation", implementations())
def test_a_bound_plan_runs_again_on_what_its_memory_holds_then(implementation: str) -> None:
    sources, destinations = memory()
    execution = PLAN.bind(sources, destinations, implementation=implementation)
    assert all(np.all(each == 0xEE) for each in destinations.values())
    for value in (3, 4):
        for each in sources.values():
            each[:] = value
        execution.run()
        assert all(np.all(each == value) for each in destinations.values())


def test_a_bound_plan_keeps_its_memory() -> None:
    sources, destinations = memory()
    growing = bytearray(32)
    execution = PLAN.bind(sources, {**destinations, (1, "w"): growing})
    held = sources[0, "w"]
    del sources[0, "w"]
    with pytest.raises(BufferError):
        growing.extend(b"more")
    execution.run()
    assert bytes(destinations[0, "w"].reshape(8, 4)[:4]) == held.reshape(4, 8)[:, :4].tobytes()
    del execution
    growing.extend(b"more")


def test_binding_refuses_what_executing_refuses() -> None:
    sources, destinations = memory()
    with pytest.raises(BufferMismatchError, match="missing"):
        PLAN.bind({}, destinations)
    with pytest.raises(BufferMismatchError, match="overlaps"):
        PLAN.bind(sources, {key: sources[0, "w"] for key in destinations})
    with pytest.raises(LayoutError, match="threads is -1"):
        PLAN.bind(sources, destinations, threads=-1)


@pytest.mark.parametrize("implementation", implementations())
def test_any_number_of_threads_will_do(implementation: str) -> None:
    for threads in (1, 1 << 10, 1 << 62, (1 << 63) - 1):
        sources, destinations = memory()
        PLAN.execute(sources, destinations, threads, implementation)
        whole = np.arange(64, dtype=np.uint8).reshape(8, 8)
        assert destinations[0, "w"].tobytes() == whole[:, :4].tobytes()


def test_memory_that_would_be_read_and_written_is_refused() -> None:
    sources, destinations = memory()
    both = np.zeros(48, np.uint8)
    refused({**sources, (0, "w"): both[:32]}, {**destinations, (1, "w"): both[16:]}, "overlaps")
    refused(sources, {key: both[:32] for key in destinations}, "overlaps", "rank 0", "rank 1")
    sources[0, "w"] = both[:32]
    destinations[1, "w"] = np.zeros(32, np.uint8)
    PLAN.execute(sources, destinations)


def test_any_buffer_will_do_and_other_keys_are_left_alone() -> None:
    sources, destinations = memory()
    PLAN.execute(sources, destinations)
    with mmap.mmap(-1, 32) as mapped:
        others = {(0, "w"): bytearray(32), (1, "w"): mapped, (7, "other"): None}
        PLAN.execute({(0, "w"): bytes(range(32)), (1, "w"): memoryview(sources[1, "w"])}, others)  # type: ignore[arg-type]
        assert bytes(others[0, "w"]) == destinations[0, "w"].tobytes()  # type: ignore[arg-type]
        assert mapped[:] == destinations[1, "w"].tobytes()
    shaped = {key: np.zeros((4, 2), np.int32) for key in destinations}
    PLAN.execute(sources, shaped)
    assert shaped[0, "w"].tobytes() == destinations[0, "w"].tobytes()


def test_a_source_that_is_not_read_may_be_absent() -> None:
    whole = Region((0,), (4,))
    both = Layout(
        [Tensor("w", "int8", (4,))],
        [Buffer(0, "x", 4), Buffer(1, "x", 4)],
        [Fragment("w", whole, rank, "x", 0, (1,)) for rank in (0, 1)],
        (),
        [Place(0, node=1), Place(1, node=0)],
    )
    written = np.zeros(4, np.int8)
    source = np.arange(4, dtype=np.int8)
    plan(both, sharded("w", "int8", (4,), 0, 1)).execute({(1, "x"): source}, {(0, "w"): written})
    assert np.array_equal(written, source)


def test_an_implementation_is_forced_by_argument_or_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *fast, last = implementations()
    assert last == "naive"
    assert fast[-1] == "generic"
    assert set(fast) <= {"avx512", "avx2", "generic"}
    sources, destinations = memory()
    monkeypatch.setenv("KIMISYS_RESHARD_IMPLEMENTATION", "naive")
    PLAN.execute(sources, destinations)
    monkeypatch.setenv("KIMISYS_RESHARD_IMPLEMENTATION", "fast")
    with pytest.raises(LayoutError, match=r"'fast'.*this machine has .*generic, naive"):
        PLAN.execute(sources, destinations)
    PLAN.execute(sources, destinations, implementation=fast[0])
    with pytest.raises(LayoutError, match="'quick'"):
        PLAN.execute(sources, destinations, implementation="quick")
    with pytest.raises(LayoutError, match="threads is -1"):
        PLAN.execute(sources, destinations, threads=-1)
