"""Plans: made at Kimi-K2's size beside other planners, and executed beside torch's copy_."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.ceiling import ceilings
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


def random_int16(rows: int, columns: int, seed: int) -> torch.Tensor:
    """[rows, columns], int16: the bits of any bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << 15, (rows, columns), generator=generator, dtype=torch.int16)


def gather(row_bytes: int, total: int) -> Case:
    """Two column shards into one whole matrix: rows of `row_bytes` on the source's side."""
    half = row_bytes // 2
    rows = total // (2 * row_bytes)
    made = plan(
        matrix(rows, 2 * half, "bfloat16", 0, 2, axis=1),
        matrix(rows, 2 * half, "bfloat16", 0, 1, axis=1),
    )
    shards = [random_int16(rows, half, seed) for seed in (0, 1)]
    whole, expected = (torch.zeros(rows, 2 * half, dtype=torch.int16) for _ in "ab")
    sources = {(rank, "w"): shard.numpy() for rank, shard in enumerate(shards)}
    destinations = {(0, "w"): whole.numpy()}

    def peer() -> None:
        expected[:, :half].copy_(shards[0])
        expected[:, half:].copy_(shards[1])

    def correct() -> bool:
        peer()
        return torch.equal(whole, expected)

    return Case(
        f"gather, {row_bytes} B rows, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": peer, **ceilings(total)},
        correct,
        total,
    )


def scatter(row_bytes: int, total: int, shards: int = 2) -> Case:
    """One whole matrix into its two column shards, or into the first alone: rows of `row_bytes` on
    the destination's side, `total` bytes written."""
    half = row_bytes // 2
    rows = total // (shards * row_bytes)
    made = plan(
        matrix(rows, 2 * half, "bfloat16", 0, 1, axis=1),
        matrix(rows, 2 * half, "bfloat16", 0, 2, axis=1),
    )
    if shards == 1:
        made = made.of_rank(0)
    whole = random_int16(rows, 2 * half, 0)
    written = [torch.zeros(rows, half, dtype=torch.int16) for _ in range(shards)]
    expected = [torch.zeros_like(shard) for shard in written]
    sources = {(0, "w"): whole.numpy()}
    destinations = {(rank, "w"): shard.numpy() for rank, shard in enumerate(written)}

    def peer() -> None:
        for shard, part in zip(expected, whole.split(half, dim=1), strict=False):
            shard.copy_(part)

    def correct() -> bool:
        peer()
        return all(map(torch.equal, written, expected))

    kind = "scatter" if shards == 2 else "one shard of a scatter"
    return Case(
        f"{kind}, {row_bytes} B rows, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": peer, **ceilings(total)},
        correct,
        total,
    )


def cast(source_dtype: str, destination_dtype: str, total: int) -> Case:
    """float32 masters into bfloat16, or back; `total` bytes on the destination's side."""
    columns = 1024
    rows = total // (itemsize(destination_dtype) * columns)
    made = plan(
        matrix(rows, columns, source_dtype, 0, 1, axis=0),
        matrix(rows, columns, destination_dtype, 0, 1, axis=0),
    )
    source = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    source = source.to(getattr(torch, source_dtype))
    ours, expected = (
        torch.zeros(rows, columns, dtype=getattr(torch, destination_dtype)) for _ in "ab"
    )
    sources = {(0, "w"): source.view(torch.uint8).numpy()}
    destinations = {(0, "w"): ours.view(torch.uint8).numpy()}

    def correct() -> bool:
        expected.copy_(source)
        return torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))

    return Case(
        f"cast {source_dtype} → {destination_dtype}, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": lambda: expected.copy_(source)},
        correct,
        total,
    )


