"""What `kimisys plan` found: figures of a plan and its route, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nics:
    """One entry for each NIC of the cluster, sorted by node and NIC; bytes with relays counted."""

    node: Integers
    nic: Integers
    sent: Integers
    received: Integers

    @property
    def count(self) -> int:
        """How many NICs there are."""
        return len(self.node)


@dataclass(frozen=True)
class PlanReport:
    """Figures of one plan; times in seconds.

    pairs: arrays "source_rank", "destination_rank", "bytes" and "copies", one entry for each pair
    of ranks with copies, of the plan itself: without relays. local, remote, relayed: bytes that
    stay within a node, that pass a NIC, and those of the latter that a rank of the destination
    passes on. peak_staging: bytes of the most that one rank holds at once.
    """

    model: str
    train: str
    infer: str
    source_ranks: int
    destination_ranks: int
    tensors: int
    trace_train: float
    trace_infer: float
    planning: float
    groups: int
    copies: int
    nbytes: int
    padding: int
    fingerprint: str
    pairs: Mapping[str, Integers]
    nics: Nics
    nic_bandwidth: float
    local: int
    remote: int
    relayed: int
    routing: float
    simulated: float
    bound: float
    messages: int
    peak_staging: int

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON types; seconds and bytes."""
        nics = self.nics
        return {
            "model": self.model,
            "train": {"layout": self.train, "ranks": self.source_ranks},
            "infer": {"layout": self.infer, "ranks": self.destination_ranks},
            "plan": {
                "fingerprint": self.fingerprint,
                "tensors": self.tensors,
                "groups": self.groups,
                "copies": self.copies,
                "bytes": self.nbytes,
                "padding_bytes": self.padding,
            },
            "bytes": {"local": self.local, "remote": self.remote, "relayed": self.relayed},
            "seconds": {
                "trace_train": self.trace_train,
                "trace_infer": self.trace_infer,
                "plan": self.planning,
                "route": self.routing,
                "simulated": self.simulated,
                "bound": self.bound,
            },
            "nic_bytes_per_second": self.nic_bandwidth,
            "messages": self.messages,
            "peak_staging_bytes": self.peak_staging,
            "nics": _rows(
                {
                    "node": nics.node,
                    "nic": nics.nic,
                    "sent": nics.sent,
                    "received": nics.received,
                }
            ),
            "pairs": _rows(self.pairs),
        }

    def table(self) -> Table:
        """What a person wants to read."""
        table = Table(box=None, padding=(0, 2), show_header=False)
        for name, value in self._lines():
            table.add_row(name, value)
        return table

    def _lines(self) -> list[tuple[str, str]]:
        over = (
            f"{self.simulated / self.bound:.2f} x" if self.bound > 0 else "there is nothing above"
        )
        share = self.local / max(1, self.local + self.remote)
        return [
            ("training", f"{self.train}   {self.source_ranks:,} ranks, {self.trace_train:.1f} s"),
            (
                "inference",
                f"{self.infer}   {self.destination_ranks:,} ranks, {self.trace_infer:.1f} s",
            ),
            (
                "plan and proof",
                f"{self.planning:.2f} s: {self.tensors:,} tensors, {self.copies:,} copies, "
                f"{self.groups:,} planned groups",
            ),
            (
                "proven",
                f"{_bytes(self.nbytes)} of {self.destination_ranks:,} ranks written exactly once, "
                f"{_bytes(self.padding)} of padding",
            ),
            (
                "sent on NICs",
                f"{_bytes(self.remote)} remote, {_bytes(self.local)} local ({share:.0%}), "
                f"{_bytes(self.relayed)} by relay",
            ),
            ("a NIC sends", _spread(self.nics.sent)),
            ("a NIC receives", _spread(self.nics.received)),
            (
                "simulated sync",
                f"{_seconds(self.simulated)} at {self.nic_bandwidth / 1e9:g} GB/s a NIC, "
                f"{self.messages:,} messages; {over} the lower bound of {_seconds(self.bound)}",
            ),
            ("peak staging", f"{_bytes(self.peak_staging)} on a rank"),
            ("fingerprint", self.fingerprint),
        ]


def _rows(columns: Mapping[str, Integers]) -> list[dict[str, int]]:
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _spread(loads: Integers) -> str:
    """The largest and the mean over the NICs that have anything to do, and how even they are."""
    busy = loads[loads > 0]
    if not len(busy):
        return "nothing"
    largest, mean = int(busy.max()), float(busy.mean())
    return (
        f"at most {_bytes(largest)}, {_bytes(mean)} in the mean of {len(busy)} busy NICs "
        f"of {len(loads)} (largest / mean {largest / mean:.3f})"
    )


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
