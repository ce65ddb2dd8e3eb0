"""The publishers as a subscriber sees them: their shared memory and their merged layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from kimisys._core.broadcast import Published, Snapshot
from kimisys.broadcast.layout import SNAPSHOT_BUFFER
from kimisys.broadcast.wire import Deadline, Manifest, fetch, fingerprint
from kimisys.errors import LayoutError, SnapshotError, VersionError
from kimisys.reshard import Layout


class Peers:
    """The mapped snapshots of all publishers; made by ``connect``.

    Attributes:
        addresses: of the publishers, in the order given.
        layout: the merged layout of their snapshots: the source of plans, and its tensor table is
            what the destination's layout is built for.
    """

    def __init__(
        self,
        addresses: Sequence[Path],
        ranks: Sequence[int],
        layout: Layout,
        snapshots: Sequence[Snapshot],
    ) -> None:
        self.addresses = tuple(addresses)
        self.ranks = tuple(ranks)
        self.layout = layout
        self._snapshots = tuple(snapshots)
        self._closed = False

    @property
    def snapshots(self) -> dict[tuple[int, str], Snapshot]:
        """By (trainer rank, "snapshot"): the source buffers of a plan."""
        if self._closed:
            raise SnapshotError("these peers were closed; connect again")
        pairs = zip(self.ranks, self._snapshots, strict=True)
        return {(rank, SNAPSHOT_BUFFER): snapshot for rank, snapshot in pairs}

    def published(self, version: int) -> list[Published]:
        """What each publisher offers now, ready for ``confirm``.

        Raises:
            VersionError: a publisher is at another version, or has none.
            SnapshotError: a publisher is writing, or failed or died while writing.
            Both name the publisher.
        """
        found: list[Published] = []
        for index, snapshot in enumerate(self.snapshots.values()):
            with self._named(index):
                offer = snapshot.published()
                if offer.version != version:
                    raise VersionError(
                        f"it has version {offer.version}, asked was {version}; publish {version} "
                        "on every rank before the pull, or pull what is published"
                    )
            found.append(offer)
        return found

    def confirm(self, published: Sequence[Published]) -> None:
        """Raises SnapshotError if a publisher began to write after ``published``."""
        pairs = zip(self.snapshots.values(), published, strict=True)
        for index, (snapshot, offer) in enumerate(pairs):
            with self._named(index):
                snapshot.confirm(offer)

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except (SnapshotError, VersionError) as error:
            who = f"publisher {self.addresses[index]} (trainer rank {self.ranks[index]})"
            raise type(error)(f"{who}: {error}") from error

    def close(self) -> None:
        """Lets go of the shared memory. Idempotent."""
        self._closed = True
        self._snapshots = ()

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
    paths = [Path(address) for address in addresses]
    if not paths:
        raise LayoutError("no publisher to connect to; pass the address of every trainer rank")
    deadline = Deadline(timeout_seconds)
    manifests: list[Manifest] = []
    snapshots: list[Snapshot] = []
    for path in paths:
        manifest, descriptor = fetch(path, deadline)
        try:
            snapshots.append(_mapped(path, manifest, descriptor))
        finally:
            os.close(descriptor)
        manifests.append(manifest)
    _check_complete(paths, manifests)
    layout = Layout.merge([manifest.layout for manifest in manifests])
    if any(fingerprint(layout) != manifest.fingerprint for manifest in manifests):
        raise LayoutError(
            "the publishers do not agree on one snapshot layout; give every Publisher the same "
            "merged layout of all ranks"
        )
    return Peers(paths, [manifest.rank for manifest in manifests], layout, snapshots)


def _mapped(path: Path, manifest: Manifest, descriptor: int) -> Snapshot:
    """The snapshot behind a publisher's descriptor, if it is what the manifest says."""
    try:
        snapshot = Snapshot.open(descriptor)
    except SnapshotError as error:
        raise SnapshotError(f"publisher {path}: {error}") from error
    buffers = [(buffer.rank, buffer.name, buffer.nbytes) for buffer in manifest.layout.buffers]
    if buffers != [(manifest.rank, SNAPSHOT_BUFFER, snapshot.nbytes)]:
        raise SnapshotError(
            f"publisher {path} describes the buffers {buffers}, but its memory is "
            f"{(manifest.rank, SNAPSHOT_BUFFER, snapshot.nbytes)}"
        )
    if snapshot.digest_count != len(manifest.layout.tensors):
        raise SnapshotError(
            f"publisher {path} has {snapshot.digest_count} digests for "
            f"{len(manifest.layout.tensors)} tensors"
        )
    return snapshot


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
