"""The Triton kernel in Triton's interpreter, against the definition and the naive executor.

Run by test_strided_copy.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_layouts import (
    CASTS,
    ITEMSIZE,
    Buffers,
    allocate,
    cast_bits,
    expected,
    pairs,
    random_bits,
)

from kimisys._core.reshard import copy_table
from kimisys.kernels import strided_copy_kernel as kernel
from kimisys.kernels.strided_copy import bind, implementations
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor, plan


def tensors(buffers: Buffers) -> dict[tuple[int, str], torch.Tensor]:
    return {key: torch.from_numpy(buffer) for key, buffer in buffers.items()}


def same(written: Buffers, wanted: Buffers) -> bool:
    return all(np.array_equal(written[key], wanted[key]) for key in wanted)


def test_it_is_interpreted() -> None:
    assert "triton" in implementations("cpu")
    assert implementations("cuda") == []  # the interpreter cannot read a device's memory


@settings(max_examples=40, deadline=None)
@given(pairs(), st.integers(0, 2**32))
def test_every_byte_is_what_the_definition_says(pair: tuple[Layout, Layout], seed: int) -> None:
    source, destination = pair
    values = random_bits(list(source.tensors), seed)
    wanted = {
        t.name: cast_bits(values[t.name], s.dtype, t.dtype)
        for s, t in zip(source.tensors, destination.tensors, strict=True)
    }
    sources, destinations = expected(source, values), allocate(destination, fill=0xEE)
    bind(plan(source, destination), tensors(sources), tensors(destinations), "triton").run()
    assert same(destinations, expected(destination, wanted))
    assert same(sources, expected(source, values))


def matrix(
    dtype: str, rows: int, columns: int, turned: bool = False, offset: int = 0, gap: int = 0
) -> Layout:
    """A matrix, or one held transposed, at a byte offset, with gaps of padding behind its rows."""
    size = ITEMSIZE[dtype]
    inner, outer = (rows, columns) if turned else (columns, rows)
    pitch = inner * size + gap
    strides = [size, pitch] if turned else [pitch, size]
    gaps = [Padding(0, "x", offset + i * pitch + inner * size, gap) for i in range(outer)]
    return Layout(
        [Tensor("w", dtype, [rows, columns])],
        [Buffer(0, "x", offset + outer * pitch)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", offset, strides)],
        [Padding(0, "x", 0, offset), *(gaps if gap else [])],
    )


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Many tiles, rows of any length at any offset, on the source's side also transposed."""
    source, destination = draw(st.sampled_from(CASTS))
    rows, columns = draw(st.integers(1, 130)), draw(st.integers(1, 130))
    offsets, gaps = st.sampled_from([0, 3, 16]), st.sampled_from([0, 1, 16])
    held = matrix(source, rows, columns, draw(st.booleans()), draw(offsets), draw(gaps))
    return held, matrix(destination, rows, columns, False, draw(offsets), draw(gaps))


def check(source: Layout, destination: Layout, seed: int) -> None:
    made = plan(source, destination)
    random = np.random.default_rng(seed)
    sources = {(b.rank, b.name): random.integers(0, 256, b.nbytes, "u1") for b in source.buffers}
    ours, naive = allocate(destination, 0xEE), allocate(destination, 0xEE)
    made.execute(sources, naive, implementation="naive")
    bind(made, tensors(sources), tensors(ours), "triton").run()
    assert same(ours, naive)


@settings(max_examples=25, deadline=None)
@given(matrices(), st.integers(0, 2**32))
def test_many_tiles_agree_with_the_naive_executor(pair: tuple[Layout, Layout], seed: int) -> None:
    check(*pair, seed)


FLOAT, BFLOAT = "float32", "bfloat16"
WORDS = {
    kernel.COPY_16: (matrix(BFLOAT, 70, 128), matrix(BFLOAT, 70, 128, gap=16)),
    kernel.COPY_8: (matrix(BFLOAT, 700, 4), matrix(BFLOAT, 700, 4, gap=16)),
    kernel.COPY_4: (matrix(FLOAT, 70, 90, turned=True), matrix(FLOAT, 70, 90)),
    kernel.COPY_2: (matrix(BFLOAT, 70, 90, turned=True), matrix(BFLOAT, 70, 90)),
    kernel.COPY_1: (matrix("uint8", 70, 90, turned=True), matrix("uint8", 70, 90)),
    kernel.NARROW_4: (matrix(FLOAT, 70, 128), matrix(BFLOAT, 70, 128)),
    kernel.NARROW: (matrix(FLOAT, 70, 90, turned=True), matrix(BFLOAT, 70, 90)),
    kernel.NARROW_BYTES: (matrix(FLOAT, 70, 90, offset=3), matrix(BFLOAT, 70, 90)),
    kernel.WIDEN_4: (matrix(BFLOAT, 70, 128), matrix(FLOAT, 70, 128)),
    kernel.WIDEN: (matrix(BFLOAT, 70, 90, turned=True), matrix(FLOAT, 70, 90)),
    kernel.WIDEN_BYTES: (matrix(BFLOAT, 70, 90, offset=3), matrix(FLOAT, 70, 90)),
}


@pytest.mark.parametrize("word", range(len(kernel.BLOCKS)))
def test_each_word_occurs_and_agrees(word: int) -> None:
    source, destination = WORDS[word]
    given_ = {(0, "x"): (1 << 40, source.buffers[0].nbytes)}
    to = {(0, "x"): (1 << 41, destination.buffers[0].nbytes)}
    table = copy_table(plan(source, destination), given_, to)
    assert table[0, kernel.WORD] == word
    check(source, destination, word)


@pytest.mark.parametrize("vectors", [True, False])
def test_narrowing_agrees_on_every_kind_of_number(vectors: bool) -> None:
    """Each upper half with lower halves around the rounding points: ties, just above and below.
    One by one, which takes longer, every thirteenth of them."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower).reshape(-1)
    bits = bits if vectors else bits[::13][:-1].copy()
    assert len(bits) % 4 == (0 if vectors else 3)
    made = plan(
        Layout([Tensor("w", "float32", bits.shape)], [Buffer(0, "w", bits.nbytes)],
               [Fragment("w", Region([0], bits.shape), 0, "w", 0, [4])]),
        Layout([Tensor("w", "bfloat16", bits.shape)], [Buffer(0, "w", bits.nbytes // 2)],
               [Fragment("w", Region([0], bits.shape), 0, "w", 0, [2])]),
    )  # fmt: skip
    written = {(0, "w"): np.zeros(len(bits), np.uint16)}
    bind(made, {(0, "w"): torch.from_numpy(bits.view(np.int32))},
         {(0, "w"): torch.from_numpy(written[0, "w"].view(np.int16))}, "triton").run()  # fmt: skip
    np.testing.assert_array_equal(written[0, "w"], cast_bits(bits, "float32", "bfloat16"))


def test_a_plan_without_bytes_is_no_launch() -> None:
    empty = Layout([Tensor("w", "int8", [0])], [Buffer(0, "w", 0)],
                   [Fragment("w", Region([0], [0]), 0, "w", 0, [1])])  # fmt: skip
    nothing = {(0, "w"): torch.empty(0, dtype=torch.int8)}
    bind(plan(empty, empty), nothing, {(0, "w"): torch.empty(0)}, "triton").run()
