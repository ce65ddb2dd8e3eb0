"""The socket: who may connect, what is sent, and what happens to those who do not answer."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import resource
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from worlds import allocate, split, whole

from kimisys.broadcast import Publisher, Snapshot, connect, snapshot_layout, wire
from kimisys.errors import LayoutError, SnapshotError
from kimisys.reshard import Layout

LIVE = split("w", "bfloat16", (4, 4), 0, 2)
SNAPSHOT = snapshot_layout(LIVE)


def publisher(address: Path, rank: int = 0, snapshot: Layout = SNAPSHOT) -> Publisher:
    return Publisher(LIVE, snapshot, rank, address)


def test_socket_is_private_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        with publisher(folder / "a") as one:
            mode = os.lstat(one.address).st_mode
            assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    finally:
        os.umask(before)


def test_close_removes_the_socket_and_can_be_repeated(folder: Path) -> None:
    one = publisher(folder / "a")
    one.close()
    assert not (folder / "a").exists()
    one.close()
    (folder / "a").write_text("someone else's")
    one.close()
    assert (folder / "a").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("kimisys-publisher")]


def test_close_leaves_a_path_that_was_taken_over(folder: Path) -> None:
    one = publisher(folder / "a")
    os.unlink(folder / "a")
    with publisher(folder / "a"):
        one.close()
        assert (folder / "a").exists()


def test_folder_must_be_private(folder: Path) -> None:
    with pytest.raises(SnapshotError, match="No such file"):
        publisher(folder / "missing" / "a")
    (folder / "file").touch()
    with pytest.raises(SnapshotError, match="not a folder"):
        publisher(folder / "file" / "a")
    for mode in (0o777, 0o1777, 0o770):
        os.chmod(folder, mode)
        with pytest.raises(SnapshotError, match="others could replace the socket"):
            publisher(folder / "a")


def test_addresses_in_use_are_refused_and_stale_ones_replaced(folder: Path) -> None:
    with publisher(folder / "a"):
        with pytest.raises(SnapshotError, match="another publisher listens"):
            publisher(folder / "a")
        connect_both(folder)
    (folder / "b").touch()
    with pytest.raises(SnapshotError, match="not a socket"):
        publisher(folder / "b")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(folder / "c"))
    with publisher(folder / "c"), publisher(folder / "d", 1):
        connect([folder / "c", folder / "d"]).close()
    with pytest.raises(SnapshotError, match="more than 107 bytes"):
        publisher(folder / ("x" * 120))


def connect_both(folder: Path) -> None:
    """Rank 0 is at a."""
    with publisher(folder / "second", 1) as other, connect([folder / "a", other.address]) as peers:
        assert peers.layout == SNAPSHOT


def test_only_our_user_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.check_uid(os.geteuid(), "we")
    with pytest.raises(SnapshotError, match=f"we runs as user {os.geteuid() + 1}"):
        wire.check_uid(os.geteuid() + 1, "we")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert wire.peer_uid(ours) == os.geteuid()

    with publisher(folder / "a"):
        uid = wire.peer_uid

        def stranger_at_the_server(connection: socket.socket) -> int:
            served = threading.current_thread() is not threading.main_thread()
            return uid(connection) + served

        monkeypatch.setattr(wire, "peer_uid", stranger_at_the_server)
        with pytest.raises(SnapshotError, match="closed the connection"):
            connect([folder / "a"])
        monkeypatch.setattr(wire, "peer_uid", lambda connection: uid(connection) + 1)
        with pytest.raises(SnapshotError, match="the publisher runs as user"):
            connect([folder / "a"])
        monkeypatch.undo()
        connect_both(folder)  # the server goes on


@contextlib.contextmanager
def fake(address: Path, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """A listener that answers one client by ``answer`` and keeps the connection open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(1)
        listener.settimeout(10)
        done = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    answer(connection)
                    done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(20)


def manifest(**changes: object) -> bytes:
    fields = json.loads(wire.Manifest(0, SNAPSHOT.of_rank(0), (0, 1), "f").encode())
    return json.dumps(fields | changes).encode()


def trickle(connection: socket.socket) -> None:
    """A manifest that comes byte by byte and does not end before the other side hangs up."""
    sends(b"", length=1 << 30)(connection)
    while True:
        connection.sendall(b" ")


def sends(payload: bytes, length: int | None = None, nbytes: int = 16, digests: int = 1):
    def answer(connection: socket.socket) -> None:
        memory = Snapshot.create(nbytes, digests)
        head = struct.pack("<Q", len(payload) if length is None else length)
        socket.send_fds(connection, [head], [memory.fileno()])
        connection.sendall(payload)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        lambda connection: None,
        sends(b"{", length=9),
        lambda c: c.sendall(b"\0\0\0"),
        lambda connection: trickle(connection),
    ],
    ids=["nothing", "half a manifest", "half a length", "a trickle"],
)
def test_silent_peers_hit_the_deadline_and_are_named(
    folder: Path, answer: Callable[[socket.socket], None]
) -> None:
    with (
        fake(folder / "silent", answer),
        pytest.raises(SnapshotError, match=r"silent did not answer within 0\.2 s"),
    ):
        connect([folder / "silent"], timeout_seconds=0.2)


