"""The publishers as a subscriber sees them: their memories and their merged layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kimisys._core.broadcast import Parts, Snapshot
from kimisys.broadcast.layout import SNAPSHOT_BUFFER
from kimisys.broadcast.remote import Remote
from kimisys.broadcast.transport import Memory, Meter, SharedMemory
from kimisys.broadcast.wire import Deadline, Manifest, fetch, fingerprint
from kimisys.errors import LayoutError, SnapshotError
from kimisys.reshard import Layout


@dataclass(frozen=True)
class Found:
    """A publisher as a transport found it."""

    address: Path
    manifest: Manifest
    memory: Memory

    @property
    def who(self) -> str:
        """Names it in errors."""
        return f"publisher {self.address} (trainer rank {self.manifest.rank})"

    def remote(self, memory: Memory, deadline: Deadline) -> Remote:
        """The reader's side of a memory, this one's or one around it."""
        return Remote(memory, self.who, deadline)


class Peers:
    """The memories of all publishers; made by ``connect``, or by the ``connect`` of another
    transport.

    Attributes:
        addresses: of the publishers, in the order given.
        layout: the merged layout of their snapshots: the source of plans, and its tensor table is
            what the destination's layout is built for.

    Raises:
        SnapshotError: a memory is not what its manifest says; the publisher is named.
        LayoutError: the publishers are not the ranks of one snapshot layout.
    """

    def __init__(self, found: Sequence[Found], deadline: Deadline) -> None:
        if not found:
            raise LayoutError("no publisher to connect to; pass the address of every trainer rank")
        self.addresses = tuple(each.address for each in found)
        self.ranks = tuple(each.manifest.rank for each in found)
        self._found = tuple(found)
        for each in found:
            _check_memory(each, each.remote(each.memory, deadline).parts)
        manifests = [each.manifest for each in found]
        _check_complete(self.addresses, manifests)
        self.layout = Layout.merge([manifest.layout for manifest in manifests])
        if any(fingerprint(self.layout) != manifest.fingerprint for manifest in manifests):
            raise LayoutError(
                "the publishers do not agree on one snapshot layout; give every Publisher the same "
                "merged layout of all ranks"
            )

    def remotes(self, deadline: Deadline) -> dict[int, tuple[Remote, Meter]]:
        """A reader's own view of each publisher, by trainer rank, and what counts its reads.

        Raises SnapshotError when a memory cannot be read, or is no longer what its manifest says.
        """
        made: dict[int, tuple[Remote, Meter]] = {}
        for each in self._found:
            meter = Meter(each.memory)
            remote = each.remote(meter, deadline)
            _check_memory(each, remote.parts)  # read anew, so checked anew
            made[each.manifest.rank] = remote, meter
        return made

    def close(self) -> None:
        """Lets go of the memories. Idempotent."""
        for each in self._found:
            each.memory.close()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(addresses: Sequence[Path | str], timeout_seconds: float = 30.0) -> Peers:
    """Maps the snapshots of all publishers.

    Args:
        addresses: the socket of every publisher: of all ranks, in any order.
        timeout_seconds: for all of them together.

    Raises:
        SnapshotError: a publisher is not there, does not answer in time, runs under another user,
            or what it sent is malformed; it is named.
        LayoutError: the publishers are not the ranks of one snapshot layout.
    """
    deadline = Deadline(timeout_seconds)
    found: list[Found] = []
    try:
        for path in map(Path, addresses):
            manifest, descriptor = fetch(path, deadline)
            try:
                found.append(Found(path, manifest, SharedMemory(_open(path, descriptor))))
            finally:
                os.close(descriptor)
        return Peers(found, deadline)
    except BaseException:
        for each in found:
            each.memory.close()
        raise


def _open(path: Path, descriptor: int) -> Snapshot:
    try:
        return Snapshot.open(descriptor)
    except SnapshotError as error:
        raise SnapshotError(f"publisher {path}: {error}") from error


def _check_memory(found: Found, parts: Parts) -> None:
    manifest = found.manifest
    buffers = [(buffer.rank, buffer.name, buffer.nbytes) for buffer in manifest.layout.buffers]
    if buffers != [(manifest.rank, SNAPSHOT_BUFFER, parts.data_nbytes)]:
        raise SnapshotError(
            f"{found.who} describes the buffers {buffers}, but its memory is "
            f"{(manifest.rank, SNAPSHOT_BUFFER, parts.data_nbytes)}"
        )
    if parts.digest_count != len(manifest.layout.tensors):
        raise SnapshotError(
            f"{found.who} has {parts.digest_count} digests for "
            f"{len(manifest.layout.tensors)} tensors"
        )


def _check_complete(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    owners: dict[int, Path] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.rank in owners:
            raise LayoutError(
                f"{owners[manifest.rank]} and {path} both publish trainer rank {manifest.rank}; "
                "pass one address per rank"
            )
        owners[manifest.rank] = path
    expected = {rank for manifest in manifests for rank in manifest.ranks}
    if set(owners) != expected:
        raise LayoutError(
            f"connected to trainer ranks {sorted(owners)}, but ranks {sorted(expected)} publish "
            "together; pass the addresses of all of them"
        )
