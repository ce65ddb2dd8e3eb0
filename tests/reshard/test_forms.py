"""The compact forms: they read back, stand for values and not for the way these were made, and
refuse whatever is not theirs."""

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_layouts import pairs, sharded
from symbolic_worlds import worlds

from kimisys.errors import LayoutError, PlanError
from kimisys.reshard import (
    Block,
    Buffer,
    Instance,
    Layout,
    Padding,
    Place,
    Plan,
    SymbolicLayout,
    SymbolicPlan,
    Tensor,
    plan,
    symbolic_plan,
)

World = tuple[SymbolicLayout, SymbolicLayout]


class Form(Protocol):
    fingerprint: str

    def to_bytes(self) -> bytes: ...


FORMS: list[Callable[[bytes], Form]] = [
    Layout.from_bytes,
    SymbolicLayout.from_bytes,
    Plan.from_bytes,
    SymbolicPlan.from_bytes,
]


def values(world: World) -> list[Form]:
    """One of each kind, and a share."""
    made = symbolic_plan(*world)
    part = made.of_rank(world[1].ranks[0])
    share = made.of_source(world[0].ranks[0])
    return [world[0].concrete(), world[0], part, share, made]


@settings(deadline=None)
@given(worlds())
def test_what_is_written_reads_back(world: World) -> None:
    for value in values(world):
        data = value.to_bytes()
        again = type(value).from_bytes(data)  # type: ignore[attr-defined]
        assert again.to_bytes() == data
        assert again.fingerprint == value.fingerprint
        if isinstance(value, Layout | SymbolicLayout):
            assert again == value
        if isinstance(value, Plan):
            assert isinstance(again, Plan)
            assert (again.source, again.destination) == (value.source, value.destination)
            assert (again.copies, again.share_of) == (value.copies, value.share_of)
        if isinstance(value, Plan | SymbolicPlan):
            assert again.proof == value.proof


@given(pairs())
def test_a_layout_from_arrays_is_the_layout(pair: tuple[Layout, Layout]) -> None:
    for layout in pair:
        tensors = list(reversed(layout.tensors))
        buffers = list(reversed(layout.buffers))
        place = {(b.rank, b.name): i for i, b in enumerate(buffers)}
        names = [tensor.name for tensor in tensors]
        fragments = layout.fragments

        def table(rows: list[tuple[int, ...]]) -> np.ndarray:
            padded = [[*row, *[-1] * (4 - len(row))] for row in rows]
            return np.array(padded, np.int64).reshape(-1, 4)

        made = Layout.from_arrays(
            tensors,
            buffers,
            [names.index(f.tensor) for f in fragments],
            [place[f.rank, f.buffer] for f in fragments],
            table([f.region.offset for f in fragments]),
            table([f.region.extent for f in fragments]),
            [f.byte_offset for f in fragments],
            table([f.byte_strides for f in fragments]),
            np.array(
                [(place[p.rank, p.buffer], p.byte_offset, p.nbytes) for p in layout.padding],
                np.int64,
            ).reshape(-1, 3),
        )
        assert made == layout


def test_arrays_that_do_not_fit_are_refused() -> None:
    tensors, buffers = (
        sharded("w", "int8", (8, 2), 0, 1).tensors,
        sharded("w", "int8", (8, 2), 0, 1).buffers,
    )
    good = [[0], [0], [[0, 0]], [[8, 2]], [0], [[2, 1]]]
    assert Layout.from_arrays(tensors, buffers, *good) == sharded("w", "int8", (8, 2), 0, 1)
    bad: list[tuple[int, object, str]] = [
        (0, [1], "names tensor 1 of 1"),
        (0, [-1], "names tensor -1 of 1"),
        (1, [1], "buffer 1 of a table of 1"),
        (1, [0, 0], "buffer"),
        (2, [[0]], "offset has 1 columns; tensor 'w' has 2 dimensions"),
        (3, [8, 2], "extent"),
        (4, [1], "leaves buffer"),
        (2, [[0.5, 0]], "offset should be an array of integers, and is one of kind 'f'"),
        (0, ["w"], "tensor should be an array of integers"),
    ]
    for argument, value, words in bad:
        arguments: list[object] = list(good)
        arguments[argument] = value
        with pytest.raises(LayoutError, match=words):
            Layout.from_arrays(tensors, buffers, *arguments)  # type: ignore[arg-type]


