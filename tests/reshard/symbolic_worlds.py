"""Random models of repeated blocks, on two sides that cut them differently."""

from collections.abc import Sequence

from hypothesis import strategies as st
from sample_layouts import CASTS, layouts, shapes

from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    Place,
    SymbolicLayout,
    Tensor,
)

Table = list[tuple[tuple[int, ...], tuple[str, str]]]


def shared_buffers_named(layout: Layout, name: str) -> Layout:
    """The layout with its buffers "fused" called `name`."""

    def new(old: str) -> str:
        return name if old == "fused" else old

    return Layout(
        layout.tensors,
        [Buffer(b.rank, new(b.name), b.nbytes) for b in layout.buffers],
        [
            Fragment(f.tensor, f.region, f.rank, new(f.buffer), f.byte_offset, f.byte_strides)
            for f in layout.fragments
        ],
        [Padding(p.rank, new(p.buffer), p.byte_offset, p.nbytes) for p in layout.padding],
    )


@st.composite
def blocks(
    draw: st.DrawFn, tensors: list[Tensor], labels: Sequence[str], overlapping: bool, kind: str
) -> list[Block]:
    """The tensors in one block, or a part of them in each of two."""
    cut = draw(st.sampled_from([0, 0, len(tensors) // 2]))
    made = []
    for part, some in enumerate([tensors[:cut], tensors[cut:]]):
        if not some:
            continue
        layout = draw(layouts(some, overlapping))
        instances = []
        for label in draw(st.permutations(labels)):
            ranks = draw(st.permutations(range(5)))[: draw(st.integers(3, 5))]
            own = draw(st.sampled_from([None, f"at {label}"]))
            instances.append(Instance(label, ranks, own))
        made.append(Block(shared_buffers_named(layout, f"{kind}{part}.fused.{{}}"), instances))
    return made


places = st.lists(
    st.builds(Place, st.integers(0, 4), st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)),
    unique_by=lambda place: place.rank,
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[SymbolicLayout, SymbolicLayout]:
    """A source and a destination of the same tensors; regions of the source may overlap."""
    sides: list[list[Block]] = [[], []]
    for kind, labels in (("outer", [""]), ("dense", ["0"]), ("moe", ["1", "2", "10"])):
        table: Table = draw(
            st.lists(st.tuples(shapes, st.sampled_from(CASTS)), min_size=1, max_size=2)
        )
        for side in (0, 1):
            tensors = [
                Tensor(f"{kind}{i}.{{}}", casts[side], shape)
                for i, (shape, casts) in enumerate(table)
            ]
            sides[side] += draw(blocks(tensors, labels, side == 0, kind))
    return (
        SymbolicLayout(draw(st.permutations(sides[0])), draw(places)),
        SymbolicLayout(draw(st.permutations(sides[1])), draw(places)),
    )
