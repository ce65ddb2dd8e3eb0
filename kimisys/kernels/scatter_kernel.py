"""The Triton kernel of `scatter`: changed elements of blocks to their places in strided memory, all
targets in one launch. Works with Triton 3.6 to 3.9, and in its interpreter."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels.elements_kernel import mixed, taken_apart

# Columns of a target's row, all int64, then those of each axis of its block, innermost first.
# ADDRESS: of the first element of the target's box. COUNTER: of the digest's mix, of that element.
ADDRESS, COUNTER, AXES, AXIS = range(4)
# EXTENT of the block; MAGIC: see elements; FIRST, SIZE: the box in the block; STRIDE of the
# destination, in elements; STEP of the counter.
EXTENT, MAGIC, FIRST, SIZE, STRIDE, STEP, AXIS_COLUMNS = range(7)

# Columns of a tile: its target's row, and which positions it has, int64 all.
ROW, BEGIN, END, TILE_COLUMNS = range(4)

# Positions of a tile.
TILE = 1024

_ADDRESS = tl.constexpr(ADDRESS)
_COUNTER = tl.constexpr(COUNTER)
_AXES = tl.constexpr(AXES)
_AXIS = tl.constexpr(AXIS)
_EXTENT = tl.constexpr(EXTENT)
_MAGIC = tl.constexpr(MAGIC)
_FIRST = tl.constexpr(FIRST)
_SIZE = tl.constexpr(SIZE)
_STRIDE = tl.constexpr(STRIDE)
_STEP = tl.constexpr(STEP)
_AXIS_COLUMNS = tl.constexpr(AXIS_COLUMNS)
_BEGIN = tl.constexpr(BEGIN)
_END = tl.constexpr(END)
_TILE_COLUMNS = tl.constexpr(TILE_COLUMNS)


@triton.jit
def _targets(row, position):
    """Of positions in a block: which of them are in the target's box, their places in the
    destination, and their counters."""
    inside = tl.zeros_like(position) + 1
    place = tl.zeros_like(position)
    counter = tl.zeros_like(position) + tl.load(row + _COUNTER)
    rest = position
    axis = row + _AXIS
    for _ in range(tl.load(row + _AXES)):
        rest, at = taken_apart(rest, tl.load(axis + _EXTENT), tl.load(axis + _MAGIC))
        at -= tl.load(axis + _FIRST)
        inside &= ((at >= 0) & (at < tl.load(axis + _SIZE))).to(tl.int64)
        place += at * tl.load(axis + _STRIDE)
        counter += at * tl.load(axis + _STEP)
        axis += _AXIS_COLUMNS
    return inside != 0, place, counter


@triton.jit
def scatter(table, tiles, pitch, positions, bits, increments, written, DTYPE: tl.constexpr,
            WRITE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A program for each tile: bits of its positions that are in the target's box go to the
    destination where WRITE; otherwise increments[tile] is what they would change of the digest.
    written[tile]: how many they are."""
    tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + tile * _TILE_COLUMNS) * pitch
    begin = tl.load(tiles + tile * _TILE_COLUMNS + _BEGIN)
    number = begin + tl.arange(0, TILE)
    there = number < tl.load(tiles + tile * _TILE_COLUMNS + _END)
    position = tl.load(positions + number, mask=there, other=0).to(tl.int64)
    inside, place, counter = _targets(row, position)
    there = there & inside
    now = tl.load(bits + number, mask=there, other=0).to(DTYPE, bitcast=True)
    to = tl.load(row + _ADDRESS).to(tl.pointer_type(DTYPE)) + place
    if WRITE:
        tl.store(to, now, mask=there)
    else:
        before = tl.load(to, mask=there, other=0)
        change = tl.where(there, mixed(counter, now) - mixed(counter, before), 0)
        tl.store(increments + tile, tl.sum(change, axis=0))
    tl.store(written + tile, tl.sum(there.to(tl.int32), axis=0))
