"""The Triton kernels of `diff`: three launches over a table of blocks, a program for each tile.

`find` reads everything once and leaves a bit per element; `list_positions` makes ascending
positions of bits; `take` goes to those alone, and is the only one that writes the snapshot. There
are no atomics: the same input gives the same memory, bit for bit. Works with Triton 3.6 to 3.9, and
in its interpreter.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels.elements_kernel import cast, mixed, taken_apart

# Columns of a block's row, all int64, then those of each axis behind them, innermost axis first.
# LIVE, SNAPSHOT: addresses of the first element. COUNTER: of the digest's mix, of that element.
# BOXES: how many boxes of the block the digest counts, from FIRST_BOX on; or ALL.
LIVE, SNAPSHOT, ELEMENTS, FIRST_TILE, COUNTER, BOXES, FIRST_BOX, AXES, AXIS = range(9)
# EXTENT; MAGIC: see elements_kernel; strides in elements; STEP: of the counter.
EXTENT, MAGIC, LIVE_STRIDE, SNAPSHOT_STRIDE, STEP, AXIS_COLUMNS = range(6)
ALL = -1

# Elements of a tile, of which a program counts the changes.
TILE = 4096

# Words that a program of `find` has in flight: up to eight for each of the 128 threads of four
# warps. A tile of bfloat16 is 512 words of 16 bytes.
WORDS = 1024

# Changed elements that a program of `take` moves at a time: at 1 % a tile has forty.
TAKEN = 128

_LIVE = tl.constexpr(LIVE)
_SNAPSHOT = tl.constexpr(SNAPSHOT)
_ELEMENTS = tl.constexpr(ELEMENTS)
_FIRST_TILE = tl.constexpr(FIRST_TILE)
_COUNTER = tl.constexpr(COUNTER)
_BOXES = tl.constexpr(BOXES)
_FIRST_BOX = tl.constexpr(FIRST_BOX)
_AXES = tl.constexpr(AXES)
_AXIS = tl.constexpr(AXIS)
_EXTENT = tl.constexpr(EXTENT)
_MAGIC = tl.constexpr(MAGIC)
_LIVE_STRIDE = tl.constexpr(LIVE_STRIDE)
_SNAPSHOT_STRIDE = tl.constexpr(SNAPSHOT_STRIDE)
_STEP = tl.constexpr(STEP)
_AXIS_COLUMNS = tl.constexpr(AXIS_COLUMNS)


@triton.jit
def _places(row, element):
    """Of elements of a block: where they lie on both sides, in elements, and their counters."""
    live = tl.zeros_like(element)
    snapshot = tl.zeros_like(element)
    counter = tl.zeros_like(element) + tl.load(row + _COUNTER)
    rest = element
    axis = row + _AXIS
    for _ in range(tl.load(row + _AXES) - 1):
        rest, place = taken_apart(rest, tl.load(axis + _EXTENT), tl.load(axis + _MAGIC))
        live += place * tl.load(axis + _LIVE_STRIDE)
        snapshot += place * tl.load(axis + _SNAPSHOT_STRIDE)
        counter += place * tl.load(axis + _STEP)
        axis += _AXIS_COLUMNS
    live += rest * tl.load(axis + _LIVE_STRIDE)
    snapshot += rest * tl.load(axis + _SNAPSHOT_STRIDE)
    return live, snapshot, counter + rest * tl.load(axis + _STEP)


@triton.jit
def _counted(row, boxes, element):
    """Which elements of a block its rank counts in the digest: those in one of its boxes.

    A box is (first, extent) for each axis of the row, in the order of the axes.
    """
    axes = tl.load(row + _AXES)
    count = tl.load(row + _BOXES)
    inside = tl.zeros_like(element) + (count < 0).to(tl.int64)
    box = boxes + tl.load(row + _FIRST_BOX)
    for _ in range(count):
        here = tl.zeros_like(element) + 1
        rest = element
        axis = row + _AXIS
        for _ in range(axes):
            rest, place = taken_apart(rest, tl.load(axis + _EXTENT), tl.load(axis + _MAGIC))
            place -= tl.load(box)
            here &= ((place >= 0) & (place < tl.load(box + 1))).to(tl.int64)
            axis += _AXIS_COLUMNS
            box += 2
        inside |= here
    return inside != 0


@triton.jit
def _row(table, tiles, pitch, TILE: tl.constexpr):
    """The program's tile, the row of its block, and its first element in the block."""
    tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + tile).to(tl.int64) * pitch
    return tile, row, (tile - tl.load(row + _FIRST_TILE)) * TILE


