"""Layouts, buffers and ranks for the tests of broadcast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from kimisys.reshard import Buffer, Fragment, Layout, Padding, Place, Region, Tensor

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIZES = {"uint8": 1, "float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int64": 8}

Bytes = npt.NDArray[np.uint8]
Buffers = dict[tuple[int, str], Bytes]
Values = dict[str, npt.NDArray[np.unsignedinteger]]


def allocate(layout: Layout, fill: int = 0xEE) -> Buffers:
    return {(b.rank, b.name): np.full(b.nbytes, fill, np.uint8) for b in layout.buffers}


def view(
    layout: Layout, fragment: Fragment, buffers: Mapping[tuple[int, str], object]
) -> np.ndarray:
    """The fragment's elements as words of their size, strided in the buffer."""
    dtype = next(t.dtype for t in layout.tensors if t.name == fragment.tensor)
    return np.ndarray(
        fragment.region.extent,
        WORDS[SIZES[dtype]],
        buffers[fragment.rank, fragment.buffer],
        fragment.byte_offset,
        fragment.byte_strides,
    )


def box(fragment: Fragment) -> tuple[slice, ...]:
    region = fragment.region
    return tuple(slice(o, o + e) for o, e in zip(region.offset, region.extent, strict=True))


def scatter(layout: Layout, values: Values) -> Buffers:
    """Buffers that hold the values in every fragment."""
    buffers = allocate(layout)
    for fragment in layout.fragments:
        if fragment.region.elements:
            view(layout, fragment, buffers)[...] = values[fragment.tensor][box(fragment)]
    return buffers


def assert_holds(layout: Layout, buffers: Buffers, values: Values) -> None:
    for fragment in layout.fragments:
        if fragment.region.elements:
            held = view(layout, fragment, buffers)
            np.testing.assert_array_equal(held, values[fragment.tensor][box(fragment)])


def random_values(layout: Layout, seed: int = 0) -> Values:
    """Random bits for every tensor."""
    random = np.random.default_rng(seed)
    return {
        t.name: random.integers(0, 256, (*t.shape, SIZES[t.dtype]), dtype=np.uint8)
        .view(WORDS[SIZES[t.dtype]])
        .reshape(t.shape)
        for t in layout.tensors
    }


def rounded(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """float32 bits to bfloat16 bits, to nearest even; for numbers that are not NaN."""
    wide = bits.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def split(name: str, dtype: str, shape: tuple[int, int], axis: int, ranks: int) -> Layout:
    """One matrix, cut along an axis into equal parts, each dense in its rank's buffer."""
    size = SIZES[dtype]
    extent = [n // ranks if d == axis else n for d, n in enumerate(shape)]
    fragments = []
    for rank in range(ranks):
        offset = [rank * extent[d] if d == axis else 0 for d in range(2)]
        region = Region(offset, extent)
        fragments.append(Fragment(name, region, rank, name, 0, [extent[1] * size, size]))
    nbytes = extent[0] * extent[1] * size
    buffers = [Buffer(rank, name, nbytes) for rank in range(ranks)]
    return Layout([Tensor(name, dtype, shape)], buffers, fragments)


def whole(name: str, dtype: str, shape: tuple[int, ...], ranks: int) -> Layout:
    """One tensor that every rank holds in full; ranks of both sides meet on a device."""
    size = SIZES[dtype]
    strides = [size * int(np.prod(shape[d + 1 :])) for d in range(len(shape))]
    region = Region([0] * len(shape), shape)
    buffers = [Buffer(rank, name, size * int(np.prod(shape))) for rank in range(ranks)]
    fragments = [Fragment(name, region, rank, name, 0, strides) for rank in range(ranks)]
    places = [Place(rank, device=rank) for rank in range(ranks)]
    return Layout([Tensor(name, dtype, shape)], buffers, fragments, (), places)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...]) -> list[Tensor]:
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3))
    return [Tensor(f"t{i}", draw(st.sampled_from(dtypes)), shape) for i, shape in enumerate(shapes)]


@st.composite
def layouts(draw: st.DrawFn, table: list[Tensor], ranks: int = 3, replicas: bool = True) -> Layout:
    """The tensors cut into boxes, some of them held twice, in any order of dimensions, fused into
    one buffer per tensor size and rank, with padding between them."""
    ends: dict[tuple[int, str], int] = {}
    fragments: list[Fragment] = []
    padding: list[Padding] = []
    for tensor in table:
        size = SIZES[tensor.dtype]
        pieces = draw(_boxes([0] * len(tensor.shape), list(tensor.shape), depth=3))
        if replicas:
            pieces += draw(st.lists(st.sampled_from(pieces), max_size=3))
        for region in pieces:
            where = draw(st.integers(0, ranks - 1)), f"fused{size}"
            begin = ends.get(where, 0)
            if gap := size * draw(st.integers(0, 1)):
                padding.append(Padding(*where, begin, gap))
            order = draw(st.permutations(range(len(tensor.shape))))
            strides, stride = [0] * len(tensor.shape), size
            for axis in order:
                strides[axis] = stride
                stride *= region.extent[axis]
            fragments.append(Fragment(tensor.name, region, *where, begin + gap, strides))
            ends[where] = begin + gap + size * region.elements
    buffers = [Buffer(*where, end) for where, end in ends.items()]
    return Layout(table, buffers, fragments, padding)


@st.composite
def _boxes(draw: st.DrawFn, offset: list[int], extent: list[int], depth: int) -> list[Region]:
    axes = [axis for axis, n in enumerate(extent) if n > 1]
    if not axes or depth == 0 or not draw(st.booleans()):
        return [Region(offset, extent)]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, extent[axis] - 1))
    left, right, start = list(extent), list(extent), list(offset)
    left[axis], right[axis], start[axis] = at, extent[axis] - at, offset[axis] + at
    first: list[Region] = draw(_boxes(list(offset), left, depth - 1))
    second: list[Region] = draw(_boxes(start, right, depth - 1))
    return first + second


class AllReduce:
    """Sums arrays over the threads that stand for an engine's ranks, again and again."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, self._sum, timeout=20)
        self._parts: list[np.ndarray] = []
        self._total = np.zeros(0, np.uint64)
        self.calls = 0

    def _sum(self) -> None:
        assert len({part.shape for part in self._parts}) == 1
        self._total = np.add.reduce(self._parts, dtype=np.uint64)
        self._parts = []
        self.calls += 1

    def __call__(self, part: np.ndarray) -> np.ndarray:
        self._parts.append(part.copy())
        self._barrier.wait()
        total = self._total
        return total


def on_threads(ranks: list[int], work: Callable[[int], object]) -> dict[int, object]:
    """What ``work`` returned or raised for each rank, all at once."""
    results: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results
