"""A plan on the device in one launch, against one contiguous copy of as many bytes on the device
and a loop of torch's copies.

Target: 0.8 of the contiguous copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.harness import Case
from bench.reshard import MIB, matrix, random_int16
from kimisys.kernels.strided_copy import Bound, bind
from kimisys.reshard import Buffer, Fragment, Layout, Plan, Region, Tensor, plan

RUNS = 20  # queued at a time: a launch and the wait for its end are not what is measured

Tensors = dict[tuple[int, str], torch.Tensor]


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(RUNS):
            call()
        torch.cuda.synchronize()

    return run


def contiguous(nbytes: int) -> Callable[[], object]:
    source, destination = (torch.ones(nbytes, dtype=torch.uint8, device="cuda") for _ in "ab")
    return lambda: destination.copy_(source)


def case(name: str, bound: Bound, nbytes: int, loop: Callable[[], object],
         correct: Callable[[], bool]) -> Case:  # fmt: skip
    """nbytes: written by one run; reading and writing, the memory does twice the figure."""
    return Case(
        name,
        repeated(bound.run),
        {
            "device-to-device copy": repeated(contiguous(nbytes)),
            "a loop of torch copy_": repeated(loop),
        },
        correct,
        RUNS * nbytes,
    )


def scatter(row_bytes: int, total: int) -> Case:
    """One matrix into two column shards, rows of row_bytes."""
    columns, rows = row_bytes // 2, total // (2 * row_bytes)
    made = plan(
        matrix(rows, 2 * columns, "bfloat16", 0, 1, axis=1),
        matrix(rows, 2 * columns, "bfloat16", 0, 2, axis=1),
    )
    whole = random_int16(rows, 2 * columns, 0).cuda()
    parts = whole.split(columns, dim=1)
    ours, theirs = ([torch.zeros_like(p).contiguous() for p in parts] for _ in "ab")
    bound = bind(made, {(0, "w"): whole}, {(rank, "w"): t for rank, t in enumerate(ours)})

    def loop() -> None:
        for to, part in zip(theirs, parts, strict=True):
            to.copy_(part)

    return case(f"scatter, {row_bytes} B rows, {total // MIB} MiB", bound, total, loop,
                lambda: all(map(torch.equal, ours, parts)))  # fmt: skip


def many(count: int, nbytes: int, dtype: str) -> Case:
    """`count` tensors of `nbytes` of bfloat16 at the destination, from `dtype`."""
    elements = nbytes // 2

    def side(dtype: str) -> Layout:
        size = {"bfloat16": 2, "float32": 4}[dtype]
        return Layout(
            [Tensor(f"t{i}", dtype, [elements]) for i in range(count)],
            [Buffer(0, f"t{i}", elements * size) for i in range(count)],
            [Fragment(f"t{i}", Region([0], [elements]), 0, f"t{i}", 0, [size])
             for i in range(count)],
        )  # fmt: skip

    made: Plan = plan(side(dtype), side("bfloat16"))
    froms = [torch.randn(elements, device="cuda").to(getattr(torch, dtype)) for _ in range(count)]
    ours, theirs = (
        [torch.zeros(elements, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
        for _ in "ab"
    )
    sources: Tensors = {(0, f"t{i}"): tensor for i, tensor in enumerate(froms)}
    bound = bind(made, sources, {(0, f"t{i}"): tensor for i, tensor in enumerate(ours)})

    def loop() -> None:
        for to, source in zip(theirs, froms, strict=True):
            to.copy_(source)

    def correct() -> bool:
        loop()
        return all(map(torch.equal, ours, theirs))

    return case(f"{count} copies of {nbytes // 1024} KiB from {dtype}", bound, count * nbytes,
                loop, correct)  # fmt: skip


def cases() -> Iterator[Case]:
    """What `make gpu-check` runs."""
    for row_bytes in (256, 1024, 4096, 65536):
        yield scatter(row_bytes, 2048 * MIB)
    yield many(5000, 4 * 1024, "bfloat16")
    yield many(5000, 256 * 1024, "bfloat16")
    yield many(5000, 256 * 1024, "float32")
