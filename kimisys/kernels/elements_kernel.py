"""What the Triton kernels of `diff` and `scatter` do with one element: find its place, cast it, and
mix it into a digest. Works with Triton 3.6 to 3.9, and in its interpreter."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kimisys.kernels.elements import DIVISION

_DIVISION = tl.constexpr(DIVISION)

# csrc/broadcast/mix.h
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def taken_apart(place, extent, magic):
    """(rest, coordinate): a row-major place without its innermost coordinate, and that one."""
    rest = (place * magic) >> _DIVISION
    return rest, place - rest * extent


@triton.jit
def narrowed(bits):
    """float32 -> bfloat16 bits: to nearest, ties to even, NaNs to 0x7fc0 (csrc/base/dtype.h)."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def cast(bits, FROM: tl.constexpr, TO: tl.constexpr):
    """Bits of one dtype as those of another. FROM, TO: unsigned integers as wide as the dtypes;
    only float32 and bfloat16 differ in width and may be cast."""
    if FROM == TO:
        return bits
    elif FROM.primitive_bitwidth == 32:
        return narrowed(bits)
    else:
        return bits.to(tl.uint32) << 16


@triton.jit
def mixed(counter, bits):
    """What an element adds to its tensor's digest, int64 (csrc/broadcast/mix.h, mod 2^64).

    counter: int64, the tensor's key + flat index * golden ratio. bits: of 1 to 8 bytes, unsigned.
    """
    wide = bits.to(tl.uint64)
    wide = wide ^ (wide >> 32)  # folded; nothing changes where elements have four bytes or fewer
    word = (counter.to(tl.uint64, bitcast=True) ^ wide) * _FIRST
    word = (word ^ (word >> 32)) * _SECOND
    return (word ^ (word >> 29)).to(tl.int64, bitcast=True)
