import numpy as np
from hypothesis import given, settings
from sample_layouts import Buffers, allocate, cast_bits, expected, random_bits
from symbolic_worlds import worlds

from kimisys.reshard import (
    Layout,
    Plan,
    SymbolicLayout,
    plan,
    symbolic_plan,
)

World = tuple[SymbolicLayout, SymbolicLayout]


def filled(source: Layout, destination: Layout) -> tuple[Buffers, Buffers]:
    """Source buffers with any bits, and what the destination's then have to hold."""
    values = random_bits(list(source.tensors), 0)
    dtypes = {tensor.name: tensor.dtype for tensor in source.tensors}
    cast = {t.name: cast_bits(values[t.name], dtypes[t.name], t.dtype) for t in destination.tensors}
    return expected(source, values), expected(destination, cast)


def same(left: Buffers, right: Buffers) -> None:
    assert left.keys() == right.keys()
    for key, bytes_ in left.items():
        np.testing.assert_array_equal(bytes_, right[key], str(key))


def parts_of(buffers: Buffers, layout: Layout) -> Buffers:
    return {(b.rank, b.name): buffers[b.rank, b.name] for b in layout.buffers}


def run(part: Plan, sources: Buffers, destinations: Buffers) -> None:
    """Executes with no buffer but those of the part's own layouts."""
    part.execute(
        parts_of(sources, part.source), parts_of(destinations, part.destination), threads=1
    )


@settings(deadline=None)
@given(worlds())
def test_slices_write_what_the_plan_of_the_concrete_layouts_writes(world: World) -> None:
    source, destination = (side.concrete() for side in world)
    sources, wanted = filled(source, destination)
    whole, slices, shares = (allocate(destination, fill) for fill in (1, 2, 3))
    made = plan(source, destination)
    made.execute(sources, whole)
    symbolic = symbolic_plan(*world)
    for rank in world[1].ranks:
        run(symbolic.of_rank(rank), sources, slices)
    for rank in world[0].ranks:
        run(symbolic.of_source(rank), sources, shares)
    for got in (whole, slices, shares):
        same(got, wanted)
    for name in ("destination_bytes", "copied_bytes", "padding_bytes"):
        assert getattr(symbolic.proof, name) == getattr(made.proof, name)


@settings(deadline=None)
@given(worlds())
def test_the_numbers_are_those_of_the_slices_and_of_the_shares(world: World) -> None:
    symbolic = symbolic_plan(*world)
    slices = {rank: symbolic.of_rank(rank) for rank in world[1].ranks}
    shares = {rank: symbolic.of_source(rank) for rank in world[0].ranks}
    traffic = symbolic.traffic()
    rows = list(zip(*(traffic[name].tolist() for name in traffic), strict=True))
    assert list(traffic) == ["source_rank", "destination_rank", "bytes", "copies"]
    pairs: dict[tuple[int, int], list[int]] = {}
    for part in slices.values():
        itemsize = {t.name: t.nbytes // max(t.elements, 1) for t in part.destination.tensors}
        for copy in part.copies:
            sums = pairs.setdefault((copy.source_rank, copy.destination_rank), [0, 0])
            sums[0] += copy.region.elements * itemsize[copy.tensor]
            sums[1] += 1
    assert rows == [(*pair, *sums) for pair, sums in sorted(pairs.items())]
    for part in shares.values():
        read = {copy.source_fragment for copy in part.copies}
        written = {copy.destination_fragment for copy in part.copies}
        assert read == set(range(len(part.source.fragments)))
        assert written == set(range(len(part.destination.fragments)))
    for name in ("destination_bytes", "copied_bytes", "padding_bytes", "copies"):
        total = getattr(symbolic.proof, name)
        assert total == sum(getattr(part.proof, name) for part in slices.values())
        assert total == sum(getattr(part.proof, name) for part in shares.values())


@settings(deadline=None)
@given(worlds())
def test_a_rank_of_a_symbolic_layout_is_that_of_the_concrete_one(world: World) -> None:
    for side in world:
        concrete = side.concrete()
        assert side.tensors == concrete.tensors
        assert side.tensor_count == len(concrete.tensors)
        assert side.fragment_count == len(concrete.fragments)
        assert side.nbytes == sum(buffer.nbytes for buffer in concrete.buffers)
        for rank in side.ranks:
            one, whole = side.of_rank(rank), concrete.of_rank(rank)
            for table in ("buffers", "fragments", "padding", "places"):
                assert getattr(one, table) == getattr(whole, table)
            named = {fragment.tensor for fragment in whole.fragments}
            assert one.tensors == tuple(t for t in whole.tensors if t.name in named)
