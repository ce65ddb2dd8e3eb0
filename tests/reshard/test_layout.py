import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_layouts import elements, layouts, pairs, shapes, sharded

from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Place, Region, Tensor, itemsize


def test_values_print_compare_and_hash() -> None:
    region = Region((0, 4), (8, 4))
    fragment = Fragment("w", region, 1, "x", 16, (32, 4))
    assert repr(region) == "[0:8, 4:8]"
    assert repr(fragment) == "Fragment('w' [0:8, 4:8] at rank 1 'x' + 16, byte strides (32, 4))"
    assert repr(Tensor("w", "bfloat16", [8, 8])) == "Tensor('w', bfloat16, (8, 8))"
    assert repr(sharded("w", "float32", (8, 4), 0, 2)) == (
        "Layout(1 tensors, 2 fragments, 0 paddings in 2 buffers, 128 bytes on ranks [0, 1])"
    )
    assert fragment == Fragment("w", Region([0, 4], [8, 4]), 1, "x", 16, [32, 4])
    assert fragment != Fragment("w", region, 1, "x", 20, (32, 4))
    assert len({region, Region((0, 4), (8, 4)), Region((0, 4), (8, 3))}) == 2
    assert Place(3) == Place(3, node=0, device=0, nic=0)
    assert region != (0, 4)


def test_values_are_frozen() -> None:
    layout = sharded("w", "float32", (8, 4), 0, 2)
    values = [layout, layout.tensors[0], layout.fragments[0], layout.buffers[0], Place(0)]
    for value in values:
        for name in ("name", "rank", "fragments", "shape"):
            with pytest.raises(AttributeError):
                setattr(value, name, 1)
    assert isinstance(layout.fragments, tuple)
    assert isinstance(layout.fragments[0].region.offset, tuple)


def test_sizes_may_be_numpy_integers() -> None:
    size = np.int64(4)
    assert Tensor("w", "float32", (size, size)).nbytes == 64
    assert Region([size], [size]).elements == 4


def test_tables_are_sorted_and_fragments_keep_their_order() -> None:
    tensors = [Tensor("b", "int8", (2,)), Tensor("a", "int8", (2,))]
    buffers = [Buffer(1, "x", 2), Buffer(0, "y", 2), Buffer(0, "x", 2)]
    fragments = [
        Fragment("b", Region((0,), (2,)), 1, "x", 0, (1,)),
        Fragment("a", Region((0,), (2,)), 0, "y", 0, (1,)),
    ]
    layout = Layout(tensors, buffers, fragments, [Padding(0, "x", 0, 2)], [Place(3), Place(1)])
    assert [t.name for t in layout.tensors] == ["a", "b"]
    assert [(b.rank, b.name) for b in layout.buffers] == [(0, "x"), (0, "y"), (1, "x")]
    assert list(layout.fragments) == fragments
    assert layout.ranks == (0, 1, 3)
    assert [place.rank for place in layout.places] == [1, 3]


WHOLE = Region((0, 0), (4, 4))


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        (Fragment("v", WHOLE, 2, "x", 0, (16, 4)), ["'v'", "tensor table"]),
        (Fragment("w", WHOLE, 1, "x", 0, (16, 4)), ["'w'", "'x'", "rank 1"]),
        (Fragment("w", Region((1, 0), (4, 4)), 2, "x", 0, (16, 4)), ["[1:5, 0:4]", "rank 2"]),
        (Fragment("w", Region((0, -1), (4, 4)), 2, "x", 0, (16, 4)), ["dimension 1"]),
        (Fragment("w", Region((2**63 - 1, 0), (1, 4)), 2, "x", 0, (16, 4)), ["dimension 0"]),
        (Fragment("w", Region((0,), (4,)), 2, "x", 0, (16,)), ["2 dimensions"]),
        (Fragment("w", WHOLE, 2, "x", 0, (16,)), ["1 strides"]),
        (Fragment("w", WHOLE, 2, "x", 0, (16, -4)), ["negative byte stride"]),
        (Fragment("w", WHOLE, 2, "x", 4, (16, 4)), ["64 bytes", "ends at 68"]),
        (Fragment("w", WHOLE, 2, "x", -4, (16, 4)), ["byte -4"]),
        (Fragment("w", WHOLE, 2, "x", 0, (2**62, 2**62)), ["more than 2^63"]),
    ],
)
def test_a_fragment_that_does_not_fit_is_refused(fragment: Fragment, words: list[str]) -> None:
    tensors, buffers = [Tensor("w", "float32", (4, 4))], [Buffer(2, "x", 64)]
    Layout(tensors, buffers, [Fragment("w", WHOLE, 2, "x", 0, (16, 4))])
    with pytest.raises(LayoutError) as error:
        Layout(tensors, buffers, [fragment])
    for word in words:
        assert word in str(error.value)


def test_other_bad_layouts_are_refused() -> None:
    tensor, buffer = Tensor("w", "float32", (4, 4)), Buffer(2, "x", 64)
    with pytest.raises(LayoutError, match="'w' appears twice"):
        Layout([tensor, tensor], [], [])
    with pytest.raises(LayoutError, match="'x' of rank 2 appears twice"):
        Layout([], [buffer, buffer], [])
    with pytest.raises(LayoutError, match="padding of 5 bytes at byte 60"):
        Layout([], [buffer], [], [Padding(2, "x", 60, 5)])
    with pytest.raises(LayoutError, match="rank 1 has two places"):
        Layout([], [], [], [], [Place(1), Place(1, node=2)])
    with pytest.raises(LayoutError, match="unknown dtype 'float64'; use one of float32, bfloat16"):
        Tensor("w", "float64", (4,))
    with pytest.raises(LayoutError, match="'w' has the negative size -4"):
        Layout([Tensor("w", "float32", (-4,))], [], [])
    with pytest.raises(LayoutError, match="2 offsets and 1 extents"):
        Region((0, 0), (1,))
    with pytest.raises(LayoutError, match="64 bits"):
        _ = Tensor("w", "float32", (2**40, 2**40)).elements


