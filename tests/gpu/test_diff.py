"""The diff's kernels on the device: what they find, write and leave is what the core's naive diff
finds, writes and leaves on the host."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from shared_memory import registered

from kimisys.broadcast import snapshot_layout
from kimisys.errors import BufferMismatchError
from kimisys.kernels.diff import bind, implementations
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor, itemsize

WHERE = ["device", "registered"]
CASTS = [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
         ("float32", "float32"), ("float8_e4m3fn", None), ("int64", None)]  # fmt: skip


def matrix(dtype: str, rows: int, columns: int, turned: bool = False, offset: int = 0,
           gap: int = 0) -> Layout:  # fmt: skip
    """At an offset, with padding behind its rows, both in elements; turned: held transposed."""
    size = itemsize(dtype)
    inner, outer = (rows, columns) if turned else (columns, rows)
    pitch = inner + gap
    gaps = [Padding(0, "x", (offset + i * pitch + inner) * size, gap * size) for i in range(outer)]
    return Layout(
        [Tensor("w", dtype, [rows, columns])],
        [Buffer(0, "x", (offset + outer * pitch) * size)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", offset * size,
                  [size, pitch * size] if turned else [pitch * size, size])],
        [Padding(0, "x", 0, offset * size), *(gaps if gap else [])],
    )  # fmt: skip


def random(nbytes: int, seed: int) -> torch.Tensor:
    """All bits are random, so NaNs, infinities and denormals are among the numbers."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, "u1"))


def check(live: Layout, snapshot: Layout, device: torch.device, where: str, density: float) -> None:
    """From a random snapshot, where nearly all differs, and then from one that differs here and
    there; on the host by the naive implementation."""
    nbytes = snapshot.buffers[0].nbytes
    weights = {(b.rank, b.name): random(b.nbytes, i) for i, b in enumerate(live.buffers)}
    there = {key: tensor.to(device) for key, tensor in weights.items()}
    counted = snapshot.cover()
    on_host = random(nbytes, 99)
    memory = registered(nbytes) if where == "registered" else nullcontext(
        torch.empty(nbytes, dtype=torch.uint8, device=device))  # fmt: skip
    with memory as into:
        into.copy_(on_host)
        naive = bind(live, snapshot, counted, weights, on_host, "naive")
        ours = bind(live, snapshot, counted, there, into)
        for turn in range(2):
            wanted, found = naive.run(), ours.run()
            np.testing.assert_array_equal(found.descriptors, wanted.descriptors)
            np.testing.assert_array_equal(found.increments, wanted.increments)
            assert list(found.payloads) == list(wanted.payloads)
            assert found.changed == wanted.changed
            assert torch.equal(into.cpu(), on_host)
            for key, tensor in weights.items():
                changed = torch.rand(tensor.shape) < density
                tensor[changed] = random(int(changed.sum()), 7 + turn)
                there[key].copy_(tensor)
        assert naive.run().changed == ours.run().changed
        assert ours.run().changed == 0


def test_there_is_one(device: torch.device) -> None:
    assert implementations(device) == ["triton"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("live", "wire"), CASTS)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 1.0])
def test_large_matrices(
    device: torch.device, where: str, live: str, wire: str | None, density: float
) -> None:
    """Sixteen blocks side by side, several bands, words as wide as they get."""
    held = matrix(live, 300, 8192)
    check(held, snapshot_layout(held, wire), device, where, density)


@pytest.mark.parametrize(("live", "wire"), CASTS)
@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("gap", [0, 1, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_any_alignment(device: torch.device, live: str, wire: str | None, offset: int, gap: int,
                       turned: bool) -> None:  # fmt: skip
    held = matrix(live, 130, 120, turned, offset, gap)
    check(held, snapshot_layout(held, wire), device, "device", 0.02)


def test_thousands_of_tensors_of_all_sizes(device: torch.device) -> None:
    """3,000 tensors of 1 to 65,536 elements in two buffers, some float32 and some bfloat16."""
    tensors, fragments, ends = [], [], {"float32": 0, "bfloat16": 0}
    for i in range(3000):
        dtype, length = ("float32", "bfloat16")[i % 2], 1 + (i * 7919) % (1 << (i % 17))
        tensors.append(Tensor(f"t{i}", dtype, [length]))
        size = itemsize(dtype)
        region = Region([0], [length])
        fragments.append(Fragment(f"t{i}", region, 0, dtype, ends[dtype], [size]))
        ends[dtype] += length * size
    held = Layout(tensors, [Buffer(0, name, end) for name, end in ends.items()], fragments)
    check(held, snapshot_layout(held, "bfloat16"), device, "device", 0.01)


def test_places_of_more_than_31_bits(device: torch.device) -> None:
    """A transposed matrix of 3 Gi elements: its last ones lie where 32-bit places do not reach."""
    rows, columns = 3 << 12, 1 << 18
    held = Layout(
        [Tensor("w", "bfloat16", [rows, columns])], [Buffer(0, "x", rows * columns * 2)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "x", 0, [2, rows * 2])],
    )  # fmt: skip
    live = torch.zeros(rows * columns, dtype=torch.int16, device=device)
    into = torch.zeros(rows * columns * 2, dtype=torch.uint8, device=device)
    snapshot = snapshot_layout(held)
    bound = bind(held, snapshot, snapshot, {(0, "x"): live}, into)
    places = torch.tensor([0, 1, (1 << 31) + 5, rows * columns - 1], device=device)
    live[places] = torch.tensor([1, 2, 3, 4], dtype=torch.int16, device=device)
    assert bound.run().changed == 4
    assert torch.equal(into.view(torch.int16), live)


def test_pageable_memory_is_refused(device: torch.device) -> None:
    held = matrix("bfloat16", 4, 4)
    snapshot = snapshot_layout(held)
    live = {(0, "x"): torch.zeros(16, dtype=torch.bfloat16, device=device)}
    with pytest.raises(BufferMismatchError, match="cannot reach it"):
        bind(held, snapshot, snapshot, live, torch.zeros(32, dtype=torch.uint8))


def test_it_follows_the_current_stream(device: torch.device) -> None:
    held = matrix("bfloat16", 256, 4096)
    live = torch.zeros(1 << 20, dtype=torch.bfloat16, device=device)
    into = torch.zeros(1 << 21, dtype=torch.uint8, device=device)
    snapshot = snapshot_layout(held)
    bound = bind(held, snapshot, snapshot, {(0, "x"): live}, into)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for value in range(1, 30):
            live.fill_(value)
            assert bound.run().changed == live.numel()
