"""The Triton kernel of `strided_copy`: a table of strided copies, one tile of one copy a program.

The table is that of csrc/reshard/table.h: a row per copy, of words that are as wide as alignment
allows. Works with Triton 3.6 to 3.9, and in its interpreter.
"""

# ruff: noqa: SIM102 - the outer one of two conditions is decided when the kernel is compiled
from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels.elements_kernel import narrowed

# Columns of a row, and of each axis behind them, as in csrc/reshard/table.h.
SOURCE, DESTINATION, WORD, AXES, WORDS, FIRST_TILE, AXIS = range(7)
AXIS_COLUMNS = 5

# Words, as in csrc/reshard/table.h.
(
    COPY_16, COPY_8, COPY_4, COPY_2, COPY_1,
    NARROW_4, NARROW, NARROW_BYTES,
    WIDEN_4, WIDEN, WIDEN_BYTES,
) = range(11)  # fmt: skip

# Words that a program moves at a time: eight for each of the 128 threads of four warps, so that as
# many loads of 16 bytes are in flight.
BLOCK = 1024

# Blocks in a tile, by word: 16 KiB where the words are wide, less where moving them costs more.
BLOCKS = (1, 2, 4, 4, 4, 1, 4, 4, 1, 4, 4)

_AXIS = tl.constexpr(AXIS)
_AXIS_COLUMNS = tl.constexpr(AXIS_COLUMNS)
_AXES = tl.constexpr(AXES)
_WORD = tl.constexpr(WORD)
_WORDS = tl.constexpr(WORDS)
_DESTINATION = tl.constexpr(DESTINATION)
_FIRST_TILE = tl.constexpr(FIRST_TILE)


@triton.jit
def _places(row, word):
    """Where the words lie, in units of each side: the index taken apart, innermost axis first.

    Division by an extent is a product and a shift, see csrc/reshard/table.h.
    """
    source = tl.zeros_like(word)
    destination = tl.zeros_like(word)
    rest = word
    axis = row + _AXIS
    for _ in range(tl.load(row + _AXES) - 1):
        quotient = (rest * tl.load(axis + 1)) >> tl.load(axis + 2)
        place = rest - quotient * tl.load(axis)
        source += place * tl.load(axis + 3)
        destination += place * tl.load(axis + 4)
        rest = quotient
        axis += _AXIS_COLUMNS
    return source + rest * tl.load(axis + 3), destination + rest * tl.load(axis + 4)