def strided(kind: str, total: int) -> Case:
    """A bfloat16 matrix whose elements do not lie side by side in the source: held "transposed", or
    "spread" over every other element."""
    columns = 4096
    rows = total // (2 * columns)
    shape = [rows, columns]
    strides = [2, 2 * rows] if kind == "transposed" else [4 * columns, 4]
    held = (
        random_int16(columns, rows, 0)
        if kind == "transposed"
        else random_int16(rows, 2 * columns, 0)
    )
    seen = held.t() if kind == "transposed" else held[:, ::2]
    layout = Layout(
        [Tensor("w", "bfloat16", shape)],
        [Buffer(0, "w", held.nbytes)],
        [Fragment("w", Region([0, 0], shape), 0, "w", 0, strides)],
    )
    made = plan(layout, matrix(rows, columns, "bfloat16", 0, 1, axis=0))
    ours, expected = (torch.zeros(rows, columns, dtype=torch.int16) for _ in "ab")
    sources, destinations = {(0, "w"): held.numpy()}, {(0, "w"): ours.numpy()}

    def correct() -> bool:
        expected.copy_(seen)
        return torch.equal(ours, expected)

    return Case(
        f"{kind} source, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": lambda: expected.copy_(seen)},
        correct,
        total,
    )


def thin_transpose(rows: int, columns: int) -> Case:
    """A bfloat16 matrix with few rows or few columns, held transposed in the source."""
    total = 2 * rows * columns
    layout = Layout(
        [Tensor("w", "bfloat16", [rows, columns])],
        [Buffer(0, "w", total)],
        [Fragment("w", Region([0, 0], [rows, columns]), 0, "w", 0, [2, 2 * rows])],
    )
    made = plan(layout, matrix(rows, columns, "bfloat16", 0, 1, axis=0))
    held = random_int16(columns, rows, 0)
    ours, expected = (torch.zeros(rows, columns, dtype=torch.int16) for _ in "ab")
    sources, destinations = {(0, "w"): held.numpy()}, {(0, "w"): ours.numpy()}

    def correct() -> bool:
        expected.copy_(held.t())
        return torch.equal(ours, expected)

    shape, transposed = (
        f"[{', '.join('N' if n > 64 else str(n) for n in sizes)}]"
        for sizes in ((rows, columns), (columns, rows))
    )
    return Case(
        f"{shape} from {transposed}, {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": lambda: expected.copy_(held.t())},
        correct,
        total,
    )


def small_copies(count: int, nbytes: int, bound: bool) -> Case:
    """Many small tensors in one plan, bound beforehand or not, against a loop of torch copies."""
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

    execution = made.bind(sources, destinations)
    return Case(
        f"{count} copies of {nbytes // 1024} KiB, " + ("bound" if bound else "executed"),
        execution.run if bound else lambda: made.execute(sources, destinations),
        {"a loop of torch copy_": peer},
        lambda: all(torch.equal(a, b) for a, b in zip(tos, froms, strict=True)),
        count * nbytes,
    )


def whole(total: int) -> Case:
    """One contiguous run."""
    made = plan(
        matrix(1, total // 2, "bfloat16", 0, 1, axis=0),
        matrix(1, total // 2, "bfloat16", 0, 1, axis=0),
    )
    source = random_int16(1, total // 2, 0)
    ours, expected = torch.zeros_like(source), torch.zeros_like(source)
    sources, destinations = {(0, "w"): source.numpy()}, {(0, "w"): ours.numpy()}
    return Case(
        f"one run of {total // MIB} MiB",
        lambda: made.execute(sources, destinations),
        {"torch copy_": lambda: expected.copy_(source), **ceilings(total)},
        lambda: torch.equal(ours, source),
        total,
    )


def _planning() -> Iterator[Case]:
    # here, so that whoever wants one copy's case needs no other planner
    from bench.planning.cases import cases

    return cases()


def _copies() -> Iterator[Case]:
    yield whole(256 * MIB)
    for row_bytes in (256, 1024, 4096, 65536):
        yield gather(row_bytes, 256 * MIB)
    for row_bytes in (256, 1024, 4096, 65536):
        yield scatter(row_bytes, 256 * MIB)
    for row_bytes in (1024, 4096):
        yield scatter(row_bytes, 256 * MIB, shards=1)
    yield cast("float32", "bfloat16", 128 * MIB)
    yield cast("bfloat16", "float32", 256 * MIB)
    yield strided("transposed", 64 * MIB)
    yield strided("spread", 64 * MIB)
    yield thin_transpose(16 * MIB, 2)
    yield thin_transpose(2, 16 * MIB)
    for kib in (1, 4, 32):
        yield small_copies(5000, kib * 1024, bound=False)
        yield small_copies(5000, kib * 1024, bound=True)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {"planning": _planning, "copies": _copies}
"""What `python -m bench reshard` runs."""
