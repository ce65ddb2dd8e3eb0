"""The kernel of `scatter` in Triton's interpreter, and numpy's, against the plan that copies all.

Run by test_scatter.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_layouts import tiles
from worlds import Buffers, Values, layouts, random_values, tensors
from worlds import scatter as filled

from kimisys.broadcast import digest
from kimisys.kernels import scatter_kernel as kernel
from kimisys.kernels.changes import Block, Changes
from kimisys.kernels.scatter import bind
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, plan

DTYPES = ("float32", "bfloat16", "uint8", "int64")
densities = st.sampled_from([0.0, 0.05, 1.0])


def differing(values: Values, density: float, seed: int) -> Values:
    random = np.random.default_rng(seed)
    return {
        name: np.where(random.random(old.shape) < density, ~old, old)
        for name, old in values.items()
    }


def changes_of(layout: Layout, blocks: list[Block], old: Values, new: Values) -> Changes:
    """Spelled out: what changed in each block of a rank."""
    positions, bits = [], []
    for index, region in blocks:
        name = layout.fragments[index].tensor
        box = tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))
        before, after = old[name][box].reshape(-1), new[name][box].reshape(-1)
        (changed,) = np.nonzero(before != after)
        positions.append(changed.astype(np.uint32))
        bits.append(after[changed])
    return Changes(positions, bits, np.zeros(len(layout.tensors), np.uint64))


def as_tensors(buffers: Buffers) -> dict[tuple[int, str], torch.Tensor]:
    return {key: torch.from_numpy(buffer) for key, buffer in buffers.items()}


def check(source: Layout, destination: Layout, cut: dict[int, list[Block]], density: float,
          seed: int, implementation: str) -> None:  # fmt: skip
    made = plan(source, destination)
    old = random_values(source, seed)
    new = differing(old, density, seed)
    held, wanted = filled(destination, old), filled(destination, new)
    increments = digest(destination, wanted) - digest(destination, held)
    measured, written = np.zeros_like(increments), 0
    bound = [
        (bind(made, rank, blocks, as_tensors(held), implementation),
         changes_of(source.of_rank(rank), blocks, old, new))
        for rank, blocks in cut.items()
    ]  # fmt: skip
    before = {key: buffer.copy() for key, buffer in held.items()}
    for scatter, changes in bound:
        measured += scatter.measure(changes)
    assert all(np.array_equal(held[key], before[key]) for key in held)
    for scatter, changes in bound:
        written += scatter.run(changes)
    np.testing.assert_array_equal(measured, increments)
    assert all(np.array_equal(held[key], wanted[key]) for key in held)
    assert written == sum(
        int((old[f.tensor][box(f)] != new[f.tensor][box(f)]).sum()) for f in destination.fragments
    )


def box(fragment: Fragment) -> tuple[slice, ...]:
    region = fragment.region
    return tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Layout, Layout, dict[int, list[Block]]]:
    """Any boxes on both sides, some of them held twice, and any boxes of the source as blocks."""
    table = draw(tensors(DTYPES))
    source, destination = draw(layouts(table)), draw(layouts(table))
    cut = {
        rank: [
            (index, part)
            for index, fragment in enumerate(source.of_rank(rank).fragments)
            for part in draw(tiles(fragment.region, depth=2))
        ]
        for rank in source.ranks
    }
    return source, destination, cut


@pytest.mark.parametrize("implementation", ["numpy", "triton"])
@settings(max_examples=40)
@given(world=worlds(), density=densities, seed=st.integers(0, 2**32))
def test_small_worlds(implementation: str, world: tuple[Layout, Layout, dict[int, list[Block]]],
                      density: float, seed: int) -> None:  # fmt: skip
    check(*world, density, seed, implementation)


def matrix(rows: int, columns: int, parts: int, axis: int, turned: bool = False) -> Layout:
    """bfloat16, one part for each rank; turned: held transposed."""
    extent = [rows // parts, columns] if axis == 0 else [rows, columns // parts]
    offsets = [[n * extent[0], 0] if axis == 0 else [0, n * extent[1]] for n in range(parts)]
    strides = [2, extent[0] * 2] if turned else [extent[1] * 2, 2]
    return Layout(
        [Tensor("w", "bfloat16", [rows, columns])],
        [Buffer(n, "x", extent[0] * extent[1] * 2) for n in range(parts)],
        [Fragment("w", Region(offsets[n], extent), n, "x", 0, strides) for n in range(parts)],
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.6])
def test_many_tiles(turned: bool, density: float) -> None:
    """Row shards, each in two blocks, into column shards, also transposed."""
    source, destination = matrix(96, 120, 2, 0), matrix(96, 120, 3, 1, turned)
    cut = {
        rank: [(0, Region([rank * 48, 0], [48, 60])), (0, Region([rank * 48, 60], [48, 60]))]
        for rank in range(2)
    }
    assert 2 * kernel.TILE < 48 * 60
    check(source, destination, cut, density, 5, "triton")
