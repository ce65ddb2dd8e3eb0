"""A publisher that dies in the middle of a publish: the log is still read, the data is refused."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import tempfile
from collections.abc import Callable

import numpy as np
import pytest

from kimisys._core.broadcast import PublisherCore, Snapshot
from kimisys.broadcast.remote import Remote
from kimisys.broadcast.transport import Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor

SMALL = 512  # elements of the tensor that every version fills with its number
LARGE = 1 << 24  # elements of the tensor that keeps a publish busy
NBYTES = 2 * (SMALL + LARGE)


def layout(buffer: str) -> Layout:
    tensors = [Tensor("a", "bfloat16", (SMALL,)), Tensor("b", "bfloat16", (LARGE,))]
    fragments = [
        Fragment("a", Region((0,), (SMALL,)), 0, buffer, 0, (2,)),
        Fragment("b", Region((0,), (LARGE,)), 0, buffer, 2 * SMALL, (2,)),
    ]
    return Layout(tensors, [Buffer(0, buffer, NBYTES)], fragments)


class Mapped:
    """The memory of a publisher, mapped by this process."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.nbytes = snapshot.parts.nbytes

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        self._snapshot.read(ranges, into)

    def mapped(self) -> memoryview | None:
        return memoryview(self._snapshot.mapped())

    def close(self) -> None:
        pass


def in_child(work: Callable[[], None]) -> int:
    """The process that does it."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        work()
    os._exit(3)


def publish_on(memory: Snapshot, live: np.ndarray, until: int | None = None) -> int:
    """Publishes versions from 1 on; returns the next."""
    core = PublisherCore(layout("live"), layout("snapshot"), layout("snapshot"), memory)
    version = 1
    while until is None or version <= until:
        live[:SMALL] = version
        core.publish(version, {(0, "live"): live}, threads=2)
        version += 1
    return version


def check_what_is_left(snapshot: Snapshot) -> None:
    """The log leads to its last version; data and digests are refused by name."""
    remote = Remote(Mapped(Snapshot.open(snapshot.fileno())), "publisher p (rank 0)", Deadline(9))
    deadline = Deadline(9)
    assert remote.state(deadline).writing
    newest = remote.newest(deadline)
    assert newest is not None and newest > 3
    chain = remote.chain(newest - 2, newest, deadline)
    assert chain is not None
    assert [(e.record.base, e.record.version) for e in chain] == [
        (newest - 2, newest - 1),
        (newest - 1, newest),
    ]
    for entry in chain:
        assert entry.record.changed == SMALL
        staged = remote.stage(entry, np.array([[0, 2 * SMALL]]), deadline)
        assert staged is not None
        assert set(staged.view(np.uint16).tolist()) == {entry.record.version % 65536}
    with pytest.raises(SnapshotError, match=r"publisher p \(rank 0\).*failed or died"):
        remote.settled(Deadline(0.02))
    with pytest.raises(SnapshotError, match="failed or died"):
        Snapshot.open(snapshot.fileno()).published()


def test_a_publisher_killed_while_it_writes() -> None:
    for _ in range(20):
        snapshot = Snapshot.create(NBYTES, 2, 1 << 20)
        remote = Remote(Mapped(snapshot), "it", Deadline(60))
        live = np.zeros(NBYTES // 2, np.uint16)
        child = in_child(lambda memory=snapshot, live=live: publish_on(memory, live))
        try:
            deadline = Deadline(60)
            while (remote.newest(deadline) or 0) < 5 or not remote.state(deadline).writing:
                deadline.remaining()
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        if remote.state(deadline).writing:  # it may just have committed
            check_what_is_left(snapshot)
            return
    pytest.fail("no publisher was caught while it wrote")


def test_a_publisher_that_crashes_half_way() -> None:
    """Half of the live weights are gone when they are read: a bus error in mid-publish."""
    snapshot = Snapshot.create(NBYTES, 2, 1 << 20)
    with tempfile.TemporaryFile() as file:
        file.truncate(NBYTES)

        def work() -> None:
            live = np.frombuffer(mmap.mmap(file.fileno(), NBYTES), np.uint16)
            core = PublisherCore(layout("live"), layout("snapshot"), layout("snapshot"), snapshot)
            for version in range(1, 6):
                live[:SMALL] = version
                if version == 5:
                    file.truncate(NBYTES // 2)
                core.publish(version, {(0, "live"): live}, threads=2)

        _, status = os.waitpid(in_child(work), 0)
    assert os.WTERMSIG(status) == signal.SIGBUS
    check_what_is_left(snapshot)
