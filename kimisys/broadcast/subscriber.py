"""An engine worker's side: pull what the plan needs from the snapshots, verify what landed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys._core.broadcast import digest
from kimisys.broadcast.peers import Peers
from kimisys.broadcast.rounds import element_counts, incomplete, rounds
from kimisys.errors import DigestError, LayoutError, VersionError
from kimisys.reshard import Layout, plan

Buffers = Mapping[tuple[int, str], Any]
"""(rank, buffer name) to any C-contiguous, writable buffer of the layout's size."""

Digests = npt.NDArray[np.uint64]

Combine = Callable[[Digests], Digests]
"""Sums a uint64[n] over the engine's ranks, mod 2^64 (as int64 the sum has the same bits)."""


@dataclass(frozen=True)
class Pulled:
    """What one pull did.

    Attributes:
        version: whose weights are now in the destination.
        base: what it held before, where only the changes since were pulled; None for a full pull.
        nbytes: bytes of tensor elements written to the destination.
        wire_nbytes: bytes read from the publishers.
        full_nbytes: bytes that a full pull reads.
        changed: elements written.
        digests_checked: tensors whose digest, or whose change of digest, was compared.
        verified_fully: whether every landed element was digested.
        seconds: of wall time by phase: "read" and "measure" and "apply", or "land"; "verify".
        total_seconds: of wall time.
        touched: (rank, buffer name) of the destination's buffers that were written to.
    """

    version: int
    base: int | None
    nbytes: int
    wire_nbytes: int
    full_nbytes: int
    changed: int
    digests_checked: int
    verified_fully: bool
    seconds: dict[str, float]
    total_seconds: float
    touched: frozenset[tuple[int, str]]

    def replay(self, buffers: Buffers) -> bool:
        """Writes the same changes into other copies of some of the destination's buffers.

        Args:
            buffers: copies that hold ``base``, by (rank, name); buffers that are not given are left
                out. Check that they do hold ``base``: nothing is verified here.

        Returns False, and writes nothing, when there is no delta to replay: copy the touched
        buffers from the destination instead.
        """
        return False


