"""A plan in one launch on the device: every byte is that of the naive executor on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.reshard import matrix
from kimisys.errors import BufferMismatchError
from kimisys.kernels.strided_copy import bind, implementations
from kimisys.reshard import (
    Buffer,
    Fragment,
    Layout,
    Padding,
    Plan,
    Region,
    Tensor,
    itemsize,
    plan,
)

CASTS = [
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    *((name, name) for name in ("float32", "bfloat16", "float8_e4m3fn", "int64")),
]


def random(layout: Layout) -> dict[tuple[int, str], torch.Tensor]:
    generator = np.random.default_rng(0)
    return {
        (b.rank, b.name): torch.from_numpy(generator.integers(0, 256, b.nbytes, "u1"))
        for b in layout.buffers
    }


def check(made: Plan, device: torch.device, runs: int = 1) -> None:
    """All bits are random, so NaNs, infinities and denormals are among the numbers."""
    sources, wanted = random(made.source), random(made.destination)
    made.execute(
        {key: tensor.numpy() for key, tensor in sources.items()},
        {key: tensor.numpy() for key, tensor in wanted.items()},
        implementation="naive",
    )
    there = {key: torch.full_like(tensor, 0xEE, device=device) for key, tensor in wanted.items()}
    bound = bind(made, {key: tensor.to(device) for key, tensor in sources.items()}, there)
    for _ in range(runs):
        bound.run()
    torch.cuda.synchronize()
    for key, tensor in wanted.items():
        assert torch.equal(there[key].cpu(), tensor), key


def test_there_is_one(device: torch.device) -> None:
    assert implementations(device) == ["triton"]


@pytest.mark.parametrize(("source", "destination"), CASTS)
@pytest.mark.parametrize("columns", [2, 6, 1022, 4096])
@pytest.mark.parametrize("axis", [0, 1])
def test_shards(
    device: torch.device, source: str, destination: str, columns: int, axis: int
) -> None:
    """Two shards of rows or columns into two of columns: odd rows of a few bytes, whole lines."""
    held = matrix(514, columns, source, rank=0, parts=2, axis=axis)
    check(plan(held, matrix(514, columns, destination, rank=0, parts=2, axis=1)), device, runs=2)


@pytest.mark.parametrize(("source", "destination"), CASTS)
@pytest.mark.parametrize("offset", [0, 3, 16])
@pytest.mark.parametrize("gap", [0, 1, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_any_alignment(
    device: torch.device, source: str, destination: str, offset: int, gap: int, turned: bool
) -> None:
    """Rows at any offset with padding behind them, in the source also transposed."""
    rows, columns = 130, 120

    def side(dtype: str, turned: bool, offset: int) -> Layout:
        size = itemsize(dtype)
        inner, outer = (rows, columns) if turned else (columns, rows)
        pitch = inner * size + gap
        padding = [Padding(0, "x", offset + i * pitch + inner * size, gap) for i in range(outer)]
        return Layout(
            [Tensor("w", dtype, [rows, columns])],
            [Buffer(0, "x", offset + outer * pitch)],
            [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", offset,
                      [size, pitch] if turned else [pitch, size])],
            [Padding(0, "x", 0, offset), *(padding if gap else [])],
        )  # fmt: skip

    check(plan(side(source, turned, offset), side(destination, False, 0)), device)
    check(plan(side(source, turned, 0), side(destination, False, offset)), device)


def test_thousands_of_copies_of_all_sizes(device: torch.device) -> None:
    """In one launch: 3,000 tensors of 2 bytes to 128 KiB, some narrowed, in one fused buffer."""
    lengths = [1 + (i * 7919) % (1 << (i % 17)) for i in range(3000)]
    names = [f"t{i}" for i in range(len(lengths))]

    def side(dtypes: list[str]) -> Layout:
        fragments, end = [], 0
        for name, length, dtype in zip(names, lengths, dtypes, strict=True):
            region = Region([0], [length])
            fragments.append(Fragment(name, region, 0, "fused", end, [itemsize(dtype)]))
            end += length * itemsize(dtype)
        tensors = [
            Tensor(name, dtype, [length])
            for name, length, dtype in zip(names, lengths, dtypes, strict=True)
        ]
        return Layout(tensors, [Buffer(0, "fused", end)], fragments)

    wide = ["float32" if i % 3 == 0 else "bfloat16" for i in range(len(names))]
    check(plan(side(wide), side(["bfloat16"] * len(names))), device)


def test_offsets_of_more_than_31_bits(device: torch.device) -> None:
    """5 GiB: the last rows lie where 32-bit offsets do not reach."""
    columns = 4096
    rows = (5 << 30) // columns
    made = plan(matrix(rows, columns // 2, "bfloat16", 0, 1, 0),
                matrix(rows, columns // 2, "bfloat16", 0, 2, 1))  # fmt: skip
    whole = torch.empty(rows, columns // 2, dtype=torch.int16, device=device).random_()
    halves = [torch.zeros(rows, columns // 4, dtype=torch.int16, device=device) for _ in "ab"]
    bind(made, {(0, "w"): whole}, {(rank, "w"): half for rank, half in enumerate(halves)}).run()
    for half, wanted in zip(halves, whole.chunk(2, dim=1), strict=True):
        assert torch.equal(half, wanted)


def test_tensors_of_two_devices_are_refused(device: torch.device) -> None:
    made = plan(matrix(4, 4, "int8", 0, 1, 0), matrix(4, 4, "int8", 0, 1, 0))
    here, there = torch.zeros(16, dtype=torch.int8), torch.zeros(16, dtype=torch.int8).to(device)
    with pytest.raises(BufferMismatchError, match="one device"):
        bind(made, {(0, "w"): there}, {(0, "w"): here})
    with pytest.raises(BufferMismatchError, match="overlaps"):
        bind(made, {(0, "w"): there}, {(0, "w"): there})


def test_it_runs_on_the_current_stream(device: torch.device) -> None:
    made = plan(matrix(256, 4096, "int8", 0, 1, 0), matrix(256, 4096, "int8", 0, 1, 0))
    source, destination = (torch.zeros(1 << 20, dtype=torch.int8, device=device) for _ in "ab")
    bound = bind(made, {(0, "w"): source}, {(0, "w"): destination})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for value in range(100):  # each is seen by the copy queued behind it
            source.fill_(value)
            bound.run()
            assert int(destination.sum()) == value * destination.numel()
