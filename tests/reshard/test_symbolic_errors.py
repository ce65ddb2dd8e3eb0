from collections.abc import Sequence

import pytest

from kimisys.errors import LayoutError, PlanError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    Place,
    Region,
    SymbolicLayout,
    Tensor,
    symbolic_plan,
)

INSTANCES = [Instance("3", [6, 7]), Instance("4", [8, 9])]


def rows(
    parts: Sequence[tuple[int, int]] = ((0, 4), (4, 4)),
    shape: tuple[int, ...] = (8, 2),
    dtype: str = "int8",
    name: str = "layers.{}.w",
) -> Layout:
    """One tensor; part i, (first row, rows), lies on local rank i, dense in a buffer "w.{}"."""
    return Layout(
        [Tensor(name, dtype, shape)],
        [Buffer(rank, "w.{}", 2 * count) for rank, (_, count) in enumerate(parts)],
        [
            Fragment(name, Region((first, 0), (count, 2)), rank, "w.{}", 0, (2, 1))
            for rank, (first, count) in enumerate(parts)
        ],
    )


def side(layout: Layout, instances: Sequence[Instance] = INSTANCES) -> SymbolicLayout:
    return SymbolicLayout([Block(layout, instances)])


GOOD = side(rows())


def refused(source: SymbolicLayout, destination: SymbolicLayout, *words: str) -> None:
    with pytest.raises(PlanError) as error:
        symbolic_plan(source, destination)
    for word in words:
        assert word in str(error.value)
    assert "{}" not in str(error.value)


def test_a_tensor_that_the_source_lacks_is_refused() -> None:
    other = side(rows(name="layers.{}.v"))
    refused(GOOD, other, "'layers.3.v'", "[0:4, 0:2]", "destination rank 6", "[6, 7, 8, 9]")
    fewer = side(rows(), INSTANCES[:1])
    refused(fewer, GOOD, "'layers.4.w'", "destination rank 8", "does not know it", "[6, 7]")


def test_elements_that_the_source_lacks_are_refused() -> None:
    short = side(rows([(0, 4), (4, 3)]))
    refused(short, GOOD, "'layers.3.w'", "[7:8, 0:2]", "destination rank 7", "source ranks [6, 7]")
    none = side(Layout(rows().tensors, [], []))
    refused(none, GOOD, "'layers.3.w'", "[0:4, 0:2]", "destination rank 6", "no source")


def test_shapes_and_dtypes_that_disagree_are_refused() -> None:
    shape = side(rows([(0, 2), (2, 2)], (4, 2)))
    refused(GOOD, shape, "'layers.3.w'", "(8, 2)", "(4, 2)", "[6, 7]")
    dtype = side(rows(dtype="uint8"))
    refused(GOOD, dtype, "'layers.3.w'", "[0:4, 0:2]", "destination rank 6", "int8", "uint8")


def destination(second: int, nbytes: int, padding: Sequence[Padding] = ()) -> SymbolicLayout:
    """Both halves in one buffer of local rank 1, the second at byte `second`."""
    name = "layers.{}.w"
    halves = [
        Fragment(name, Region((0, 0), (4, 2)), 1, "x.{}", 0, (2, 1)),
        Fragment(name, Region((4, 0), (4, 2)), 1, "x.{}", second, (2, 1)),
    ]
    return side(Layout(rows().tensors, [Buffer(1, "x.{}", nbytes)], halves, padding))


def test_destination_bytes_written_twice_or_never_are_refused() -> None:
    assert symbolic_plan(GOOD, destination(8, 16)).proof.copies == 4
    assert (
        symbolic_plan(GOOD, destination(9, 17, [Padding(1, "x.{}", 8, 1)])).proof.padding_bytes == 2
    )
    where = "buffer 'x.3' on destination rank 7"
    refused(GOOD, destination(6, 14), where, "[6:8)", "twice", "'layers.3.w' region [4:8, 0:2]")
    refused(GOOD, destination(9, 17), where, "[8:9)", "not be written", "region [0:4, 0:2]")
    padded = destination(9, 18, [Padding(1, "x.{}", 8, 2)])
    refused(GOOD, padded, where, "[9:10)", "padding")


def test_unknown_ranks_are_refused() -> None:
    made = symbolic_plan(GOOD, GOOD)
    with pytest.raises(PlanError, match=r"no destination rank 5; its ranks are \[6, 7, 8, 9\]"):
        made.of_rank(5)
    with pytest.raises(PlanError, match=r"no source rank 5; its ranks are \[6, 7, 8, 9\]"):
        made.of_source(5)
    with pytest.raises(LayoutError, match=r"no rank 5; its ranks are \[6, 7, 8, 9\]"):
        GOOD.of_rank(5)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([Block(rows(), [Instance("3", [6])])], ["'3'", "1 ranks", "local rank 1", "layers.{}.w"]),
        ([Block(rows(), [Instance("3", [6, 6])])], ["'3'", "rank 6 twice"]),
        ([Block(rows(), [Instance("3", [6, -1])])], ["'3'", "negative rank -1"]),
        ([Block(rows(), [])], ["'layers.{}.w'", "no instances"]),
        (
            [Block(Layout((), (), (), (), [Place(0)]), [Instance("", [0])])],
            ["places", "without tensors"],
        ),
        (
            [Block(rows(), [Instance("3", [6, 7]), Instance("3", [8, 9])])],
            ["'layers.3.w'", "two instances", "[6, 7]", "[8, 9]"],
        ),
        (
            [Block(rows(), [Instance("3", [6, 7], "a"), Instance("4", [8, 7], "a")])],
            ["'w.a' of rank 7", "two instances", "buffer label 'a'", "[8, 7]"],
        ),
        (
            [
                Block(rows(name="layers.3.w"), [Instance("x", [6, 7])]),
                Block(rows(), [Instance("3", [8, 9])]),
            ],
            ["'layers.3.w'", "two instances", "'x'", "'3'"],
        ),
        ([Block(rows(), [Instance("3" * 1025, [6, 7])])], ["label", "1024"]),
        ([Block(rows(name="{}" * 100), [Instance("3" * 11, [6, 7])])], ["1100 bytes", "1024"]),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks: list[Block], words: list[str]) -> None:
    with pytest.raises(LayoutError) as error:
        SymbolicLayout(blocks)
    for word in words:
        assert word in str(error.value)


def test_more_bytes_or_names_than_there_can_be_are_refused() -> None:
    huge = Layout((), [Buffer(0, "x.{}", 2**50)], ())
    many = [Instance(str(label), [0]) for label in range(4097)]
    assert SymbolicLayout([Block(huge, many[:-1])]).nbytes == 2**62
    with pytest.raises(LayoutError, match="bytes in all"):
        SymbolicLayout([Block(huge, many)])
    with pytest.raises(LayoutError, match=r"'x4096' of rank 0 have more than .* bytes in all"):
        Layout((), [Buffer(0, f"x{i:04}", 2**50) for i in range(4097)], ())
    tensors = Layout([Tensor(f"{i}.{{}}", "int8", (1,)) for i in range(4096)], (), ())
    with pytest.raises(LayoutError, match="more than 16777216 tensors or buffers"):
        SymbolicLayout([Block(tensors, many)])
    with pytest.raises(LayoutError, match="rank 1 has two places"):
        SymbolicLayout([], [Place(1), Place(1)])