class Subscriber:
    """Pulls one engine rank's part of the published weights and verifies it where it landed.

    Args:
        peers: the publishers, see ``connect``.
        destination: the layout of ALL engine ranks, in the dtypes that are published.
        rank: this engine rank.
        verify_every: after so many versions by deltas everything that landed is digested.

    Attributes:
        version: that the destination verifiably holds, None when it may hold anything.
        plan: the copies of a pull.
        absent: published tensors that this rank holds no part of; a pull does not touch them.

    Raises:
        LayoutError: a dtype differs from the published one, or the destination holds only a part of
            some tensor, so that its digest can never be compared.
        PlanError: the published weights cannot fill the destination.
    """

    def __init__(
        self, peers: Peers, destination: Layout, rank: int, verify_every: int = 16
    ) -> None:
        self._peers = peers
        self.rank = rank
        self.version: int | None = None
        self._verify_every = verify_every
        here = destination.of_rank(rank)
        held = element_counts(here)
        _check_dtypes(peers.layout, destination, held.keys())
        self.plan = plan(peers.layout, here)
        self._elements = sum(held.values())
        self._buffers = frozenset((buffer.rank, buffer.name) for buffer in here.buffers)
        self.absent = tuple(t.name for t in peers.layout.tensors if t.name not in held)
        if parts := incomplete(destination):
            name, (count, size) = next(iter(parts.items()))
            raise LayoutError(
                f"the destination holds {count} of the {size} elements of '{name}', so its digest "
                "can never be compared; pass the merged layout of all engine ranks"
            )
        # Alone, a rank verifies what it holds whole; together, the ranks verify everything.
        self._parts = tuple(incomplete(here))
        self._alone = [] if self._parts else rounds(here)
        self._together = [each.of_rank(rank) for each in rounds(destination)]

    @property
    def source(self) -> Layout:
        """The merged layout of the publishers' snapshots."""
        return self._peers.layout

    def pull(
        self,
        version: int | None,
        destinations: Buffers,
        combine: Combine | None = None,
        threads: int = 0,
        full: bool = False,
        timeout_seconds: float = 60.0,
    ) -> Pulled:
        """Fills this rank's buffers with ``version`` and compares digests before it returns.

        After any error but VersionError and BufferMismatchError the destination may hold anything:
        do not serve from it until a later pull succeeds.

        Args:
            version: that every publisher must have; None takes the newest that all have.
            destinations: this rank's buffers, by (rank, name); all their bytes are written.
            combine: sums digests over the engine's ranks, needed when tensors are split between
                them. Every rank calls it once per pull unless it fails before; it must have a
                deadline of its own, as a rank that failed never comes.
            threads: 0 means all that the process may use.
            full: pull everything, whatever the destination holds.
            timeout_seconds: for all waits for publishers together.

        Raises:
            VersionError: a publisher has another version. BufferMismatchError: a buffer is missing,
            read-only or has another size. LayoutError: ``combine`` is needed and missing.
            SnapshotError: a publisher was writing, failed, or began to write during the pull.
            DigestError: what landed is not what was published; the tensors are named.
        """
        started = time.perf_counter()
        if combine is None and self._parts:
            raise LayoutError(
                f"rank {self.rank} holds only a part of {_listed(self._parts)}, so their digests "
                "do not compare alone; pass combine, a sum over the engine's ranks"
            )
        if version is None:
            version = min(s.published().version for s in self._peers.snapshots.values())
        published = self._peers.published(version)
        self.version = None
        self.plan.execute(self._peers.snapshots, destinations, threads)
        self._peers.confirm(published)
        copied = time.perf_counter()
        self._digests = np.add.reduce([offer.digests for offer in published], dtype=np.uint64)
        checked = self._verify(version, self._digests, destinations, combine, threads)
        self.version = version
        ended = time.perf_counter()
        return Pulled(
            version=version,
            base=None,
            nbytes=self.plan.nbytes,
            wire_nbytes=self.plan.nbytes,
            full_nbytes=self.plan.nbytes,
            changed=self._elements,
            digests_checked=checked,
            verified_fully=True,
            seconds={"land": copied - started, "verify": ended - copied},
            total_seconds=ended - started,
            touched=self._buffers,
        )

    def verify(self, destinations: Buffers, combine: Combine | None = None) -> int:
        """Digests everything that the destination holds and compares it with ``version``.

        Returns the tensors compared. Raises VersionError when nothing is held, DigestError.
        """
        if self.version is None:
            raise VersionError("the destination holds no version; pull one first")
        return self._verify(self.version, self._digests, destinations, combine, 0)

    def _verify(
        self,
        version: int,
        expected: Digests,
        destinations: Buffers,
        combine: Combine | None,
        threads: int,
    ) -> int:
        """Tensors compared. Raises DigestError."""
        covers = self._alone if combine is None else self._together
        landed = np.stack([digest(cover.layout, destinations, threads) for cover in covers])
        if combine is not None:
            summed = np.asarray(combine(landed.ravel()))
            landed = summed.view(np.uint64).reshape(landed.shape)
        want = dict(zip((t.name for t in self.source.tensors), expected.tolist(), strict=True))
        wrong: set[str] = set()
        for cover, values in zip(covers, landed.tolist(), strict=True):
            have = dict(zip((t.name for t in cover.layout.tensors), values, strict=True))
            wrong.update(name for name in cover.names if have[name] != want[name])
        if wrong:
            raise DigestError(
                f"version {version} at rank {self.rank}: what landed is not what was published in "
                f"{_listed(sorted(wrong))}; do not serve from this destination, publish a new "
                "version and pull it"
            )
        return len({name for cover in covers for name in cover.names})


def _check_dtypes(source: Layout, destination: Layout, held: Collection[str]) -> None:
    published = {tensor.name: tensor.dtype for tensor in source.tensors}
    for tensor in destination.tensors:
        dtype = published.get(tensor.name, tensor.dtype)
        if tensor.name in held and dtype != tensor.dtype:
            raise LayoutError(
                f"tensor '{tensor.name}' is published as {dtype}, the destination holds "
                f"{tensor.dtype}, and digests compare bits; publish with wire dtype "
                f"{tensor.dtype}, or pull into {dtype} and cast afterwards"
            )


def _listed(names: Collection[str], limit: int = 8) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
