"""Numbers in the tables of `diff` and `scatter`: of axes, of addresses, of digests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys.errors import LayoutError
from kimisys.reshard import Fragment, Region, Tensor

DIVISION = 36
"""A place divides by an extent as (place * magic(extent)) >> DIVISION: exact where both are at most
2^18, which is as many elements as a block may have (csrc/broadcast/blocks.h)."""

_GOLDEN = 0x9E3779B97F4A7C15  # these, and what is made of them: csrc/broadcast/mix.h
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def magic(extent: int) -> int:
    return -(-(1 << DIVISION) // extent)


def as_int64(number: int) -> int:
    """The same 64 bits, mod 2^64, as a signed number."""
    return ((number + (1 << 63)) & _WORD) - (1 << 63)


@cache
def _tensor_key(name: str) -> int:
    word = 0xCBF29CE484222325
    for byte in name.encode():
        word = (word ^ byte) * 0x100000001B3 & _WORD
    word = word * _FIRST & _WORD
    word = (word ^ word >> 32) * _SECOND & _WORD
    return word ^ word >> 29


def first_counter(tensor: Tensor, offset: Sequence[int]) -> int:
    """What the digest mixes with the bits of the element at ``offset``, int64."""
    steps = index_strides(tensor)
    index = sum(o * step for o, step in zip(offset, steps, strict=True))
    return as_int64(_tensor_key(tensor.name) + index * _GOLDEN)


def counters(tensor: Tensor, index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The same of many elements, by their flat index in the tensor."""
    return np.uint64(_tensor_key(tensor.name)) + index * np.uint64(_GOLDEN)


def counter_step(index_stride: int) -> int:
    """By how much that number grows from one element of an axis to the next, int64."""
    return as_int64(index_stride * _GOLDEN)


def mixed(counters: npt.NDArray[np.uint64], bits: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """What elements of these counters and bits add to a digest, mod 2^64."""
    wide = bits.astype(np.uint64)
    word = (counters ^ wide ^ (wide >> np.uint64(32))) * np.uint64(_FIRST)
    word = (word ^ (word >> np.uint64(32))) * np.uint64(_SECOND)
    return word ^ (word >> np.uint64(29))


def index_strides(tensor: Tensor) -> list[int]:
    """Elements of the whole tensor from one to the next along each dimension."""
    strides = [1] * len(tensor.shape)
    for d in reversed(range(len(strides) - 1)):
        strides[d] = strides[d + 1] * tensor.shape[d + 1]
    return strides


def first_byte(fragment: Fragment, region: Region) -> int:
    """Of a part of the fragment, in its buffer."""
    corner = zip(region.offset, fragment.region.offset, fragment.byte_strides, strict=True)
    return fragment.byte_offset + sum((o - start) * stride for o, start, stride in corner)


def intersection(one: Region, other: Region) -> Region | None:
    """What two boxes of a tensor have in common; None where that is nothing."""
    offset = [max(a, b) for a, b in zip(one.offset, other.offset, strict=True)]
    ends = [
        min(a + n, b + m)
        for a, n, b, m in zip(one.offset, one.extent, other.offset, other.extent, strict=True)
    ]
    extent = [end - begin for begin, end in zip(offset, ends, strict=True)]
    return Region(offset, extent) if all(n > 0 for n in extent) else None


def in_elements(nbytes: Sequence[int], width: int, fragment: Fragment) -> list[int]:
    """Byte strides behind the address of a fragment's part, as strides in elements.

    Raises:
        LayoutError: one is no multiple of the element's size: no device reads such elements.
    """
    if any(stride % width for stride in nbytes):
        raise LayoutError(
            f"tensor '{fragment.tensor}' {fragment.region} of rank {fragment.rank} has elements of "
            f"{width} bytes at addresses that are no multiples of {width} (buffer "
            f"'{fragment.buffer}', byte {fragment.byte_offset}, strides {fragment.byte_strides}), "
            "where a device cannot read them; align the fragment, or keep it on the CPU"
        )
    return [stride // width for stride in nbytes]
