"""The keeper: a small process that outlives the run's master and clears up after it.

However the master ends, by kill -9 too, the keeper sees its end of a pipe close. It then ends every
process that carries the run's mark in its environment (Ray's, the actors, vLLM's workers), and
removes the run's temporary folders and the shared-memory files that those processes had mapped:
vLLM 0.32's workers leave theirs behind even when they end in order.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "KIMISYS_RUN"
"""The environment variable that all processes of a run share."""

_PATIENCE = 10.0  # seconds, for processes that were killed to be gone
_EMPTY_LOOKS = 5  # in a row: then there is nothing more to come
_LOOK_SECONDS = 2.0  # between two looks at what is mapped; a look costs about 5 ms
_DONE = b"done"


@contextmanager
def keeper(resume_hint: str) -> Iterator[None]:
    """Nothing that is started inside the block outlives it, or this process.

    resume_hint: what the keeper says on stderr, should this process be killed.
    """
    mark = secrets.token_hex(16)
    command = [sys.executable, "-m", "kimisys.trainer.keeper", str(os.getpid()), mark, resume_hint]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for the keeper
    )
    assert process.stdin is not None
    os.environ[MARK] = mark
    try:
        yield
    finally:
        os.environ.pop(MARK, None)
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):  # it was killed, or hangs
            process.stdin.write(_DONE)
            process.stdin.close()
            process.wait(2 * _PATIENCE)


def main() -> None:
    """Wait for the master's end, then clear up."""
    master, mark, hint = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run = _Run(mark)
    while not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        run.look()
    _clear_up(master, run)
    if sys.stdin.buffer.read() != _DONE:
        print(
            f"the master (process {master}) was killed; every process of the run has ended. {hint}",
            file=sys.stderr,
        )


class _Run:
    """The processes of a run, as far as they were seen, and what they have mapped.

    One that carries the mark, or whose parent is one of them, belongs to the run: Ray's agents
    write their names over their environment, and the mark may be lost.
    """

    def __init__(self, mark: str) -> None:
        self._token = f"{MARK}={mark}".encode()
        self._known: set[tuple[int, int]] = set()  # a process id, and when that process started
        self.shared: set[Path] = set()

    def look(self) -> list[int]:
        """The processes that live now."""
        seen = {pid: born for pid in _process_ids() if (born := _birth(pid)) is not None}
        parents = {pid: parent for pid, (parent, _) in seen.items()}
        alive = {
            pid
            for pid, (_, start) in seen.items()
            if (pid, start) in self._known or self._token in _environment(pid)
        }
        while children := {p for p, parent in parents.items() if parent in alive} - alive:
            alive |= children
        self._known = {(pid, seen[pid][1]) for pid in alive}
        self.shared.update(*map(_shared_files, alive))
        return sorted(alive)


def _clear_up(master: int, run: _Run) -> None:
    deadline, empty = time.monotonic() + _PATIENCE, 0
    # A look may miss a process that is just being started. Stopped first, none starts another.
    while empty < _EMPTY_LOOKS and time.monotonic() < deadline:
        alive = run.look()
        empty = 0 if alive else empty + 1
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in alive:
                with suppress(OSError):
                    os.kill(pid, number)
        time.sleep(0.05)
    for path in run.shared:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    for where in {"/tmp", tempfile.gettempdir()}:
        for folder in Path(where).glob(f"kimisys*-{master}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _birth(pid: int) -> tuple[int, int] | None:
    """The parent's process id, and the start in clock ticks; None for what has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), int(fields[19]))


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or somebody else's
        return []


def _shared_files(pid: int) -> set[Path]:
    """Files below /dev/shm that the process has mapped and that still have a name."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if " /dev/shm/" in line)
    return {Path(path) for path in paths if not path.endswith(" (deleted)")}


if __name__ == "__main__":
    main()
