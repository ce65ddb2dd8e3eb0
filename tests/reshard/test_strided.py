"""`boxes` against the element by element reading of the same views."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.reshard.strided import Piece, Side, axis_of, boxes, unravel


@st.composite
def factored(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    """A shape of `count` elements, with an extent of one here and there."""
    shape = []
    while count > 1:
        factor = draw(st.sampled_from([d for d in range(2, count + 1) if count % d == 0]))
        shape.append(factor)
        count //= factor
    if draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def views(draw: st.DrawFn) -> tuple[Piece, tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """The same index set as a view of two storages, one of them permuted, both sliced."""
    count = draw(st.sampled_from([1, 12, 24, 30, 36, 64]))
    shape = draw(factored(count))
    order = draw(st.permutations(range(len(shape))))
    first = np.arange(count).reshape(shape)
    second = np.arange(count).reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    cut = tuple(
        slice(draw(st.integers(0, n - 1)) if draw(st.booleans()) else 0, None) for n in shape
    )
    sides = []
    for view in (first[cut], second[cut]):
        strides = tuple(stride // view.itemsize for stride in view.strides)
        sides.append(Side(int(view.flat[0]), strides))
    free = draw(st.booleans())
    return Piece(first[cut].shape, tuple(sides)), (
        draw(factored(count)),
        None if free else draw(factored(count)),
    )


def elements(piece: Piece) -> list[tuple[int, ...]]:
    """Where each index of the piece stands, on every side."""
    return [
        tuple(
            s.offset + sum(i * t for i, t in zip(index, s.strides, strict=True))
            for s in piece.sides
        )
        for index in itertools.product(*map(range, piece.sizes))
    ]


@settings(max_examples=400, deadline=None)
@given(views())
def test_boxes_hold_the_same_elements_and_are_boxes(case) -> None:
    piece, shapes = case
    found = list(boxes(piece, shapes))
    assert sorted(itertools.chain(*map(elements, found))) == sorted(elements(piece))
    for box, (side, shape) in itertools.product(found, enumerate(shapes)):
        if shape is None:
            continue
        runs = [axis_of(stride, shape) for stride in box.sides[side].strides]
        assert all(step == 1 for _, step in runs)
        assert len({axis for axis, _ in runs}) == len(runs)
        start = unravel(box.sides[side].offset, shape)
        for (axis, _), size in zip(runs, box.sizes, strict=True):
            assert start[axis] + size <= shape[axis]


def test_a_column_shard_is_one_box() -> None:
    columns = Piece((6, 4), (Side(4, (8, 1)),))
    assert list(boxes(columns, ((6, 8),))) == [columns]


def test_a_flat_range_is_head_body_and_tail() -> None:
    flat = Piece((20,), (Side(5, (1,)),))
    found = list(boxes(flat, ((4, 8),)))
    assert sorted(prod(box.sizes) for box in found) == [1, 3, 16]


def test_a_broadcast_is_unrolled() -> None:
    repeated = Piece((3, 4), (Side(0, (4, 1)), Side(0, (0, 1))))
    assert len(list(boxes(repeated, (None, (4,))))) == 3


def test_too_many_boxes_are_refused() -> None:
    scattered = Piece((1 << 21, 1), (Side(0, (2, 1)),))
    with pytest.raises(ValueError, match="boxes"):
        list(boxes(scattered, ((1 << 22,),)))