def test_a_peer_that_never_accepts_hits_the_deadline(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "full"))
        listener.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):  # fill the backlog
                client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.setblocking(False)
                client.connect_ex(str(folder / "full"))
            with pytest.raises(SnapshotError, match=r"full did not answer within 0\.2 s"):
                connect([folder / "full"], timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c: c.sendall(struct.pack("<Q", 2) + b"{}"), "sent no descriptor"),
        (lambda c: c.shutdown(socket.SHUT_RDWR), "closed the connection"),
        (sends(b"", length=1 << 40), "announced a manifest"),
        (sends(b"not json"), "malformed"),
        (sends(b"\xff\xfe"), "malformed"),
        (sends(b"[" * 100000), "malformed"),
        (sends(b"7"), "malformed"),
        (sends(b"{}"), "malformed"),
        (sends(manifest(protocol=2)), "speaks protocol 2"),
        (sends(manifest(rank="0")), "malformed"),
        (sends(manifest(ranks=[0, None])), "malformed"),
        (sends(manifest(fingerprint=1)), "malformed"),
        (sends(manifest(layout={})), "malformed"),
        (sends(manifest(), nbytes=17), "describes the buffers"),
        (sends(manifest(), digests=2), "2 digests for 1 tensors"),
    ],
)
def test_malformed_answers_are_refused_and_named(
    folder: Path, answer: Callable[[socket.socket], None], message: str
) -> None:
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    with fake(folder / "odd", answer), pytest.raises(SnapshotError, match=f"odd.*{message}"):
        connect([folder / "odd"], timeout_seconds=5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_that_is_no_snapshot_is_refused(folder: Path) -> None:
    def answer(connection: socket.socket) -> None:
        with open(os.devnull) as file:
            head = struct.pack("<Q", len(manifest()))
            socket.send_fds(connection, [head], [file.fileno()])
        connection.sendall(manifest())

    with fake(folder / "a", answer), pytest.raises(SnapshotError, match=r"/a: .*sealed size"):
        connect([folder / "a"], timeout_seconds=5)


def test_publishers_that_do_not_belong_together_are_refused(folder: Path) -> None:
    with pytest.raises(SnapshotError, match=r"nobody: No such file"):
        connect([folder / "nobody"])
    with pytest.raises(LayoutError, match="no publisher"):
        connect([])
    other = snapshot_layout(whole("w", "bfloat16", (4, 4), 2))
    with (
        publisher(folder / "a"),
        publisher(folder / "a2"),
        Publisher(whole("w", "bfloat16", (4, 4), 2), other, 1, folder / "b"),
    ):
        with pytest.raises(LayoutError, match=r"trainer ranks \[0\], but ranks \[0, 1\]"):
            connect([folder / "a"])
        with pytest.raises(LayoutError, match=r"a and .*a2 both publish trainer rank 0"):
            connect([folder / "a", folder / "a2"])
        with pytest.raises(LayoutError, match="do not agree on one snapshot layout"):
            connect([folder / "a", folder / "b"])


def test_ranks_may_merge_in_any_order(folder: Path) -> None:
    turned = Layout.merge([SNAPSHOT.of_rank(1), SNAPSHOT.of_rank(0)])
    assert wire.fingerprint(turned) == wire.fingerprint(SNAPSHOT)
    with (
        publisher(folder / "a", 0, turned),
        publisher(folder / "b", 1),
        connect([folder / "b", folder / "a"]) as peers,
    ):
        assert peers.ranks == (1, 0)


def test_a_failed_server_is_reported_at_the_next_publish(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: wire.Server, connection: socket.socket) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(wire.Server, "_answer", broken)
    live = allocate(LIVE.of_rank(0), 1)
    for at_the_end in (False, True):
        one = publisher(folder / "a")
        with pytest.raises(SnapshotError):
            connect([folder / "a"], timeout_seconds=5)
        for thread in threading.enumerate():
            if thread.name.startswith("kimisys-publisher"):
                thread.join(5)
        if not at_the_end:
            with pytest.raises(SnapshotError, match="no room"):
                one.publish(1, live)
            one.close()
        else:
            with pytest.raises(SnapshotError, match="no room"):
                one.close()
        assert not (folder / "a").exists()


def test_a_client_that_goes_away_does_not_end_the_server(folder: Path) -> None:
    with publisher(folder / "a"):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(folder / "a"))
        connect_both(folder)


def client(address: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect(str(address))
    return connection


def test_a_client_that_reads_a_trickle_is_cut_off_and_the_next_one_served(folder: Path) -> None:
    payload = bytes(16 << 20)
    with open(os.devnull) as file:
        server = wire.Server(folder / "a", payload, file.fileno(), timeout_seconds=0.2)
        with client(server.address) as slow, client(server.address) as waiting:
            received = 0
            while slow.recv(1):
                received += 1
            assert received < len(payload)
            assert waiting.recv(8) == struct.pack("<Q", len(payload))
        server.close()


def test_data_that_keeps_coming_does_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte per read and one second per look at the clock: the data outlasts the deadline."""
    clock = itertools.count()
    monkeypatch.setattr(wire, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for _ in range(20):
            theirs.send(b".")
        with pytest.raises(TimeoutError, match="not done within 10 s"):
            wire._receive(ours, 100, wire.Deadline(10))
        assert ours.recv(1) == b"."  # not all of it was waited for


def test_a_lack_of_descriptors_is_reported_and_passes(folder: Path) -> None:
    live = allocate(LIVE.of_rank(0), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with publisher(folder / "a") as one:
        waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        waiting.settimeout(20)
        with waiting:
            lowest = os.dup(waiting.fileno())
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                waiting.connect(str(folder / "a"))
                with pytest.raises(SnapshotError, match=r"Too many open files.*it tries on"):
                    for version in range(1000):
                        one.publish(version, live)
                        threading.Event().wait(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(waiting.recv(8)) == 8
        one.publish(1000, live)
        connect_both(folder)


def test_a_rank_without_a_snapshot_buffer_is_refused(folder: Path) -> None:
    with pytest.raises(LayoutError, match="exactly 'snapshot'"):
        Publisher(LIVE, LIVE, 0, folder / "a")
    assert not (folder / "a").exists()
