"""Random layouts, and what the definition says their buffers hold, element by element.

Values are raw bits: each tensor of the table has one numpy array of unsigned integers as wide as
its dtype, in the tensor's shape.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor

Bits = npt.NDArray[np.unsignedinteger]
Buffers = dict[tuple[int, str], npt.NDArray[np.uint8]]

ITEMSIZE = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "uint8": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
}
CASTS = [(name, name) for name in ITEMSIZE] + [("float32", "bfloat16"), ("bfloat16", "float32")]


def unsigned(dtype: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"uint{8 * ITEMSIZE[dtype]}")


def random_bits(tensors: list[Tensor], seed: int) -> dict[str, Bits]:
    """Any bit patterns, so also NaNs, infinities and denormals of the floating dtypes."""
    random = np.random.default_rng(seed)
    return {
        tensor.name: random.integers(
            0, 1 << (8 * ITEMSIZE[tensor.dtype]), tensor.shape, unsigned(tensor.dtype)
        )
        for tensor in tensors
    }


def is_nan(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    magnitude, infinity = {
        "float32": (0x7FFFFFFF, 0x7F800000),
        "bfloat16": (0x7FFF, 0x7F80),
    }[dtype]
    return (bits & bits.dtype.type(magnitude)) > infinity


def cast_bits(bits: Bits, source: str, destination: str) -> Bits:
    """The same values in another dtype, as PyTorch casts them; NaNs narrow to 0x7fc0.

    PyTorch narrows NaNs to 0x7fc0 or 0xffff, depending on the instructions it uses.
    """
    if source == destination:
        return bits
    signed = {2: torch.int16, 4: torch.int32}[ITEMSIZE[destination]]
    values = torch.from_numpy(bits.view(f"int{8 * ITEMSIZE[source]}")).view(getattr(torch, source))
    cast = values.to(getattr(torch, destination)).view(signed).numpy()
    result: Bits = np.asarray(cast).view(unsigned(destination))
    if destination == "bfloat16":
        result = np.where(is_nan(bits, source), np.uint16(0x7FC0), result)
    return result


def elements(fragment: Fragment) -> Iterator[tuple[tuple[int, ...], int]]:
    """(place in the tensor, byte in the buffer) of each element of the fragment."""
    for index in np.ndindex(fragment.region.extent):
        place = tuple(o + i for o, i in zip(fragment.region.offset, index, strict=True))
        byte = sum(i * s for i, s in zip(index, fragment.byte_strides, strict=True))
        yield place, fragment.byte_offset + byte


def allocate(layout: Layout, fill: int = 0) -> Buffers:
    return {(b.rank, b.name): np.full(b.nbytes, fill, np.uint8) for b in layout.buffers}


def expected(layout: Layout, values: dict[str, Bits]) -> Buffers:
    """Every buffer as the layout defines it: elements from `values`, zeros elsewhere."""
    buffers = allocate(layout)
    for fragment in layout.fragments:
        buffer = buffers[fragment.rank, fragment.buffer]
        for place, byte in elements(fragment):
            raw = values[fragment.tensor][place].tobytes()
            buffer[byte : byte + len(raw)] = np.frombuffer(raw, np.uint8)
    return buffers


def dense_strides(extent: tuple[int, ...], order: list[int], itemsize: int) -> list[int]:
    """Byte strides of a dense block; `order` lists its dimensions from the outermost in memory."""
    strides = [0] * len(extent)
    stride = itemsize
    for dimension in reversed(order):
        strides[dimension] = stride
        stride *= max(extent[dimension], 1)
    return strides


@st.composite
def tiles(draw: st.DrawFn, whole: Region, depth: int = 3) -> list[Region]:
    """Disjoint boxes that together are `whole`."""
    long = [d for d, size in enumerate(whole.extent) if size > 1]
    if depth == 0 or not long or whole.elements == 0 or draw(st.booleans()):
        return [whole]
    cut = draw(st.sampled_from(long))
    size = draw(st.integers(1, whole.extent[cut] - 1))
    left, right = list(whole.extent), list(whole.extent)
    left[cut], right[cut] = size, whole.extent[cut] - size
    corner = list(whole.offset)
    corner[cut] += size
    return [
        *draw(tiles(Region(whole.offset, left), depth - 1)),
        *draw(tiles(Region(corner, right), depth - 1)),
    ]


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """Any box of a tensor of this shape."""
    extent = [draw(st.integers(0, size)) for size in shape]
    offset = [draw(st.integers(0, size - part)) for size, part in zip(shape, extent, strict=True)]
    return Region(offset, extent)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, tensors: list[Tensor], overlapping: bool) -> Layout:
    """Every element of every tensor, on up to three ranks; dense pieces in any order of dimensions,
    some in one fused buffer, with padding between. `overlapping` adds boxes held once more."""
    fill: dict[tuple[int, str], int] = {}
    fragments: list[Fragment] = []
    padding: list[Padding] = []
    for tensor in tensors:
        regions = draw(tiles(Region([0] * len(tensor.shape), tensor.shape)))
        if overlapping:
            regions = draw(
                st.permutations(regions + draw(st.lists(parts(tensor.shape), max_size=3)))
            )
        for region in regions:
            rank = draw(st.integers(0, 2))
            buffer = draw(st.sampled_from(["fused", tensor.name]))
            end = fill.setdefault((rank, buffer), 0)
            gap = draw(st.sampled_from([0, 0, 0, 3]))
            if gap:
                padding.append(Padding(rank, buffer, end, gap))
            order = draw(st.permutations(range(len(tensor.shape))))
            strides = dense_strides(region.extent, order, ITEMSIZE[tensor.dtype])
            fragments.append(Fragment(tensor.name, region, rank, buffer, end + gap, strides))
            fill[rank, buffer] = end + gap + region.elements * ITEMSIZE[tensor.dtype]
    buffers = [Buffer(rank, name, nbytes) for (rank, name), nbytes in fill.items()]
    return Layout(tensors, buffers, fragments, padding)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """A source, in which regions may overlap, and a destination of the same tensors."""
    table = draw(st.lists(st.tuples(shapes, st.sampled_from(CASTS)), min_size=1, max_size=3))
    source = [Tensor(f"t{i}", cast[0], shape) for i, (shape, cast) in enumerate(table)]
    destination = [Tensor(f"t{i}", cast[1], shape) for i, (shape, cast) in enumerate(table)]
    return draw(layouts(source, True)), draw(layouts(destination, False))


def sharded(name: str, dtype: str, shape: tuple[int, ...], dimension: int, ranks: int) -> Layout:
    """One tensor cut along one dimension into equal dense parts, one for each rank."""
    buffers, fragments = [], []
    for rank in range(ranks):
        extent = list(shape)
        extent[dimension] //= ranks
        offset = [0] * len(shape)
        offset[dimension] = rank * extent[dimension]
        region = Region(offset, extent)
        strides = dense_strides(region.extent, list(range(len(shape))), ITEMSIZE[dtype])
        buffers.append(Buffer(rank, name, region.elements * ITEMSIZE[dtype]))
        fragments.append(Fragment(name, region, rank, name, 0, strides))
    return Layout([Tensor(name, dtype, shape)], buffers, fragments)
