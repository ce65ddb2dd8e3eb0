"""A trainer rank's side: publish its shards, and what changed in them, in shared memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kimisys._core.broadcast import PublisherCore, Snapshot
from kimisys.broadcast.layout import SNAPSHOT_BUFFER
from kimisys.broadcast.version import checked_version
from kimisys.broadcast.wire import Manifest, Server, fingerprint
from kimisys.errors import LayoutError
from kimisys.reshard import Layout, plan

_LOG_NBYTES = 1 << 20
"""The least log that a publisher makes of its own accord."""

Buffers = Mapping[tuple[int, str], Any]
"""(rank, buffer name) to any C-contiguous buffer of the layout's size."""


@dataclass(frozen=True)
class Publication:
    """What one publish did.

    Attributes:
        version: that can be pulled now.
        base: the version that its delta changes; None when it was published whole.
        elements: that this rank publishes.
        changed: of these, how many have other bits than in ``base``; all when ``base`` is None.
        nbytes: of the elements, in the wire dtype.
        delta_nbytes: of the record in the log; 0 when ``base`` is None.
        reference_nbytes: of the blocks that the record leaves to be read from the snapshot.
        seconds: of wall time.
    """

    version: int
    base: int | None
    elements: int
    changed: int
    nbytes: int
    delta_nbytes: int
    reference_nbytes: int
    seconds: float

    @property
    def density(self) -> float:
        """Changed elements over all; 0 for a rank without elements."""
        return self.changed / self.elements if self.elements else 0.0


class Publisher:
    """Publishes one rank's part of the live model, version after version, into shared memory.

    Args:
        live: where the live model's fragments are; only ``rank``'s part is used.
        snapshot: where they are published, for ALL ranks that publish (see ``snapshot_layout`` and
            ``Layout.merge``), so that the ranks agree on who counts which replica.
        rank: this rank.
        address: path of the unix socket at which subscribers get the shared memory. Its folder must
            exist and be writable by its owner alone; the file gets mode 0600 and is removed by
            ``close``.
        timeout_seconds: the longest that one subscriber may keep the server busy.
        log_nbytes: of the log of recent versions; None takes half of the snapshot.

    Raises:
        LayoutError: the rank has no snapshot buffer. PlanError: the snapshot cannot be filled from
            the live layout. SnapshotError: no shared memory, or the address cannot be used.
    """

    def __init__(
        self,
        live: Layout,
        snapshot: Layout,
        rank: int,
        address: Path | str,
        timeout_seconds: float = 10.0,
        log_nbytes: int | None = None,
    ) -> None:
        self.rank = rank
        self.layout = snapshot.of_rank(rank)
        names = [buffer.name for buffer in self.layout.buffers]
        if names != [SNAPSHOT_BUFFER]:
            raise LayoutError(
                f"rank {rank} of the snapshot layout has the buffers {names}, a publisher needs "
                f"exactly '{SNAPSHOT_BUFFER}'; make it with snapshot_layout from all live layouts"
            )
        here = live.of_rank(rank)
        plan(here, self.layout)  # proves that the live layout fills the snapshot
        nbytes = self.layout.buffers[0].nbytes
        log = max(nbytes // 2, _LOG_NBYTES) if log_nbytes is None else log_nbytes
        self._snapshot = Snapshot.create(nbytes, len(self.layout.tensors), log)
        counted = snapshot.cover().of_rank(rank)
        self._core = PublisherCore(here, self.layout, counted, self._snapshot)
        self._version: int | None = None
        self.manifest = Manifest(rank, self.layout, tuple(snapshot.ranks), fingerprint(snapshot))
        self._server = Server(
            Path(address), self.manifest.encode(), self._snapshot.fileno(), timeout_seconds
        )

    @property
    def address(self) -> Path:
        return self._server.address

    @property
    def version(self) -> int | None:
        """The last version published; None before the first."""
        return self._version

    def mapped(self) -> npt.NDArray[np.uint8]:
        """All of the shared memory, uint8, read-only: header, digests, log and data."""
        return self._snapshot.mapped()

    @property
    def memory(self) -> memoryview:
        """The snapshot's data, uint8[nbytes], writable. Only tests of corruption write here."""
        return memoryview(self._snapshot)

    def publish(
        self, version: int, buffers: Buffers, threads: int = 0, full: bool = False
    ) -> Publication:
        """Makes the live weights ``version``: writes what changed into the snapshot and the log.

        The caller keeps the live weights still meanwhile. Readers go on: the log of the versions
        before stays readable, and a full pull that was overtaken is healed by it. If this fails
        half-way, the snapshot stays unreadable until a later publish, which is full, succeeds; if
        the arguments are wrong, the last version stays as it was. The first publish is full too.

        Args:
            version: above the last one, at least 0.
            buffers: the live buffers of this rank, by (rank, name).
            threads: 0 means all that the process may use.
            full: publish it whole, without a delta.

        Raises:
            VersionError: ``version`` does not increase. BufferMismatchError: a live buffer is
            missing or has another size. LayoutError: ``threads`` is negative. TypeError: an
            argument has the wrong type. SnapshotError: the server thread has failed.
        """
        started = time.perf_counter()
        self._server.check()
        done = self._core.publish(checked_version(version), dict(buffers), full, threads)
        self._version = done.version
        return Publication(
            version=done.version,
            base=done.base,
            elements=done.elements,
            changed=done.changed,
            nbytes=done.nbytes,
            delta_nbytes=done.record_nbytes,
            reference_nbytes=done.referred_nbytes,
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Stops serving and removes the socket. Idempotent. Peers that have mapped the memory keep
        it; it goes when the last of them goes. Raises SnapshotError if the server had failed."""
        self._server.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