def small(order: Callable[[list[Block]], list[Block]], reverse: bool) -> World:
    """Two blocks on each side, in any order of insertion."""

    def flip(instances: list[Instance]) -> list[Instance]:
        return instances[::-1] if reverse else instances

    def side(dimension: int, ranks: int) -> SymbolicLayout:
        dense = sharded("layers.{}.w", "float32", (8, 8), dimension, ranks)
        outer = sharded("embedding", "float32", (8, 8), dimension, ranks)
        tables = [Tensor("unused", "int8", (1,)), *outer.tensors]
        outer = Layout(
            tables[::-1] if reverse else tables,
            outer.buffers[::-1] if reverse else outer.buffers,
            outer.fragments,
        )
        layers = [Instance(str(layer), range(ranks)) for layer in (9, 10)]
        blocks = [Block(dense, flip(layers)), Block(outer, [Instance("", range(ranks))])]
        places = [Place(rank, rank // 2, rank % 2) for rank in range(ranks)]
        return SymbolicLayout(order(blocks), places[::-1] if reverse else places)

    return side(0, 4), side(1, 2)


def test_a_fingerprint_stands_for_the_value() -> None:
    first, second = small(list, False), small(lambda blocks: blocks[::-1], True)
    for one, other in zip(values(first), values(second), strict=True):
        assert one.to_bytes() == other.to_bytes()
        assert one.fingerprint == other.fingerprint
        assert len(one.fingerprint) == 32 and int(one.fingerprint, 16) >= 0
    assert first == second
    assert len({value.fingerprint for value in values(first)}) == 5
    # Written down, so that a change of the form or another machine is seen.
    assert Layout([], [], []).fingerprint == "56c32f2c5beada84682c337efb490d06"
    moved = SymbolicLayout(first[0].blocks, [*first[0].places[:-1], Place(3, 7)])
    assert moved != first[0] and moved.fingerprint != first[0].fingerprint


def test_a_fingerprint_is_the_same_in_other_processes() -> None:
    program = (
        "import sys; from kimisys.reshard import SymbolicLayout, symbolic_plan\n"
        "sides = [SymbolicLayout.from_bytes(bytes.fromhex(text)) for text in sys.argv[1:]]\n"
        "made = symbolic_plan(*sides)\n"
        "print(*(it.fingerprint for it in (*sides, made, made.of_rank(0), made.of_source(0))))"
    )
    sides = small(list, False)
    made = symbolic_plan(*sides)
    run = subprocess.run(
        [sys.executable, "-c", program, *(side.to_bytes().hex() for side in sides)],
        capture_output=True,
        text=True,
    )
    expected = [it.fingerprint for it in (*sides, made, made.of_rank(0), made.of_source(0))]
    assert run.stdout.split() == expected, run.stderr


def read(data: bytes) -> list[Form]:
    """What the readers make of the bytes; nothing but these two errors may come of it."""
    made = []
    for form in FORMS:
        try:
            made.append(form(data))
        except (LayoutError, PlanError) as error:
            assert str(error)
    return made


def check(data: bytes) -> None:
    for value in read(data):
        again = value.to_bytes()
        assert type(value).from_bytes(again).to_bytes() == again  # type: ignore[attr-defined]


SEEDS = [value.to_bytes() for value in values(small(list, False))]


@pytest.mark.parametrize(
    "data", SEEDS, ids=["layout", "symbolic layout", "plan", "share", "symbolic plan"]
)
def test_bytes_that_are_cut_off_are_refused(data: bytes) -> None:
    assert len(read(data)) == 1
    for end in range(len(data)):
        assert read(data[:end]) == []
    assert read(data + b"\0") == []
    assert read(b"kimisys.L2" + data[10:]) == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_with_some_of_them_changed_are_read_or_refused(data: st.DataObject) -> None:
    mutated = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(10, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "remove"]))
        if kind == "remove":
            del mutated[at : at + data.draw(st.integers(1, 3))]
            if len(mutated) < 12:
                break
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=10))
        else:
            mutated[at] = data.draw(st.integers(0, 255))
    check(bytes(mutated))


@pytest.mark.parametrize(
    "seed", SEEDS, ids=["layout", "symbolic layout", "plan", "share", "symbolic plan"]
)
def test_many_bytes_changed_one_at_a_time(seed: bytes) -> None:
    draw = random.Random(0)
    for at in range(10, len(seed)):
        for byte in (0, 1, 0x7F, 0xFF, draw.randrange(256)):
            check(seed[:at] + bytes([byte]) + seed[at + 1 :])


@given(st.binary(max_size=200), st.sampled_from(SEEDS))
def test_any_bytes_are_refused(noise: bytes, seed: bytes) -> None:
    assert read(noise) == []
    check(seed[:10] + noise)


def test_a_plan_that_is_read_is_proven() -> None:
    source, destination = sharded("w", "int8", (8,), 0, 2), sharded("w", "int8", (8,), 0, 1)
    data = plan(source, destination).to_bytes()
    # The last step: destination fragment + 0, source fragment + 1, what both hold.
    assert data[-6:] == bytes([0, 0, 0, 0, 2, 0])
    with pytest.raises(
        PlanError, match=r"'w' region \[0:4\] on destination rank 0 .* more than once"
    ):
        Plan.from_bytes(data[:-2] + bytes([0, 0]))
    one_step = data[:-7] + bytes([1, 0, 0, 0])
    with pytest.raises(PlanError, match=r"'w' .* has 8 elements, of which the plan writes 4"):
        Plan.from_bytes(one_step)


def test_the_share_of_a_rank_that_is_not_there_is_refused() -> None:
    padded = Layout((), [Buffer(0, "x", 4)], (), [Padding(0, "x", 0, 4)])
    for source in (Layout((), (), ()), sharded("w", "int8", (8,), 0, 2)):
        layouts = source.to_bytes()[10:] + padded.to_bytes()[10:]
        data = b"kimisys.P1" + layouts + bytes([1, 5, 0])  # of rank 5, no steps
        with pytest.raises(PlanError, match="source rank 5, which the source does not have"):
            Plan.from_bytes(data)


def test_a_short_text_cannot_ask_for_much() -> None:
    for data in (b"\xff\xff\xff\xff\x7f", b"\xff" * 9 + b"\x01", b"\xff" * 10):
        for magic in (b"kimisys.L1", b"kimisys.S1", b"kimisys.P1", b"kimisys.Q1"):
            assert read(magic + data) == []