def test_merge_of_the_ranks_is_the_whole() -> None:
    whole = sharded("w", "float32", (8, 4), 0, 4)
    assert Layout.merge([whole.of_rank(rank) for rank in whole.ranks]) == whole
    assert whole.of_rank(1).ranks == (1,)
    assert whole.of_rank(9).tensors == whole.tensors
    assert whole.of_rank(9).ranks == ()
    with pytest.raises(LayoutError, match="rank 1 appears twice"):
        Layout.merge([whole, whole.of_rank(1)])
    with pytest.raises(LayoutError, match=r"'w' is float32\(8, 4\) in one .* float32\(4, 8\)"):
        Layout.merge([whole, sharded("w", "float32", (4, 8), 0, 4)])


@st.composite
def overlapping_layouts(draw: st.DrawFn) -> Layout:
    return draw(layouts([Tensor("a", "int8", draw(shapes)), Tensor("b", "float32", (2, 3))], True))


@given(overlapping_layouts())
def test_a_cover_holds_each_element_once_at_its_first_owner(layout: Layout) -> None:
    order = {(b.rank, b.name): i for i, b in enumerate(layout.buffers)}
    owners: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    by_owner = sorted(layout.fragments, key=lambda f: order[f.rank, f.buffer])
    for fragment in by_owner:
        for place, byte in elements(fragment):
            owners.setdefault((fragment.tensor, place), []).append(
                (order[fragment.rank, fragment.buffer], byte)
            )
    cover = layout.cover()
    kept = {
        (fragment.tensor, place): (order[fragment.rank, fragment.buffer], byte)
        for fragment in cover.fragments
        for place, byte in elements(fragment)
    }
    assert sum(fragment.region.elements for fragment in cover.fragments) == len(kept)
    assert kept == {element: holders[0] for element, holders in owners.items()}
    assert (cover.tensors, cover.buffers, cover.padding) == (layout.tensors, layout.buffers, ())


@given(overlapping_layouts())
def test_the_cover_of_a_cover_is_itself(layout: Layout) -> None:
    cover = layout.cover()
    counts = Counter(repr(fragment) for fragment in cover.fragments)
    assert Counter(repr(fragment) for fragment in cover.cover().fragments) == counts


@given(pairs())
def test_the_text_form_comes_back_equal(pair: tuple[Layout, Layout]) -> None:
    for layout in pair:
        text = layout.to_json()
        assert Layout.from_json(text) == layout
        assert Layout.from_json(json.dumps(json.loads(text), indent=1)) == layout


def test_names_of_all_kinds_survive_the_text_form() -> None:
    for name in ['a"b\\c', "é€😀", "\x00\x1f\n", "model.layers.0.w", " "]:
        layout = Layout([Tensor(name, "int8", ())], [Buffer(0, name, 1)], [])
        assert Layout.from_json(layout.to_json()) == layout
        assert json.loads(layout.to_json())["tensors"] == [[name, "int8", []]]


TEXT = Layout(
    [Tensor("w", "float32", (4,))],
    [Buffer(0, "x", 20)],
    [Fragment("w", Region((0,), (4,)), 0, "x", 0, (4,))],
    [Padding(0, "x", 16, 4)],
    [Place(0)],
).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        TEXT + " 1",
        TEXT[:-1],
        TEXT.replace("float32", "float64"),
        TEXT.replace('"version":1', '"version":1.0'),
        TEXT.replace('"version":1', '"version":true'),
        TEXT.replace('"version":1', '"version":2'),
        TEXT.replace('"padding"', '"extra":[],"padding"'),
        TEXT.replace('["w",', '["w","w",'),
        TEXT.replace('"w"', "null"),
        TEXT.replace("[[0,[0],[4],0,", "[[0,[0],[4],1,"),
        TEXT.replace("[[0,[0],[4],0,", "[[-1,[0],[4],0,"),
        TEXT.replace("[[0,[0],[4],0,", "[[0,[99999999999999999999],[4],0,"),
        TEXT.replace("[[0,[0],[4],0,", "[[0,[0],[9223372036854775807],0,"),
        TEXT.replace("20", "-20"),
        TEXT.replace("20", "9223372036854775807"),
        TEXT.replace("kimisys.layout", "\\ud800"),
        TEXT.replace("kimisys.layout", "NaN"),
    ],
)
def test_malformed_text_is_a_layout_error(text: str) -> None:
    with pytest.raises(LayoutError):
        Layout.from_json(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.data())
def test_any_changed_value_is_a_layout_or_a_layout_error(data: st.DataObject) -> None:
    root = json.loads(TEXT)
    table = root[data.draw(st.sampled_from(sorted(root)))]
    if isinstance(table, list) and data.draw(st.booleans()):
        row = table[0]
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(_JSON)
    else:
        root[data.draw(st.sampled_from(sorted(root)))] = data.draw(_JSON)
    try:
        layout = Layout.from_json(json.dumps(root))
    except LayoutError:
        return
    assert Layout.from_json(layout.to_json()) == layout


def test_itemsize_knows_every_dtype_and_refuses_others() -> None:
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1, "int8": 1}
    for dtype, size in (sizes | {"int32": 4, "int64": 8}).items():
        assert itemsize(dtype) == size == Tensor("t", dtype, [1]).nbytes
    with pytest.raises(LayoutError, match="float64"):
        itemsize("float64")
