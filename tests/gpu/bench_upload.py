"""Host to device from pinned landing buffers, against torch doing the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pinned import arrays, pinned

from bench.harness import Case
from bench.reshard import MIB, matrix
from kimisys.reshard import plan


def land_and_upload(total: int) -> Case:
    """Two column shards (rows of 4 KiB) by a plan into one landing buffer and on to the device,
    against torch's strided copies into pinned memory and on."""
    columns, rows = 4096, total // 8192
    shards = [torch.empty(rows, columns, dtype=torch.uint8).random_() for _ in "ab"]
    whole = matrix(rows, columns, "bfloat16", 0, 1, axis=1)
    made = plan(matrix(rows, columns, "bfloat16", 0, 2, axis=1), whole)
    sources = {(rank, "w"): shard.numpy() for rank, shard in enumerate(shards)}
    landed, beside = pinned(whole), pinned(whole)[0, "w"].view(rows, 2 * columns)
    destinations = arrays(landed)
    there, other = (torch.zeros(rows, 2 * columns, dtype=torch.uint8, device="cuda") for _ in "ab")

    def ours() -> None:
        made.execute(sources, destinations)
        there.view(-1).copy_(landed[0, "w"], non_blocking=True)
        torch.cuda.synchronize()

    def peer() -> None:
        for part, shard in enumerate(shards):
            beside[:, part * columns : (part + 1) * columns].copy_(shard)
        other.copy_(beside, non_blocking=True)
        torch.cuda.synchronize()

    return Case(
        f"two column shards → pinned → device, {total // MIB} MiB",
        ours,
        {"torch copy_ into pinned, then to the device": peer},
        lambda: torch.equal(there.cpu(), torch.cat(shards, dim=1)),
        total,
    )


def cases() -> Iterator[Case]:
    """What `make gpu-check` runs."""
    yield land_and_upload(256 * MIB)
