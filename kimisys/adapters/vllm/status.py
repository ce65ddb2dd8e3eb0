"""What a worker says of itself, and what an engine reports of an update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Status:
    """What a worker serves, and how its last update went; plain values, as it crosses processes.

    version: committed, None before the first update. broken: why the worker refuses to compute, or
    "".

    Of the last update: base: the version to which changes were added, None where everything was
    pulled. seconds: wall time by phase: those of Pulled, and "pull" (all of them but "verify"),
    "digest" ("verify"), "pack". nbytes: bytes of tensor elements landed. wire_nbytes: bytes read
    from publishers. full_nbytes: what a full pull reads. changed: elements landed. digests: tensors
    compared by digest.
    """

    version: int | None = None
    broken: str = ""
    base: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    wire_nbytes: int = 0
    full_nbytes: int = 0
    changed: int = 0
    digests: int = 0


def report(version: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Of an update, from each rank's Status."""
    phases = sorted({phase for rank in ranks for phase in rank["seconds"]})
    counts = ("nbytes", "wire_nbytes", "full_nbytes", "changed")
    return {
        "version": version,
        "base": ranks[0]["base"],  # the same for all: they decide together
        **{f"{p}_seconds": max(rank["seconds"].get(p, 0.0) for rank in ranks) for p in phases},
        **{count: sum(rank[count] for rank in ranks) for count in counts},
        "digests": max(rank["digests"] for rank in ranks),
    }
