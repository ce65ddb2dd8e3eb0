"""The kernels of `diff` in Triton's interpreter, against a diff spelled out element by element.

Run by test_diff.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_layouts import ITEMSIZE, Bits, cast_bits, random_bits, tiles
from worlds import layouts, scatter, tensors, view

from kimisys.broadcast import digest, snapshot_layout
from kimisys.kernels import diff_kernel as kernel
from kimisys.kernels.changes import Block, Changes
from kimisys.kernels.delta import Delta, blocks_of, decode
from kimisys.kernels.diff import bind, implementations
from kimisys.kernels.diff_launch import Launch, find_changes
from kimisys.kernels.diff_table import make_tables
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor

CPU = torch.device("cpu")
HERE = (0, "snapshot")
EDGES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]  # lower halves around the points of rounding

Arrays = Mapping[tuple[int, str], np.ndarray]


class World:
    """One rank's live weights, the snapshot of a version before, and the blocks to compare."""

    def __init__(self, live: Layout, snapshot: Layout, rank: int, blocks: list[Block]) -> None:
        self.live, self.snapshot = live.of_rank(rank), snapshot.of_rank(rank)
        self.counted = snapshot.cover().of_rank(rank)
        self.where = (rank, "snapshot")
        self.blocks = blocks

    def fill(self, density: float, seed: int) -> None:
        """Random bits, NaNs among them; a share `density` of the snapshot's elements differ."""
        random = np.random.default_rng(seed)
        self.values = random_bits(list(self.live.tensors), seed)
        wire = {
            s.name: cast_bits(self.values[s.name], t.dtype, s.dtype)
            for t, s in zip(self.live.tensors, self.snapshot.tensors, strict=True)
        }
        others = random_bits(list(self.snapshot.tensors), seed + 1)
        for name, bits in wire.items():
            changed = random.random(bits.shape) < density
            wire[name] = np.where(changed, others[name], bits)
        self.buffers = scatter(self.live, self.values)
        self.memory = scatter(self.snapshot, wire)[self.where]

    def run(self) -> Changes:
        addresses = {name: array.ctypes.data for (_, name), array in self.buffers.items()}
        tables = make_tables(self.live, self.snapshot, self.counted, self.blocks, addresses,
                             self.memory.ctypes.data, kernel.TILE)  # fmt: skip
        launches = [Launch(table, CPU) for table in tables]
        return find_changes(launches, self.snapshot, self.blocks)

    def digest(self) -> np.ndarray:
        return digest(self.counted, {self.where: self.memory}, implementation="naive")

    def check(self) -> None:
        """Twice: after the first run nothing differs."""
        wanted, bits, memory = self.expected()
        before = self.digest()
        changes = self.run()
        for ours, theirs in zip(changes.positions, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(changes.bits, bits, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(self.memory, memory)
        np.testing.assert_array_equal(changes.increments, self.digest() - before)
        again = self.run()
        assert not any(map(len, again.positions)) and not again.increments.any()
        np.testing.assert_array_equal(self.memory, memory)

    def expected(self) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
        """Positions and bits of each block, and the snapshot's memory afterwards."""
        memory = self.memory.copy()
        tables = zip(self.live.tensors, self.snapshot.tensors, strict=True)
        dtypes = {t.name: (t.dtype, s.dtype) for t, s in tables}
        positions, values = [], []
        for index, region in self.blocks:
            fragment = self.snapshot.fragments[index]
            held = view(self.snapshot, fragment, {self.where: memory})
            now = cast_bits(self.values[fragment.tensor], *dtypes[fragment.tensor])
            found: list[tuple[int, int]] = []
            for position, at in enumerate(np.ndindex(region.extent)):
                place = tuple(o + i for o, i in zip(region.offset, at, strict=True))
                inside = tuple(p - o for p, o in zip(place, fragment.region.offset, strict=True))
                if held[inside] != now[place]:
                    held[inside] = now[place]
                    found.append((position, int(now[place])))
            positions.append([position for position, _ in found])
            values.append([bits for _, bits in found])
        return positions, values, memory


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any fragments, replicated and permuted, and any boxes of them as blocks."""
    wire = draw(st.sampled_from([None, "bfloat16", "float32"]))
    live = draw(layouts(draw(tensors(("float32", "bfloat16", "uint8", "int64")))))
    snapshot = snapshot_layout(live, wire)
    rank = draw(st.sampled_from(live.ranks))
    blocks = [
        (index, box)
        for index, fragment in enumerate(snapshot.of_rank(rank).fragments)
        for box in draw(tiles(fragment.region, depth=2))
    ]
    return World(live, snapshot, rank, blocks)


densities = st.sampled_from([0.0, 0.01, 0.3, 1.0])


@settings(max_examples=40)
@given(worlds(), densities, st.integers(0, 2**32))
def test_small_worlds(world: World, density: float, seed: int) -> None:
    world.fill(density, seed)
    world.check()


def matrix(
    dtype: str, rows: int, columns: int, turned: bool = False, offset: int = 0, gap: int = 0
) -> Layout:
    """A matrix, or one held transposed, at an offset, with padding behind its rows; in elements."""
    size = ITEMSIZE[dtype]
    inner, outer = (rows, columns) if turned else (columns, rows)
    pitch = inner + gap
    strides = [size, pitch * size] if turned else [pitch * size, size]
    gaps = [Padding(0, "x", (offset + i * pitch + inner) * size, gap * size) for i in range(outer)]
    return Layout(
        [Tensor("w", dtype, [rows, columns])],
        [Buffer(0, "x", (offset + outer * pitch) * size)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", offset * size, strides)],
        [Padding(0, "x", 0, offset * size), *(gaps if gap else [])],
    )


def whole(layout: Layout) -> list[Block]:
    return [(index, fragment.region) for index, fragment in enumerate(layout.fragments)]


WORDS = {  # lanes of (live, wire) where all is aligned
    ("float32", "bfloat16"): 4,
    ("bfloat16", "bfloat16"): 8,
    ("bfloat16", "float32"): 4,
    ("float32", "float32"): 4,
    ("float8_e4m3fn", "float8_e4m3fn"): 8,
    ("int64", "int64"): 2,
}


@pytest.mark.parametrize(("live", "wire"), WORDS)
@pytest.mark.parametrize(("gap", "offset"), [(0, 0), (16, 0), (3, 0), (0, 1)])
def test_words_and_single_elements(live: str, wire: str, gap: int, offset: int) -> None:
    """Several tiles of whole words, and with rows or a corner off, where words are elements."""
    rows, columns = 70, 128
    held = matrix(live, rows, columns, gap=gap, offset=offset)
    to = snapshot_layout(held, wire if live in ("float32", "bfloat16") else None)
    blocks = [(0, Region([0, 0], [33, columns])), (0, Region([33, 0], [37, columns]))]
    world = World(held, to, 0, blocks)
    addresses = {"x": 1 << 40}
    (table,) = make_tables(held, to, to, blocks, addresses, 1 << 41, kernel.TILE)
    assert table.lanes == (WORDS[live, wire] if gap != 3 and offset == 0 else 1)
    assert len(table.tiles) == 4
    world.fill(0.05, rows)
    world.check()


@settings(max_examples=15)
@given(st.integers(1, 90), st.integers(1, 90), st.booleans(), st.sampled_from([0, 1, 8]),
       st.sampled_from([0, 3, 8]), densities, st.integers(0, 2**32))  # fmt: skip
def test_matrices(rows: int, columns: int, turned: bool, offset: int, gap: int, density: float,
                  seed: int) -> None:  # fmt: skip
    """Rows of any length at any offset, also held transposed."""
    held = matrix("float32", rows, columns, turned, offset, gap)
    world = World(held, snapshot_layout(held, "bfloat16"), 0, whole(held))
    world.fill(density, seed)
    world.check()


def test_only_what_the_rank_counts_is_in_the_increments() -> None:
    """Three ranks hold overlapping boxes of one matrix: what the last counts is no box."""
    regions = [Region([0, 0], [5, 6]), Region([2, 3], [6, 5]), Region([1, 1], [7, 7])]
    held = Layout(
        [Tensor("w", "float32", [9, 9])],
        [Buffer(rank, "x", region.elements * 4) for rank, region in enumerate(regions)],
        [Fragment("w", region, rank, "x", 0, [region.extent[1] * 4, 4])
         for rank, region in enumerate(regions)],
    )  # fmt: skip
    to = snapshot_layout(held, "bfloat16")
    cut = [(0, Region([1, 1], [3, 7])), (0, Region([4, 1], [4, 7]))]
    for rank, blocks in enumerate([[(0, regions[0])], [(0, regions[1])], cut]):
        world = World(held, to, rank, blocks)
        for density in (0.2, 1.0):
            world.fill(density, rank)
            world.check()
    assert len(to.cover().of_rank(2).fragments) > 1


def bound_run(world: World, implementation: str) -> tuple[Delta, np.ndarray]:
    """By ``bind``, on a snapshot of its own."""
    memory = world.memory.copy()
    sources = {key: torch.from_numpy(array) for key, array in world.buffers.items()}
    bound = bind(world.live, world.snapshot, world.counted, sources, torch.from_numpy(memory),
                 implementation)  # fmt: skip
    return bound.run(), memory


def check_beside_the_core(world: World) -> Delta:
    """All that travels is, byte for byte, what the core makes."""
    ours, memory = bound_run(world, "triton")
    theirs, other = bound_run(world, implementations("cpu")[0])
    np.testing.assert_array_equal(ours.descriptors, theirs.descriptors)
    assert list(ours.payloads) == list(theirs.payloads)
    np.testing.assert_array_equal(ours.increments, theirs.increments)
    assert ours.changed == theirs.changed
    np.testing.assert_array_equal(memory, other)
    return ours


@settings(max_examples=25)
@given(worlds(), densities, st.integers(0, 2**32))
def test_small_worlds_beside_the_core(world: World, density: float, seed: int) -> None:
    world.fill(density, seed)
    check_beside_the_core(world)


@pytest.mark.parametrize(("density", "kind"), [(0.0, 0), (0.01, 1), (0.4, 2), (1.0, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_each_kind_of_code_beside_the_core(density: float, kind: int, turned: bool) -> None:
    """Two blocks side by side, and what was decoded is what was encoded."""
    held = matrix("float32", 20, 1024, turned)
    to = snapshot_layout(held, "bfloat16")
    world = World(held, to, 0, blocks_of(to))
    assert len(world.blocks) == 2
    world.fill(density, 3)
    delta = check_beside_the_core(world)
    assert {int(word) & 3 for word in delta.descriptors} == {kind}
    if kind < 3:
        decoded, found = decode(delta, to, world.blocks), world.run()
        for ours, theirs in zip(decoded.positions, found.positions, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for bits, others in zip(decoded.bits, found.bits, strict=True):
            np.testing.assert_array_equal(bits, others)


@pytest.mark.parametrize("lanes", [4, 1])
def test_rounding_agrees_on_every_kind_of_number(lanes: int) -> None:
    """Upper halves of a float32, every fifth, with lower halves around the points of rounding,
    NaNs among them; one by one, which takes longer, a few."""
    upper = np.arange(0, 1 << 16, 5 if lanes == 4 else 65, dtype=np.uint32) << 16
    bits = (upper[:, None] | np.uint32(EDGES)).reshape(-1)
    bits = bits[: len(bits) // 4 * 4 - (lanes == 1)].copy()
    held = Layout([Tensor("w", "float32", bits.shape)], [Buffer(0, "w", bits.nbytes)],
                  [Fragment("w", Region([0], bits.shape), 0, "w", 0, [4])])  # fmt: skip
    to = snapshot_layout(held, "bfloat16")
    size = 1 << 16
    blocks = [(0, Region([n], [min(size, len(bits) - n)])) for n in range(0, len(bits), size)]
    world = World(held, to, 0, blocks)
    wanted: Bits = cast_bits(bits, "float32", "bfloat16")
    world.buffers = {(0, "w"): bits.view(np.uint8)}
    world.memory = (wanted ^ (np.arange(len(bits)) % 3 == 0)).astype(np.uint16).view(np.uint8)
    changes = world.run()
    np.testing.assert_array_equal(world.memory.view(np.uint16), wanted)
    places = np.concatenate(
        [block[1].offset[0] + p for block, p in zip(blocks, changes.positions, strict=True)]
    )
    np.testing.assert_array_equal(places, np.arange(0, len(bits), 3))


def test_one_after_another_beside_the_core() -> None:
    """What a block was before, whole above all, does not show in what it is."""
    held = matrix("float32", 5, 1024)
    to = snapshot_layout(held, "bfloat16")
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.integers(0, 256, held.buffers[0].nbytes, "u1"))
    memories = [torch.zeros(to.buffers[0].nbytes, dtype=torch.uint8) for _ in "ab"]
    bound = [
        bind(held, to, to, {(0, "x"): weights}, memory, name)
        for memory, name in zip(memories, ["triton", implementations("cpu")[0]], strict=True)
    ]
    kinds = []
    for density in (1.0, 0.97, 0.9, 1.0, 0.01, 0.5):
        ours, theirs = (each.run() for each in bound)
        np.testing.assert_array_equal(ours.descriptors, theirs.descriptors)
        assert list(ours.payloads) == list(theirs.payloads)
        np.testing.assert_array_equal(ours.increments, theirs.increments)
        assert ours.changed == theirs.changed and torch.equal(*memories)
        kinds.append(int(ours.descriptors[0]) & 3)
        words = weights.view(torch.int32)
        words[torch.from_numpy(random.random(len(words)) < density)] ^= 1 << 20
    assert set(kinds) >= {1, 2, 3}
