"""Deltas and pulls against memcpy and others' formats; a whole sync against the usual ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.ceiling import ceilings
from bench.delta import diff, loopback, scatter, wire
from bench.harness import Case
from bench.reshard import MIB, matrix
from bench.sync.cases import QWEN3_0_6B
from bench.sync.cases import cases as sync_cases
from bench.sync.world import RANKS, World
from kimisys.broadcast import Publisher, Subscriber, connect, digest, snapshot_layout
from kimisys.reshard import Layout, itemsize


def digesting(dtype: str, total: int) -> Case:
    """The digest of one matrix, against numpy's copy of the same bytes on one thread."""
    rows = total // (1024 * itemsize(dtype))
    layout = matrix(rows, 1024, dtype, 0, 1, axis=0)
    data = np.random.default_rng(0).integers(0, 255, total, np.uint8)
    other = np.zeros_like(data)
    parts = max(2, total // MIB)
    split = matrix(rows, 1024, dtype, 0, parts, axis=0)
    pieces = {(rank, "w"): piece for rank, piece in enumerate(np.split(data, parts))}
    rest = Layout.merge([split.of_rank(rank) for rank in range(1, parts)])
    results: list[np.ndarray] = []

    def ours() -> None:
        results[:] = [digest(layout, {(0, "w"): data})]

    def correct() -> bool:
        """The first part by the definition, which is slow, and the others add up to the whole."""
        first = digest(split.of_rank(0), pieces, implementation="naive")
        return bool((results[0] == first + digest(rest, pieces)).all())

    return Case(
        f"digest, {dtype}, {total // MIB} MiB",
        ours,
        {"numpy copyto (one thread)": lambda: np.copyto(other, data)},
        correct,
        total,
    )


def publish_and_pull(total: int) -> Iterator[Case]:
    """Two row shards published whole, pulled into column shards and verified on both sides."""
    columns = 1024
    rows = total // (2 * columns)
    live = matrix(rows, columns, "bfloat16", 0, 2, axis=0)
    wanted = matrix(rows, columns, "bfloat16", 0, 1, axis=1)
    data = np.random.default_rng(0).integers(0, 255, total, np.uint8)
    buffers = {(0, "w"): data[: total // 2], (1, "w"): data[total // 2 :]}
    landed = np.zeros_like(data)
    snapshots = snapshot_layout(live, "bfloat16")
    versions = count(1)
    with tempfile.TemporaryDirectory() as folder:
        addresses = [Path(folder) / f"rank{rank}" for rank in range(2)]
        publishers = [
            Publisher(live.of_rank(rank), snapshots, rank, address)
            for rank, address in enumerate(addresses)
        ]
        for publisher in publishers:
            publisher.publish(0, buffers)
        with connect(addresses, timeout_seconds=10) as peers:
            subscriber = Subscriber(peers, wanted, rank=0)

            def ours() -> None:
                version = next(versions)
                for publisher in publishers:
                    publisher.publish(version, buffers, full=True)
                subscriber.pull(version, {(0, "w"): landed}, full=True)

            yield Case(
                f"publish + pull in full, verified, {total // MIB} MiB",
                ours,
                ceilings(total),
                lambda: bool((landed == data).all()),
                total,
            )
        for publisher in publishers:
            publisher.close()


def sync(engine_ranks: int) -> Iterator[Case]:
    """A model of Qwen3-0.6B's shape, from two Megatron ranks into a vLLM engine."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as disk,
    ):
        with Console(stderr=True).status(
            f"starting {RANKS} Megatron ranks and a vLLM engine of {engine_ranks}"
        ):
            world = World(QWEN3_0_6B, Path(folder), Path(disk), engine_ranks)
        with closing(world):
            yield from sync_cases(world, "Qwen3-0.6B")


def _digests() -> Iterator[Case]:
    yield digesting("bfloat16", 256 * MIB)
    yield digesting("float32", 256 * MIB)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "digest": _digests,
    "pull": lambda: publish_and_pull(256 * MIB),
    "diff": lambda: diff.cases(512 * MIB),
    "scatter": lambda: scatter.cases(512 * MIB, 0.01),
    "wire": lambda: wire.cases(128 * MIB),
    "sync-tp1": lambda: sync(1),
    "sync-tp2": lambda: sync(2),
    "mooncake": lambda: loopback.cases(256 * MIB, 0.01),
}
"""What `python -m bench broadcast` runs."""
