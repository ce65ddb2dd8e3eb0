"""However a master ends, nothing that it started stays: processes, folders, shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

MASTER = """
import mmap, os, subprocess, sys, tempfile, time
from pathlib import Path
from kimisys.trainer.keeper import keeper

CHILD = '''
import mmap, sys, time
f = open(sys.argv[1], "w+b"); f.truncate(4096)
m = mmap.mmap(f.fileno(), 4096)
print("ready", flush=True)
time.sleep(600)
'''

with keeper("Resume with: this"):
    folder = Path(tempfile.gettempdir()) / f"kimisys-{os.getpid()}-test"
    folder.mkdir()
    shared = f"/dev/shm/kimisys-test-{os.getpid()}"
    command = [sys.executable, "-c", CHILD, shared]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    print(child.pid, folder, shared, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(600)
"""


def started(how: str) -> tuple[subprocess.Popen[str], int, Path, Path]:
    master = subprocess.Popen(
        [sys.executable, "-c", MASTER, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert master.stdout is not None
    child, folder, shared = master.stdout.readline().split()
    return master, int(child), Path(folder), Path(shared)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def gone(child: int, folder: Path, shared: Path) -> bool:
    return not alive(child) and not folder.exists() and not shared.exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_master_leaves_nothing(sent: signal.Signals) -> None:
    master, child, folder, shared = started("wait")
    assert alive(child) and folder.exists() and shared.exists()
    os.kill(master.pid, sent)
    assert master.stderr is not None
    said = master.stderr.read()  # until the keeper, who holds it too, has ended
    master.wait(30)
    assert gone(child, folder, shared)
    assert f"the master (process {master.pid}) was killed" in said
    assert "Resume with: this" in said


def test_a_master_that_ends_by_itself_leaves_nothing_and_the_keeper_is_silent() -> None:
    master, child, folder, shared = started("end")
    _, said = master.communicate(timeout=60)
    assert master.returncode == 0, said
    assert gone(child, folder, shared)
    assert said == ""


def test_processes_of_others_are_left_alone() -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, "KIMISYS_RUN": "another run"},
    )
    theirs = Path(tempfile.mkdtemp(prefix="kimisys-1-"))
    try:
        master, *_ = started("end")
        master.communicate(timeout=60)
        time.sleep(0.2)
        assert alive(other.pid)
        assert theirs.exists()
    finally:
        other.kill()
        other.wait()
        theirs.rmdir()