@triton.jit
def _lanes(address, place, LANE: tl.constexpr, LANES: tl.constexpr):
    """Pointers [n, LANES] to the elements side by side from `place` [n, 1] on, a multiple of LANES.
    Triton is told of the alignment, and moves each word by one instruction."""
    pointer = tl.multiple_of(
        address.to(tl.pointer_type(LANE)), LANES * LANE.primitive_bitwidth // 8
    )
    return pointer + (place // LANES * LANES + tl.arange(0, LANES)[None, :])


@triton.jit
def find(table, tiles, pitch, masks, counts, FROM: tl.constexpr, TO: tl.constexpr,
         LANES: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Compares the live elements, cast, with the snapshot's, WORDS words of LANES at a time.

    Writes masks[tile, TILE / LANES], for each word a bit per element, set where it changed (none
    behind the block's end), and counts[tile]. LANES divides rows' innermost axes and alignment.
    """
    tile, row, first = _row(table, tiles, pitch, TILE)
    left = tl.minimum(tl.load(row + _ELEMENTS) - first, TILE)
    count = tl.zeros([WORDS], tl.int32)
    for begin in range(0, left, WORDS * LANES):
        element = begin + tl.arange(0, WORDS)[:, None].to(tl.int64) * LANES
        live, snapshot, _ = _places(row, first + element)
        there = tl.broadcast_to(element < left, (WORDS, LANES))
        now = tl.load(_lanes(tl.load(row + _LIVE), live, FROM, LANES), mask=there, other=0)
        before = tl.load(_lanes(tl.load(row + _SNAPSHOT), snapshot, TO, LANES), mask=there, other=0)
        changed = (cast(now, FROM, TO) != before).to(tl.int32)  # 0 is cast to 0
        mask = tl.sum(changed << tl.arange(0, LANES)[None, :], axis=1)
        word = (tile * TILE + begin) // LANES + tl.arange(0, WORDS)
        tl.store(masks + word, mask.to(tl.uint8))
        count += tl.sum(changed, axis=1)
    tl.store(counts + tile, tl.sum(count, axis=0))


@triton.jit
def list_positions(table, tiles, pitch, masks, ends, positions, LANES: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Writes the positions of the tile's changed elements, ascending, behind those of the tiles
    before it. ends: int64, the sums of `find`'s counts up to and with each tile."""
    tile, row, first = _row(table, tiles, pitch, TILE)
    element = tl.arange(0, TILE)
    there = first + element < tl.load(row + _ELEMENTS)
    word = (tile * TILE + element) // LANES
    mask = tl.load(masks + word, mask=there, other=0).to(tl.int32)
    changed = (mask >> (element % LANES)) & 1
    rank = tl.cumsum(changed, axis=0)
    begin = tl.load(ends + tile) - tl.sum(changed, axis=0)
    tl.store(positions + (begin + rank - 1), (first + element).to(tl.int32), mask=changed != 0)


@triton.jit
def take(table, tiles, pitch, boxes, counts, ends, positions, bits, increments,
         FROM: tl.constexpr, TO: tl.constexpr, HAS_BOXES: tl.constexpr, TAKEN: tl.constexpr,
         TILE: tl.constexpr):  # fmt: skip
    """Reads the changed elements again, writes their bits to the snapshot and beside the positions,
    and increments[tile]: what they change of the tensor's digest."""
    tile, row, _ = _row(table, tiles, pitch, TILE)
    count = tl.load(counts + tile)
    begin = tl.load(ends + tile) - count
    total = tl.zeros([TAKEN], tl.int64)
    for taken in range(0, count, TAKEN):
        number = taken + tl.arange(0, TAKEN)
        there = number < count
        element = tl.load(positions + begin + number, mask=there, other=0).to(tl.int64)
        live, snapshot, counter = _places(row, element)
        now = tl.load(tl.load(row + _LIVE).to(tl.pointer_type(FROM)) + live, mask=there, other=0)
        to = tl.load(row + _SNAPSHOT).to(tl.pointer_type(TO)) + snapshot
        before = tl.load(to, mask=there, other=0)
        now = cast(now, FROM, TO)
        tl.store(to, now, mask=there)
        tl.store(bits + begin + number, now, mask=there)
        counted = there & _counted(row, boxes, element) if HAS_BOXES else there
        total += tl.where(counted, mixed(counter, now) - mixed(counter, before), 0)
    tl.store(increments + tile, tl.sum(total, axis=0))
