"""Transposing a dense matrix of two-byte elements, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimisys.errors import BufferMismatchError, LayoutError
from kimisys.reshard import transpose

SIDES = st.one_of(st.integers(0, 100), st.sampled_from([32, 64, 96, 1024]))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_as_numpy_does(rows: int, columns: int, threads: int, seed: int) -> None:
    source = np.random.default_rng(seed).integers(0, 1 << 16, (rows, columns), np.uint16)
    around = np.full(rows * columns + 128, 0xABCD, np.uint16)
    transpose(source, around[64 : 64 + source.size].reshape(columns, rows), threads)
    assert np.array_equal(around[64 : 64 + source.size].reshape(columns, rows), source.T)
    assert (around[:64] == 0xABCD).all() and (around[64 + source.size :] == 0xABCD).all()


@pytest.mark.parametrize("offset", [0, 3])  # elements from a line's start: 3 cannot be streamed to
def test_larger_than_the_caches(offset: int) -> None:
    source = np.random.default_rng(1).integers(0, 1 << 16, (8192, 1056), np.uint16)
    around = np.full(source.size + 128, 0xABCD, np.uint16)
    begin = (-around.ctypes.data % 64) // 2 + offset
    destination = around[begin : begin + source.size].reshape(1056, 8192)
    transpose(source, destination, 2)
    assert np.array_equal(destination, source.T)
    assert (around[:begin] == 0xABCD).all() and (around[begin + source.size :] == 0xABCD).all()


def test_what_does_not_fit_is_refused() -> None:
    source, destination = np.ones((3, 40), np.uint16), np.zeros((40, 3), np.uint16)
    for wrong, given_ in (
        ("3 x 40 elements, the destination 3 x 40", (source, np.zeros((3, 40), np.uint16))),
        ("source is not a dense matrix", (source.astype(np.float32), destination)),
        ("source is not a dense matrix", (np.ones((3, 80), np.uint16)[:, ::2], destination)),
        ("destination is not a dense matrix", (source, destination.ravel())),
    ):
        with pytest.raises(BufferMismatchError, match=wrong):
            transpose(*given_)
    memory = np.ones(200, np.uint16)
    with pytest.raises(BufferMismatchError, match="overlap"):
        transpose(memory[:120].reshape(3, 40), memory[80:].reshape(40, 3))
    with pytest.raises(LayoutError, match="threads is -1"):
        transpose(source, destination, -1)
    assert not destination.any()
