"""How a subscriber gets a publisher's shared memory: one unix socket, one message, one descriptor.

A publisher listens on a socket file of mode 0600. Whoever connects and runs under the same user
gets eight bytes of length (little endian) with the snapshot's descriptor attached (SCM_RIGHTS),
then a JSON manifest of that length. Nothing is read from the client. Versions and digests are not
in the message: they are in the shared memory, where they change with every publish.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import selectors
import socket
import stat
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.errors import LayoutError, SnapshotError
from kimisys.reshard import Layout

PROTOCOL = 1
_LENGTH = struct.Struct("<Q")
_MANIFEST_LIMIT = 1 << 30  # bytes; a layout of a million fragments has about 2^28
_PATH_LIMIT = 107  # bytes of sockaddr_un.sun_path, less the final zero
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ACCEPT_PAUSE = 0.05  # seconds until a failed accept is tried again

_log = logging.getLogger(__name__)


class Deadline:
    """A moment that a sequence of waits may not pass."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, more than 0. Raises TimeoutError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done within {self.seconds:g} s")
        return left


def fingerprint(layout: Layout) -> str:
    """A name for a layout that does not depend on the order in which its ranks were merged."""
    ordered = Layout.merge([layout.of_rank(rank) for rank in sorted(layout.ranks)])
    return hashlib.sha256(ordered.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a publisher says about its snapshot.

    Attributes:
        rank: the trainer rank.
        layout: that rank's part of the snapshot layout.
        ranks: all trainer ranks that publish; their parts of the cover make up each digest.
        fingerprint: of the snapshot layout of all ranks.
    """

    rank: int
    layout: Layout
    ranks: tuple[int, ...]
    fingerprint: str

    def encode(self) -> bytes:
        return json.dumps(
            {
                "protocol": PROTOCOL,
                "rank": self.rank,
                "ranks": list(self.ranks),
                "fingerprint": self.fingerprint,
                "layout": json.loads(self.layout.to_json()),
            }
        ).encode()

    @staticmethod
    def decode(text: bytes) -> Manifest:
        """Raises SnapshotError for anything but a manifest of our protocol."""
        try:
            fields: Any = json.loads(text)
            if fields["protocol"] != PROTOCOL:
                raise SnapshotError(
                    f"the publisher speaks protocol {fields['protocol']}, this side {PROTOCOL}; "
                    "install the same kimisys on both sides"
                )
            rank, ranks, name = fields["rank"], fields["ranks"], fields["fingerprint"]
            if type(rank) is not int or type(name) is not str or type(ranks) is not list:
                raise TypeError("a field has the wrong type")
            if not all(type(r) is int for r in ranks):
                raise TypeError("a rank is not an integer")
            layout = Layout.from_json(json.dumps(fields["layout"]))
        except (ValueError, KeyError, TypeError, RecursionError, LayoutError) as error:
            raise SnapshotError(f"the publisher's manifest is malformed: {error!r}") from error
        return Manifest(rank, layout, tuple(ranks), name)


def peer_uid(connection: socket.socket) -> int:
    """The user under which the other end of a unix socket runs, as the kernel knows it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(raw)[1])


def check_uid(uid: int, who: str) -> None:
    """Raises SnapshotError unless ``uid`` is the user of this process."""
    if uid != os.geteuid():
        raise SnapshotError(
            f"{who} runs as user {uid}, this process as user {os.geteuid()}; weights are handed "
            "only to the same user: run both sides under one account"
        )