@triton.jit
def _blocks(row, first, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """How many blocks of its words the tile has: small copies do not fill one."""
    return tl.minimum(tl.cdiv(tl.load(row + _WORDS) - first, BLOCK), BLOCKS)


@triton.jit
def _words(row, first, block, BLOCK: tl.constexpr):
    """The numbers [BLOCK, 1] of a block of words, and which of them the copy has."""
    word = first + block * BLOCK + tl.arange(0, BLOCK)[:, None].to(tl.int64)
    return word, word < tl.load(row + _WORDS)


@triton.jit
def _lanes(address, place, LANE: tl.constexpr, LANES: tl.constexpr):
    """Pointers [n, LANES] to the lanes of each word at `place` [n, 1]. Triton is told that words
    are aligned, and sees their lanes side by side: it moves each by one instruction."""
    pointer = tl.multiple_of(
        address.to(tl.pointer_type(LANE)), LANES * LANE.primitive_bitwidth // 8
    )
    return pointer + (place * LANES + tl.arange(0, LANES)[None, :])


@triton.jit
def _copy(row, source, destination, first, LANE: tl.constexpr, LANES: tl.constexpr,
          BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    for block in range(_blocks(row, first, BLOCK, BLOCKS)):
        word, there = _words(row, first, block, BLOCK)
        at, to = _places(row, word)
        # Padding is copied from address 0, where nothing is read.
        readable = word < tl.where(source == 0, 0, tl.load(row + _WORDS))
        values = tl.load(_lanes(source, at, LANE, LANES), other=0,
                         mask=tl.broadcast_to(readable, (BLOCK, LANES)))  # fmt: skip
        mask = tl.broadcast_to(there, (BLOCK, LANES))
        tl.store(_lanes(destination, to, LANE, LANES), values, mask=mask)


@triton.jit
def _narrow(row, source, destination, first, LANES: tl.constexpr, BLOCK: tl.constexpr,
            BLOCKS: tl.constexpr):  # fmt: skip
    for block in range(_blocks(row, first, BLOCK, BLOCKS)):
        word, there = _words(row, first, block, BLOCK)
        at, to = _places(row, word)
        mask = tl.broadcast_to(there, (BLOCK, LANES))
        bits = tl.load(_lanes(source, at, tl.uint32, LANES), mask=mask, other=0)
        tl.store(_lanes(destination, to, tl.uint16, LANES), narrowed(bits), mask=mask)


@triton.jit
def _widen(row, source, destination, first, LANES: tl.constexpr, BLOCK: tl.constexpr,
           BLOCKS: tl.constexpr):  # fmt: skip
    for block in range(_blocks(row, first, BLOCK, BLOCKS)):
        word, there = _words(row, first, block, BLOCK)
        at, to = _places(row, word)
        mask = tl.broadcast_to(there, (BLOCK, LANES))
        bits = tl.load(_lanes(source, at, tl.uint16, LANES), mask=mask, other=0)
        wide = bits.to(tl.uint32) << 16
        tl.store(_lanes(destination, to, tl.uint32, LANES), wide, mask=mask)


@triton.jit
def _cast_bytes(row, source, destination, first, FROM: tl.constexpr, TO: tl.constexpr,
                BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """A cast of FROM to TO bytes at any address: byte by byte, as a device's loads are aligned."""
    for block in range(_blocks(row, first, BLOCK, BLOCKS)):
        word, there = _words(row, first, block, BLOCK)
        at, to = _places(row, word)
        read = source.to(tl.pointer_type(tl.uint8)) + at
        written = destination.to(tl.pointer_type(tl.uint8)) + to
        bits = tl.zeros([BLOCK, 1], tl.uint32)
        for byte in tl.static_range(FROM):
            bits |= tl.load(read + byte, mask=there, other=0).to(tl.uint32) << (8 * byte)
        bits = narrowed(bits).to(tl.uint32) if TO == 2 else bits << 16
        for byte in tl.static_range(TO):
            tl.store(written + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8), mask=there)


@triton.jit
def strided_copy(table, tiles, pitch, HAS: tl.constexpr, BLOCK: tl.constexpr,
                 BLOCKS: tl.constexpr):  # fmt: skip
    """One program for each tile: tiles[i] is a row of the table, whose rows are `pitch` apart.

    HAS is the set of words that occur, as bits: a table of aligned copies compiles to little else.
    """
    tile = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + tile).to(tl.int64) * pitch
    source = tl.load(row)
    to = tl.load(row + _DESTINATION)
    word = tl.load(row + _WORD)
    first = (tile - tl.load(row + _FIRST_TILE)) * BLOCK
    if HAS & 1:
        if word == 0:
            _copy(row, source, to, first * BLOCKS[0], tl.int32, 4, BLOCK, BLOCKS[0])
    if HAS & 2:
        if word == 1:
            _copy(row, source, to, first * BLOCKS[1], tl.int32, 2, BLOCK, BLOCKS[1])
    if HAS & 4:
        if word == 2:
            _copy(row, source, to, first * BLOCKS[2], tl.int32, 1, BLOCK, BLOCKS[2])
    if HAS & 8:
        if word == 3:
            _copy(row, source, to, first * BLOCKS[3], tl.int16, 1, BLOCK, BLOCKS[3])
    if HAS & 16:
        if word == 4:
            _copy(row, source, to, first * BLOCKS[4], tl.int8, 1, BLOCK, BLOCKS[4])
    if HAS & 32:
        if word == 5:
            _narrow(row, source, to, first * BLOCKS[5], 4, BLOCK, BLOCKS[5])
    if HAS & 64:
        if word == 6:
            _narrow(row, source, to, first * BLOCKS[6], 1, BLOCK, BLOCKS[6])
    if HAS & 128:
        if word == 7:
            _cast_bytes(row, source, to, first * BLOCKS[7], 4, 2, BLOCK, BLOCKS[7])
    if HAS & 256:
        if word == 8:
            _widen(row, source, to, first * BLOCKS[8], 4, BLOCK, BLOCKS[8])
    if HAS & 512:
        if word == 9:
            _widen(row, source, to, first * BLOCKS[9], 1, BLOCK, BLOCKS[9])
    if HAS & 1024:
        if word == 10:
            _cast_bytes(row, source, to, first * BLOCKS[10], 2, 4, BLOCK, BLOCKS[10])
