"""What changed in weights on the device since their snapshot, brought to the host as positions and
bits, against one contiguous copy of as many bytes and against torch's comparison; and the way back,
into shards.

No target has been set: this has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from shared_memory import registered

from bench.harness import Case
from bench.reshard import MIB, matrix
from kimisys.broadcast import snapshot_layout
from kimisys.kernels import diff_kernel as kernel
from kimisys.kernels.changes import Changes
from kimisys.kernels.delta import blocks_of
from kimisys.kernels.diff_launch import Launch, find_changes
from kimisys.kernels.diff_table import make_tables
from kimisys.kernels.scatter import bind
from kimisys.reshard import Layout, plan

COLUMNS = 8192


class Weights:
    """float32 weights and others that differ from them in a share of elements once they are
    bfloat16, turn by turn against one snapshot: every run finds that share."""

    def __init__(self, nbytes: int, density: float, into: torch.Tensor) -> None:
        live = matrix(nbytes // 2 // COLUMNS, COLUMNS, "float32", 0, 1, 0)
        self.snapshot = snapshot_layout(live, "bfloat16")
        self.blocks = blocks_of(self.snapshot)
        self.into, self.turn, self.changes = into, 0, Changes([], [], torch.zeros(0).numpy())
        device = torch.device("cuda", torch.cuda.current_device())
        first = torch.randn(nbytes // 2, device=device)
        changed = torch.rand(nbytes // 2, device=device) < density
        self.count = int(changed.sum())
        self.live = [first, torch.where(changed, -first, first)]
        self._launches = [self._launch(live, tensor, device) for tensor in self.live]
        self.into.view(torch.bfloat16).copy_(self.live[1])

    def _launch(self, live: Layout, tensor: torch.Tensor, device: torch.device) -> list[Launch]:
        address = {"w": tensor.data_ptr()}, self.into.data_ptr()
        tables = make_tables(live, self.snapshot, self.snapshot, self.blocks, *address, kernel.TILE)
        return [Launch(table, device) for table in tables]

    def run(self) -> None:
        launches = self._launches[self.turn % 2]
        self.changes = find_changes(launches, self.snapshot, self.blocks)
        self.turn += 1

    def torchs(self) -> None:
        """The same with torch, against the snapshot on the device."""
        now = self.live[self.turn % 2].to(torch.bfloat16).view(torch.int16)
        positions = torch.ne(now, self.into.view(torch.int16)).nonzero().view(-1)
        bits = now[positions]
        self.into.view(torch.int16)[positions] = bits
        positions.to(torch.int32).cpu(), bits.cpu()
        self.turn += 1

    def correct(self) -> bool:
        wanted = self.live[(self.turn - 1) % 2].to(torch.bfloat16).view(torch.uint8)
        found = sum(map(len, self.changes.positions))
        return found == self.count and torch.equal(self.into.cpu(), wanted.cpu())


def synchronized(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def on_the_device(density: float, nbytes: int) -> Case:
    into = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    weights = Weights(nbytes, density, into)
    source, destination = torch.empty_like(into), torch.empty_like(into)
    return Case(
        f"diff of {nbytes // MIB} MiB of bfloat16 from float32, {density:.2%} changed",
        weights.run,
        {
            "device-to-device copy": synchronized(lambda: destination.copy_(source)),
            "torch.ne, nonzero, gather, scatter": synchronized(weights.torchs),
        },
        weights.correct,
        nbytes,
    )


def scattered(density: float, nbytes: int) -> Case:
    """Changes on the host into two column shards on the device."""
    weights = Weights(nbytes, density, torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
    weights.run()
    rows = nbytes // 2 // COLUMNS
    shards = matrix(rows, COLUMNS, "bfloat16", 0, 2, 1)
    held = {(b.rank, b.name): torch.zeros(b.nbytes, dtype=torch.uint8, device="cuda")
            for b in shards.buffers}  # fmt: skip
    bound = bind(plan(weights.snapshot, shards), 0, weights.blocks, held)
    whole = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    written = []

    def correct() -> bool:
        halves = weights.live[0].to(torch.bfloat16).view(rows, COLUMNS).chunk(2, dim=1)
        for part, half in enumerate(halves):
            shard = held[part, "w"].view(torch.bfloat16).view(rows, -1)
            if not torch.equal(shard[shard != 0], half[shard != 0]):
                return False
        return written[-1] == weights.count

    return Case(
        f"scatter into two column shards of {nbytes // MIB} MiB, {density:.2%} changed",
        lambda: written.append(bound.run(weights.changes)),
        {"all of it from pinned memory": synchronized(lambda: there.copy_(whole))},
        correct,
        nbytes,
    )


def through_the_bus(density: float, nbytes: int) -> Iterator[Case]:
    with registered(nbytes) as into:
        weights = Weights(nbytes, density, into)
        there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        yield Case(
            f"diff of {nbytes // MIB} MiB against a snapshot in shared memory, {density:.2%}",
            weights.run,
            {"the snapshot to the device": synchronized(lambda: there.copy_(into))},
            weights.correct,
            nbytes,
        )


def cases() -> Iterator[Case]:
    """What `make gpu-check` runs."""
    for density in (0.001, 0.01, 0.05, 0.3):
        yield on_the_device(density, 1024 * MIB)
    for density in (0.001, 0.01):
        yield from through_the_bus(density, 1024 * MIB)
        yield scattered(density, 1024 * MIB)
