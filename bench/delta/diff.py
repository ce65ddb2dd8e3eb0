"""Finding what changed in 512 MiB and bringing the snapshot up to date, against one memcpy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from bench.ceiling import ceilings
from bench.delta.versions import Versions
from bench.harness import Case
from bench.reshard import MIB
from kimisys._core.broadcast import Diff
from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout

DENSITIES = (0.001, 0.01, 0.05)

Peers = dict[str, Callable[[], object]]


def compare(versions: Versions, name: str, peers: Peers) -> Case:
    """Diff, update of the snapshot and encoding, without a log: what a publish begins with."""
    difference = Diff(versions.layout, snapshot_layout(versions.layout, "bfloat16"))
    snapshot = versions.live.copy()
    found: list[int] = []

    def ours() -> None:
        found[:] = [difference.compare(versions.buffers, snapshot).changed]

    def correct() -> bool:
        return found == [versions.changed] and bool((snapshot == versions.live).all())

    return Case(
        f"diff, {name}", ours, peers, correct, versions.nbytes, agree=correct, before=versions.turn
    )


def publish(versions: Versions, name: str, peers: Peers) -> Iterator[Case]:
    """The whole publish: diff, update, encoding, digests, log."""
    numbers = count()
    landed = np.zeros_like(versions.live)
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "rank0"
        layout = snapshot_layout(versions.layout, "bfloat16")
        with Publisher(versions.layout, layout, 0, address) as publisher:
            publisher.publish(next(numbers), versions.buffers)
            with connect([address], timeout_seconds=10) as connected:
                subscriber = Subscriber(connected, versions.layout, rank=0)
                subscriber.pull(None, {(0, "w"): landed})

                def ours() -> None:
                    publisher.publish(next(numbers), versions.buffers)

                def correct() -> bool:
                    pulled = subscriber.pull(None, {(0, "w"): landed})
                    by_delta = pulled.base is not None and pulled.changed == versions.changed
                    return by_delta and bool((landed == versions.live).all())

                yield Case(
                    f"publish, {name}",
                    ours,
                    peers,
                    correct,
                    versions.nbytes,
                    before=versions.turn,
                )


def torch_nonzero(versions: Versions) -> Peers:
    """The places of what changed by torch, without and with their values; nothing is updated."""

    def places() -> torch.Tensor:
        old, new = (torch.from_numpy(b.view(np.int16)) for b in (versions.old, versions.live))
        return torch.ne(old, new).nonzero()

    def values() -> torch.Tensor:
        return torch.from_numpy(versions.live.view(np.int16))[places().view(-1)]

    return {"torch.ne().nonzero()": places, "torch.ne().nonzero(), values": values}


def cases(total: int) -> Iterator[Case]:
    """Random changes at all densities."""
    memcpy = {"memcpy": ceilings(total)["memcpy"]}
    for density in DENSITIES:
        versions = Versions(total, density, "random")
        peers = memcpy | (torch_nonzero(versions) if density == 0.01 else {})
        name = f"{100 * density:g} % random, {total // MIB} MiB"
        yield compare(versions, name, peers)
        yield from publish(versions, name, memcpy)
