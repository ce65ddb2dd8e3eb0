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
        process.stdin.write(_DONE)
        process.stdin.close()
        process.wait(2 * _PATIENCE)


def main() -> None:
    """Wait for the master's end, then clear up."""
    master, mark, hint = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    token, shared = f"{MARK}={mark}".encode(), set[Path]()
    while not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        _look(token, shared)
    _clear_up(master, token, shared)
    if sys.stdin.buffer.read() != _DONE:
        print(
            f"the master (process {master}) was killed; every process of the run has ended. {hint}",
            file=sys.stderr,
        )


def _look(token: bytes, shared: set[Path]) -> list[int]:
    """The run's processes; what they have mapped is added to `shared`."""
    alive = _marked(token)
    shared.update(*map(_shared_files, alive))
    return alive


def _clear_up(master: int, token: bytes, shared: set[Path]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while (alive := _look(token, shared)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for path in shared:
        path.unlink(missing_ok=True)
    for where in {"/tmp", tempfile.gettempdir()}:
        for folder in Path(where).glob(f"kimisys*-{master}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _marked(token: bytes) -> list[int]:
    """Processes, other than zombies, that were started with `token` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if token in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile, or somebody else's
                continue
    return found


def _shared_files(pid: int) -> set[Path]:
    """Files below /dev/shm that the process has mapped and that still have a name."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if " /dev/shm/" in line)
    return {Path(path) for path in paths if not path.endswith(" (deleted)")}


if __name__ == "__main__":
    main()
