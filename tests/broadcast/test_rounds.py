"""Rounds: every round covers its tensors exactly once, and no replica is left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    SIZES,
    Buffers,
    allocate,
    box,
    layouts,
    random_values,
    scatter,
    split,
    tensors,
    view,
    whole,
)

from kimisys.broadcast import digest
from kimisys.broadcast.rounds import incomplete, rounds
from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

DTYPES = ("uint8", "bfloat16", "float32")


@settings(deadline=None)
@given(st.data())
def test_rounds_are_exact_covers_of_all_replicas(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(tensors(DTYPES)), ranks=2))
    values = random_values(layout)
    buffers = scatter(layout, values)
    shapes = {t.name: t.shape for t in layout.tensors}
    expected = digest(layout.cover(), buffers)
    index = {t.name: i for i, t in enumerate(layout.tensors)}
    touched: Buffers = allocate(layout, 0)
    made = rounds(layout)
    assert set(made[0].names) == set(shapes)
    for each in made:
        counts = {name: np.zeros(shapes[name], int) for name in each.names}
        for fragment in each.layout.fragments:
            counts[fragment.tensor][box(fragment)] += 1
            view(layout, fragment, touched)[...] = 1
        assert all((count == 1).all() for count in counts.values())
        digests = digest(each.layout, buffers)
        assert all(digests[index[name]] == expected[index[name]] for name in each.names)
    everything = allocate(layout, 0)
    for fragment in layout.fragments:
        view(layout, fragment, everything)[...] = 1
    for where, bytes_ in everything.items():
        np.testing.assert_array_equal(touched[where], bytes_)


def test_a_layout_without_replicas_has_one_round() -> None:
    layout = split("t", "bfloat16", (4, 4), 0, 2)
    (only,) = rounds(layout)
    assert only.names == ("t",)
    assert only.layout.fragments == layout.fragments
    assert only.of_rank(1).layout.fragments == layout.fragments[1:]


def test_replicas_take_turns() -> None:
    made = rounds(whole("t", "bfloat16", (4, 4), 3))
    assert [[f.rank for f in each.layout.fragments] for each in made] == [[0], [1], [2]]


def test_a_hole_is_not_hidden_by_a_replica() -> None:
    half = Region([0], [2])
    layout = Layout(
        [Tensor("t", "uint8", [4])],
        [Buffer(0, "m", 4)],
        [Fragment("t", half, 0, "m", 0, [1]), Fragment("t", half, 0, "m", 2, [1])],
    )
    assert incomplete(layout) == {"t": (2, 4)}
    with pytest.raises(LayoutError, match="'t'"):
        rounds(layout)


def test_empty_and_scalar_tensors() -> None:
    table = [Tensor("none", "uint8", [3, 0]), Tensor("one", "float32", [])]
    layout = Layout(
        table,
        [Buffer(0, "m", 4), Buffer(1, "m", 4)],
        [
            Fragment("none", Region([0, 0], [3, 0]), 0, "m", 0, [0, 1]),
            Fragment("one", Region([], []), 0, "m", 0, []),
            Fragment("one", Region([], []), 1, "m", 0, []),
        ],
    )
    made = rounds(layout)
    assert [each.names for each in made] == [("none", "one"), ("one",)]
    assert SIZES["float32"] == 4
