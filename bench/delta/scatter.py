"""Writing a delta where it belongs, against masked writes of the whole tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from bench.delta.versions import Versions
from bench.harness import Case
from bench.reshard import MIB
from kimisys._core.broadcast import Scatter, Staged
from kimisys.broadcast import Peers, Publisher, connect, snapshot_layout
from kimisys.broadcast.wire import Deadline
from kimisys.reshard import plan


def staged(versions: Versions) -> tuple[Scatter, list[Staged]]:
    """What brings each of the two versions from the other, read from a real publisher's log."""
    layout = snapshot_layout(versions.layout, "bfloat16")
    scatter = Scatter(plan(layout, versions.layout), [versions.layout])
    numbers = count()
    steps: list[Staged] = []
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "rank0"
        with Publisher(versions.layout, layout, 0, address) as publisher:
            publisher.publish(next(numbers), versions.buffers)
            with connect([address], timeout_seconds=10) as peers:
                for _ in versions.bits:
                    versions.turn()
                    publisher.publish(version := next(numbers), versions.buffers)
                    steps.append(_stage(peers, scatter, version))
    return scatter, steps


def _stage(peers: Peers, scatter: Scatter, version: int) -> Staged:
    deadline = Deadline(10.0)
    remote, _ = peers.remotes(deadline)[0]
    chain = remote.chain(version - 1, version, deadline)
    assert chain is not None
    (entry,) = chain
    payload = remote.stage(entry, scatter.payload(0, entry.record), deadline)
    assert payload is not None
    return scatter.stage(0, entry.record, payload)


def cases(total: int, density: float) -> Iterator[Case]:
    """Writing alone, and with what verifies the delta before."""
    versions = Versions(total, density, "random")
    scatter, steps = staged(versions)  # the live version is again the first
    turns = count()
    written = versions.live.copy()
    number = [0]

    def turn() -> None:
        versions.turn()
        number[0] = next(turns) % 2

    def turn_and_measure() -> None:
        turn()
        measure()

    counted: list[int] = []

    def apply() -> None:
        counted[:] = [scatter.apply([steps[number[0]]], {(0, "w"): written})]

    def measure() -> None:
        scatter.measure([steps[number[0]]], {(0, "w"): written})

    def both_ways() -> None:
        measure()
        apply()

    def correct() -> bool:
        return counted == [versions.changed] and bool((written == versions.live).all())

    masked, chosen = (torch.from_numpy(versions.live.copy().view(np.int16)) for _ in "ab")
    mask = torch.from_numpy(versions.old != versions.live)
    both = [torch.from_numpy(bits.view(np.int16)) for bits in versions.bits]
    values = [new[mask] for new in both]

    def live() -> int:
        return int(versions.live is versions.bits[1])

    def write_masked() -> None:
        masked[mask] = values[live()]

    def choose() -> None:
        torch.where(mask, both[live()], chosen, out=chosen)

    def agree() -> bool:
        return all(torch.equal(each, both[live()]) for each in (masked, chosen))

    # A pull applies what it has measured, which is then known to be sound.
    for name, before, ours in (
        ("scatter", turn_and_measure, apply),
        ("measure and scatter", turn, both_ways),
    ):
        yield Case(
            f"{name}, {100 * density:g} % random, {total // MIB} MiB",
            ours,
            {"torch x[mask] = values": write_masked, "torch.where": choose},
            correct,
            agree=agree,
            before=before,
        )
