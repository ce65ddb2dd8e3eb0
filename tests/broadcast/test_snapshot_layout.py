"""snapshot_layout: same fragments, one aligned buffer per rank, sizes of the wire dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    Values,
    allocate,
    assert_holds,
    layouts,
    random_values,
    rounded,
    scatter,
    tensors,
)

from kimisys.broadcast import snapshot_layout
from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Place, Region, Tensor, plan


def live_layout(dtype: str = "float32") -> Layout:
    """Two buffers of five and six elements on rank 1; the second ends with padding."""
    size = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}[dtype]
    return Layout(
        [Tensor("a", dtype, [5]), Tensor("b", dtype, [2, 2])],
        [Buffer(1, "p", 5 * size), Buffer(1, "q", 6 * size)],
        [
            Fragment("a", Region([0], [5]), 1, "p", 0, [size]),
            Fragment("b", Region([0, 0], [2, 2]), 1, "q", 0, [2 * size, size]),
        ],
        [Padding(1, "q", 4 * size, 2 * size)],
        [Place(1, node=3)],
    )


def test_offsets_strides_and_padding_scale() -> None:
    layout = snapshot_layout(live_layout(), "bfloat16")
    assert [t.dtype for t in layout.tensors] == ["bfloat16", "bfloat16"]
    assert layout.buffers == (Buffer(1, "snapshot", 64 + 12),)
    assert layout.fragments == (
        Fragment("a", Region([0], [5]), 1, "snapshot", 0, [2]),
        Fragment("b", Region([0, 0], [2, 2]), 1, "snapshot", 64, [4, 2]),
    )
    gap, tail = Padding(1, "snapshot", 10, 54), Padding(1, "snapshot", 64 + 8, 4)
    assert layout.padding == (gap, tail)
    assert layout.places == (Place(1, node=3),)


def test_none_keeps_dtypes_and_equal_dtypes_pass() -> None:
    for dtype, wire in [("float32", None), ("float8_e4m3fn", None), ("bfloat16", "bfloat16")]:
        layout = snapshot_layout(live_layout(dtype), wire)
        assert {t.dtype for t in layout.tensors} == {dtype}


def test_integers_are_not_cast() -> None:
    live = Layout(
        [Tensor("i", "int64", [2]), Tensor("w", "float32", [2])],
        [Buffer(0, "i", 16), Buffer(0, "w", 8)],
        [
            Fragment("i", Region([0], [2]), 0, "i", 0, [8]),
            Fragment("w", Region([0], [2]), 0, "w", 0, [4]),
        ],
    )
    layout = snapshot_layout(live, "bfloat16")
    assert [t.dtype for t in layout.tensors] == ["int64", "bfloat16"]
    assert layout.buffers == (Buffer(0, "snapshot", 64 + 4),)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_casts_that_nobody_can_make_are_refused(dtype: str) -> None:
    live = Layout(
        [Tensor("w", dtype, [4])],
        [Buffer(0, "w", 8)],
        [Fragment("w", Region([0], [4]), 0, "w", 0, [1 if "8" in dtype else 2])],
    )
    with pytest.raises(LayoutError, match=r"'w'.*cannot be published as bfloat16"):
        snapshot_layout(live, "bfloat16")
    with pytest.raises(LayoutError, match="cannot be published as int8"):
        snapshot_layout(live_layout(), "int8")


def test_a_buffer_that_does_not_scale_is_refused() -> None:
    def mixed(second: str, nbytes: int) -> Layout:
        return Layout(
            [Tensor("a", "float32", [2]), Tensor("b", second, [2])],
            [Buffer(0, "m", nbytes)],
            [
                Fragment("a", Region([0], [2]), 0, "m", 0, [4]),
                Fragment("b", Region([0], [2]), 0, "m", 8, [4 if second == "float32" else 1]),
            ],
        )

    with pytest.raises(LayoutError, match=r"'a' .* and 'b' .* do not shrink alike"):
        snapshot_layout(mixed("uint8", 10), "bfloat16")
    assert snapshot_layout(mixed("uint8", 10), None).buffers == (Buffer(0, "snapshot", 10),)
    with pytest.raises(LayoutError, match=r"buffer 'm' of rank 0: byte 17"):
        snapshot_layout(mixed("float32", 17), "bfloat16")


@settings(deadline=None)
@given(st.data())
def test_any_live_layout_publishes_itself(data: st.DataObject) -> None:
    live = data.draw(layouts(data.draw(tensors(("float32", "bfloat16", "int64")))))
    wire = data.draw(st.sampled_from([None, "bfloat16", "float32"]))
    sizes = {t.dtype for t in live.tensors}
    layout = snapshot_layout(live, wire)
    assert all(b.name == "snapshot" for b in layout.buffers)
    values = numbers(live)
    buffers = allocate(layout)
    plan(live, layout).execute(scatter(live, values), buffers, 1)
    dtypes = {t.name: (t.dtype, w.dtype) for t, w in zip(live.tensors, layout.tensors, strict=True)}
    expected = {name: as_wire(values[name], *dtypes[name]) for name in values}
    assert_holds(layout, buffers, expected)
    assert sizes == {t.dtype for t in layout.tensors} or wire is not None


def numbers(layout: Layout) -> Values:
    """Bits without float32 NaNs."""
    values = random_values(layout)
    for tensor in layout.tensors:
        if tensor.dtype == "float32":
            values[tensor.name] &= np.uint32(0xBFFFFFFF)
    return values


def as_wire(bits: np.ndarray, live: str, wire: str) -> np.ndarray:
    if (live, wire) == ("float32", "bfloat16"):
        return rounded(bits)
    if (live, wire) == ("bfloat16", "float32"):
        return bits.astype(np.uint32) << np.uint32(16)
    return bits