def fetch(address: Path, deadline: Deadline) -> tuple[Manifest, int]:
    """Asks the publisher at ``address`` for its manifest and a descriptor, which the caller closes.

    Raises:
        SnapshotError: nobody listens there, it did not answer before the deadline, it is another
            user's, or its answer is malformed. The address is named.
    """
    descriptors: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _connect(connection, address, deadline)
            check_uid(peer_uid(connection), "the publisher")
            connection.settimeout(deadline.remaining())
            head, descriptors, _, _ = socket.recv_fds(
                connection, _LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC
            )
            head += _receive(connection, _LENGTH.size - len(head), deadline)
            if len(descriptors) != 1:
                raise SnapshotError("the publisher sent no descriptor")
            (length,) = _LENGTH.unpack(head)
            if length > _MANIFEST_LIMIT:
                raise SnapshotError(f"the publisher announced a manifest of {length} bytes")
            manifest = Manifest.decode(_receive(connection, length, deadline))
            return manifest, descriptors.pop()
    except TimeoutError as error:
        raise SnapshotError(
            f"publisher {address} did not answer within {deadline.seconds:g} s; is its process "
            "alive and not stopped?"
        ) from error
    except OSError as error:
        raise SnapshotError(
            f"cannot reach publisher {address}: {error.strerror or error}; start the publisher "
            "first, and pass its address"
        ) from error
    except SnapshotError as error:
        raise SnapshotError(f"publisher {address}: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _connect(connection: socket.socket, address: Path, deadline: Deadline) -> None:
    while True:
        connection.settimeout(deadline.remaining())
        try:
            return connection.connect(os.fspath(address))
        except BlockingIOError:  # the listener's backlog is full
            time.sleep(min(0.01, deadline.remaining()))


def _receive(connection: socket.socket, count: int, deadline: Deadline) -> bytes:
    received = bytearray()
    while len(received) < count:
        connection.settimeout(deadline.remaining())
        chunk = connection.recv(min(count - len(received), 1 << 20))
        if not chunk:
            raise SnapshotError("it closed the connection before its answer was complete")
        received += chunk
    return bytes(received)


class Server:
    """Hands one payload and one descriptor to everyone of our user who connects.

    What keeps the thread from accepting subscribers is raised by the next ``check`` or ``close``.
    It ends the thread unless it may pass, like a lack of descriptors: then the thread tries on, and
    forgets the error when it has accepted the next subscriber.
    """

    def __init__(
        self, address: Path, payload: bytes, descriptor: int, timeout_seconds: float
    ) -> None:
        self.address = address
        self._payload = payload
        self._descriptor = descriptor
        self._timeout_seconds = timeout_seconds
        self._error: BaseException | None = None
        self._closed = False
        self._listener, self._inode = _listen(address)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(
            target=self._run, name=f"kimisys-publisher {address}", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raises SnapshotError, once, if the thread met an error."""
        error, self._error = self._error, None
        if error is None:
            return
        if self._thread.is_alive() and not self._closed:
            remedy = "it tries on: mend the cause and publish again"
        else:
            remedy = "close this publisher and make a new one"
        raise SnapshotError(
            f"the publisher's server at {self.address} failed: {error!r}; subscribers cannot "
            f"connect: {remedy}"
        ) from error

    def close(self) -> None:
        """Ends the thread and removes the socket file. Idempotent; raises what ``check`` raises."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(BrokenPipeError):  # the thread has already ended
                self._wake.send(b"\0")
            self._thread.join(self._timeout_seconds + 1.0)
            if self._thread.is_alive():
                self._error = TimeoutError("the server thread did not end")
            self._wake.close()
            self._listener.close()
            with contextlib.suppress(OSError):
                if os.lstat(self.address).st_ino == self._inode:
                    os.unlink(self.address)
        self.check()

    def _run(self) -> None:
        try:
            # poll, as epoll would need a descriptor, and these may run out.
            with selectors.PollSelector() as selector, self._woken:
                selector.register(self._listener, selectors.EVENT_READ)
                selector.register(self._woken, selectors.EVENT_READ)
                while True:
                    ready = {key.fileobj for key, _ in selector.select()}
                    if self._woken in ready:
                        return
                    try:
                        connection, _ = self._listener.accept()
                    except OSError as error:
                        # Never the close, which asks by self._woken: it may pass (EMFILE, ENOMEM).
                        self._error = error
                        time.sleep(_ACCEPT_PAUSE)
                        continue
                    self._error = None
                    with connection:
                        self._answer(connection)
        except BaseException as error:
            self._error = error

    def _answer(self, connection: socket.socket) -> None:
        """A client's fault ends its connection, not the server."""
        deadline = Deadline(self._timeout_seconds)
        try:
            check_uid(peer_uid(connection), "the subscriber")
            connection.settimeout(deadline.remaining())
            sent = socket.send_fds(
                connection, [_LENGTH.pack(len(self._payload))], [self._descriptor]
            )
            rest = memoryview(_LENGTH.pack(len(self._payload))[sent:] + self._payload)
            while rest:
                connection.settimeout(deadline.remaining())
                rest = rest[connection.send(rest) :]
        except (OSError, SnapshotError) as error:
            _log.warning("%s: a subscriber was not served: %s", self.address, error)


def _listen(address: Path) -> tuple[socket.socket, int]:
    """A listening socket and the inode of its file. Raises SnapshotError naming the address."""
    if len(os.fsencode(address)) > _PATH_LIMIT:
        raise SnapshotError(
            f"socket path {address} has more than {_PATH_LIMIT} bytes; use a shorter folder"
        )
    _check_parent(address.parent)
    _remove_stale(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the file takes the mode of the unbound socket: it is never open to others, and
        # the umask, which belongs to all threads of the process, need not be touched.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(os.fspath(address))
        listener.listen(128)
        listener.setblocking(True)
        return listener, os.lstat(address).st_ino
    except OSError as error:
        listener.close()
        raise SnapshotError(f"cannot listen at {address}: {error.strerror}") from error


def _check_parent(folder: Path) -> None:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise SnapshotError(
            f"the folder {folder} of the socket: {error.strerror}; create it with mode 0700"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise SnapshotError(f"{folder}, which should hold the socket, is not a folder")
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise SnapshotError(
            f"the folder {folder} of the socket has mode {stat.S_IMODE(status.st_mode):04o} and "
            f"belongs to user {status.st_uid}: others could replace the socket; use a folder of "
            "your own with mode 0700"
        )


def _remove_stale(address: Path) -> None:
    """Removes the socket file of a publisher that died; raises SnapshotError if it is in use."""
    try:
        status = os.lstat(address)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise SnapshotError(f"{address} exists and is not a socket; choose another address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(os.fspath(address)) != errno.ECONNREFUSED:
            raise SnapshotError(
                f"another publisher listens at {address}; close it, or choose another address"
            )
    os.unlink(address)
