"""Planning and executing: strided copies and casts, against torch doing the same copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from bench.harness import Case
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor, itemsize, plan

MIB = 1 << 20


def matrix(rows: int, columns: int, dtype: str, rank: int, parts: int, axis: int) -> Layout:
    """A [rows, columns] matrix cut along `axis` into `parts` equal shards on ranks `rank`, `rank +
    1`, ..."""
    size = itemsize(dtype)
    shape = [rows, columns]
    shape[axis] //= parts
    fragments, buffers = [], []
    for part in range(parts):
        offset = [0, 0]
        offset[axis] = part * shape[axis]
        buffers.append(Buffer(rank + part, "w", shape[0] * shape[1] * size))
        strides = [shape[1] * size, size]
        fragments.append(Fragment("w", Region(offset, shape), rank + part, "w", 0, strides))
    return Layout([Tensor("w", dtype, [rows, columns])], buffers, fragments)


def column_shards(row_bytes: int, total: int) -> Case:
    """Two column shards into one whole matrix: rows of `row_bytes` on the source's side."""
    columns, rows = 2 * row_bytes // 2, total // (2 * row_bytes)
    made = plan(
        matrix(rows, columns, "bfloat16", 0, 2, axis=1),
        matrix(rows, columns, "bfloat16", 0, 1, axis=1),
    )
    generator = torch.Generator().manual_seed(0)
    shards = [
        torch.randint(0, 1 << 15, (rows, columns // 2), generator=generator, dtype=torch.int16)
        for _ in "ab"
    ]
    whole, expected = (
        torch.zeros(rows, columns, dtype=torch.int16),
        torch.zeros(rows, columns, dtype=torch.int16),
    )
    sources = {(rank, "w"): shard.numpy() for rank, shard in enumerate(shards)}
    destinations = {(0, "w"): whole.numpy()}

    def peer() -> None:
        expected[:, : columns // 2].copy_(shards[0])
        expected[:, columns // 2 :].copy_(shards[1])

    def correct() -> bool:
        peer()
        return torch.equal(whole, expected)

    return Case(
        f"{row_bytes} B rows, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        "torch copy_",
        peer,
        correct,
        total,
    )


def cast(total: int) -> Case:
    """float32 masters into bfloat16; bytes counted on the destination's side."""
    columns = 1024
    rows = total // (2 * columns)
    made = plan(
        matrix(rows, columns, "float32", 0, 1, axis=0),
        matrix(rows, columns, "bfloat16", 0, 1, axis=0),
    )
    source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    ours, expected = (torch.zeros(rows, columns, dtype=torch.bfloat16) for _ in "ab")
    destinations = {(0, "w"): ours.view(torch.int16).numpy()}

    def correct() -> bool:
        expected.copy_(source)
        return torch.equal(ours.view(torch.int16), expected.view(torch.int16))

    return Case(
        f"cast float32 → bfloat16, {total // MIB} MiB",
        lambda: made.execute({(0, "w"): source.numpy()}, destinations),
        "torch copy_",
        lambda: expected.copy_(source),
        correct,
        total,
    )


def small_copies(count: int, nbytes: int) -> Case:
    """Many small tensors in one plan, against a loop of torch copies."""
    shape = [nbytes // 2]

    def side(rank: int) -> Layout:
        fragments = [
            Fragment(f"t{i}", Region([0], shape), rank, f"t{i}", 0, [2]) for i in range(count)
        ]
        buffers = [Buffer(rank, f"t{i}", nbytes) for i in range(count)]
        return Layout(
            [Tensor(f"t{i}", "bfloat16", shape) for i in range(count)], buffers, fragments
        )

    made = plan(side(0), side(1))
    froms = [torch.full((shape[0],), i % 1000, dtype=torch.int16) for i in range(count)]
    tos, others = ([torch.zeros(shape[0], dtype=torch.int16) for _ in range(count)] for _ in "ab")
    sources = {(0, f"t{i}"): t.numpy() for i, t in enumerate(froms)}
    destinations = {(1, f"t{i}"): t.numpy() for i, t in enumerate(tos)}

    def peer() -> None:
        for to, source in zip(others, froms, strict=True):
            to.copy_(source)

    return Case(
        f"{count} copies of {nbytes // 1024} KiB",
        lambda: made.execute(sources, destinations),
        "a loop of torch copy_",
        peer,
        lambda: all(torch.equal(a, b) for a, b in zip(tos, froms, strict=True)),
        count * nbytes,
    )


def whole(total: int) -> Case:
    """One contiguous run, against numpy's memcpy: the ceiling of the machine on one thread."""
    made = plan(
        matrix(1, total // 2, "bfloat16", 0, 1, axis=0),
        matrix(1, total // 2, "bfloat16", 0, 1, axis=0),
    )
    source = np.random.default_rng(0).integers(0, 255, total, np.uint8)
    ours, other = np.zeros_like(source), np.zeros_like(source)
    return Case(
        f"one run of {total // MIB} MiB",
        lambda: made.execute({(0, "w"): source}, {(0, "w"): ours}),
        "numpy copyto (one thread)",
        lambda: np.copyto(other, source),
        lambda: bool((ours == source).all()),
        total,
    )


def cases() -> Iterator[Case]:
    """What `python -m bench reshard` runs."""
    yield whole(256 * MIB)
    for row_bytes in (256, 1024, 4096, 65536):
        yield column_shards(row_bytes, 256 * MIB)
    yield cast(128 * MIB)
    yield small_copies(5000, 32 * 1024)
