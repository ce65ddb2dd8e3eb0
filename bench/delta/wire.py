"""What a delta takes on the wire, beside the bound and what others would send."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from bench.delta.formats import Compressed, Sparse, bound
from bench.delta.versions import Pattern, Versions
from bench.harness import Case
from bench.reshard import MIB
from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout

DENSITIES = (0.0001, 0.001, 0.01, 0.05, 0.3)


def wire(total: int, density: float, pattern: Pattern) -> Iterator[Case]:
    """Making the delta of a matrix; in its figures, what a subscriber reads of it."""
    versions = Versions(total, density, pattern)
    numbers = count()
    landed = np.zeros_like(versions.live)
    made: dict[str, Sparse | Compressed] = {}
    read: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "rank0"
        layout = snapshot_layout(versions.layout, "bfloat16")
        with Publisher(versions.layout, layout, 0, address) as publisher:
            publisher.publish(next(numbers), versions.buffers)
            with connect([address], timeout_seconds=10) as peers:
                subscriber = Subscriber(peers, versions.layout, rank=0)
                subscriber.pull(None, {(0, "w"): landed})

                def ours() -> None:
                    publisher.publish(next(numbers), versions.buffers)

                def correct() -> bool:
                    """As a subscriber takes it: by the delta alone, and to the bit."""
                    pulled = subscriber.pull(None, {(0, "w"): landed})
                    read[:] = [pulled.wire_nbytes]
                    by_delta = pulled.base is not None and pulled.changed == versions.changed
                    return by_delta and bool((landed == versions.live).all())

                def sparse() -> None:
                    made["sparse"] = Sparse(versions.old, versions.live)

                def compressed() -> None:
                    made["zstd"] = Compressed(versions.old, versions.live)

                def agree() -> bool:
                    same = (each.applied(versions.old) == versions.live for each in made.values())
                    return all(bool(each.all()) for each in same)

                def figures() -> dict[str, float]:
                    """Bytes per changed element, but for the first two."""
                    changed = versions.changed
                    taken = {
                        "kimisys, as a subscriber reads it": read[0] / changed,
                        "1.15 (H(p)/8p + 2)": bound(versions.density),
                        "vLLM's sparse format": made["sparse"].nbytes / changed,
                        "zstd of the XOR": made["zstd"].nbytes / changed,
                        "the same, values drawn anew": drawn_anew(versions).nbytes / changed,
                        "everything": versions.nbytes / changed,
                    }
                    return {
                        "density (%)": 100 * versions.density,
                        "of everything (%)": 100 * read[0] / versions.nbytes,
                        **{f"{what} (B per change)": value for what, value in taken.items()},
                    }

                yield Case(
                    f"publish, {100 * density:g} % {pattern}, {total // MIB} MiB",
                    ours,
                    {"vLLM's sparse format": sparse, "zstd of the XOR": compressed},
                    correct,
                    agree=agree,
                    figures=figures,
                    before=versions.turn,
                    peer_rounds={"zstd of the XOR": 1},
                )


def drawn_anew(versions: Versions) -> Compressed:
    """zstd's, if the changed elements had any bits: what it saves on the values is then nothing."""
    places = np.flatnonzero(versions.old != versions.live)
    new = versions.old.copy()
    new[places] ^= np.random.default_rng(0).integers(1, 1 << 16, len(places), np.uint16)
    return Compressed(versions.old, new)


def cases(total: int) -> Iterator[Case]:
    """All densities, both patterns."""
    patterns: tuple[Pattern, ...] = ("random", "clustered")
    for pattern in patterns:
        for density in DENSITIES:
            yield from wire(total, density, pattern)
