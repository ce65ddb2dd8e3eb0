"""Starting real runs, cut short, and seeing what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT = {
    **{"--steps": 2, "--prompts": 8, "--samples": 4, "--minibatches": 2},
    **{"--held-out": 32, "--sft.steps": 50},
}


def start(*arguments: str | Path, command: str = "train") -> subprocess.Popen[str]:
    """A `kimisys` command in a process group of its own; what it prints is its stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "kimisys.trainer.cli", command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "KIMISYS_TEST": mark()},
        # background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def start_run(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """`kimisys train` with SHORT and the other arguments."""
    short = [str(part) for option in SHORT.items() for part in option]
    return start("--out", out, *short, *arguments)


def read_until(run: subprocess.Popen[str], text: str) -> str:
    """What the run prints, up to the line that has `text` in it; all of it where none has."""
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if text in line:
            break
    return "".join(lines)


def mark() -> str:
    """Tells the runs of this test process from others."""
    return f"of {os.getpid()}"


def left_behind() -> dict[int, str]:
    """Command lines of processes that were started under a test's run and still live."""
    token, found = f"KIMISYS_TEST={mark()}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if token in (entry / "environ").read_bytes():
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(entry.name)] = text
            except OSError:
                continue  # it ended while we looked
    return {pid: text for pid, text in found.items() if text}  # a zombie has no command line


def wait_for_nothing(seconds: float = 20.0) -> dict[int, str]:
    """What is left behind after at most so long."""
    deadline = time.monotonic() + seconds
    while (found := left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def folders_left_behind(pid: int) -> list[Path]:
    """What a run with this process id made for sockets and for Ray."""
    return [
        folder
        for where in {"/tmp", tempfile.gettempdir()}
        for folder in Path(where).glob(f"kimisys*-{pid}-*")
    ]


def shared_memory() -> set[Path]:
    """The files below /dev/shm that processes of a test's run have mapped and that have a name."""
    found = set()
    for pid in left_behind():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {Path(line.split(maxsplit=5)[-1]) for line in lines if " /dev/shm/" in line}
    return {path for path in found if path.exists()}
