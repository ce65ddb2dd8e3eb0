"""Publishers that die and publishers that do not wait: a clean version or an error, never a mix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from worlds import allocate, split, whole

from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout
from kimisys.errors import SnapshotError, VersionError

DYING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from worlds import allocate, split
from kimisys.broadcast import Publisher, publisher as module, snapshot_layout

live = split("w", "uint8", (64, 64), 0, 1)
publisher = Publisher(live, snapshot_layout(live), 0, Path(sys.argv[2]))
publisher.publish(1, allocate(live, 1))
print("published", flush=True)
sys.stdin.readline()

def stuck(*arguments):
    # publish() has begun and written, and gets no further.
    publisher.memory[:100] = bytes(100)
    print("half", flush=True)
    time.sleep(600)

module.digest = stuck
publisher.publish(2, allocate(live, 2))
"""


def test_a_publisher_killed_in_the_middle_leaves_nothing_readable(folder: Path) -> None:
    address = folder / "dying"
    destination = split("w", "uint8", (64, 64), 0, 1)
    child = subprocess.Popen(
        [sys.executable, "-c", DYING, os.path.dirname(__file__), str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "published\n"
        with connect([address], 10) as peers:
            subscriber = Subscriber(peers, destination, 0)
            landed = allocate(destination)
            subscriber.pull(1, landed)
            child.stdin.write("go on\n")
            child.stdin.flush()
            assert child.stdout.readline() == "half\n"
            for kill in (False, True):
                if kill:
                    os.kill(child.pid, signal.SIGKILL)
                    assert child.wait(10) == -signal.SIGKILL
                for version in (1, 2):
                    with pytest.raises(SnapshotError, match=r"dying.*failed or died"):
                        subscriber.pull(version, landed)
            assert (landed[0, "w"] == 1).all()
        with pytest.raises(SnapshotError, match="Connection refused"):
            connect([address], 10)
        with Publisher(destination, snapshot_layout(destination), 0, address) as heir:
            heir.publish(3, allocate(destination, 3))
            with connect([address], 10) as peers:
                Subscriber(peers, destination, 0).pull(3, landed)
            assert (landed[0, "w"] == 3).all()
    finally:
        child.kill()
        child.communicate()


def test_pulls_during_publishes_give_one_version_or_an_error(folder: Path) -> None:
    """Every element of version v is v mod 251, so that a mix would show. The publisher pauses for
    random times about as long as a pull: some pulls fit in between, some are overtaken."""
    live = whole("w", "uint8", (1 << 20,), 1)
    source = allocate(live, 0)
    random = np.random.default_rng(0)
    stop = threading.Event()
    with Publisher(live, snapshot_layout(live), 0, folder / "busy") as publisher:

        def publish_on() -> None:
            version = 0
            while not stop.is_set() and version < 4000:
                version += 1
                source[0, "w"][:] = version % 251
                publisher.publish(version, source, 1)
                time.sleep(random.uniform(0, 2e-3))

        thread = threading.Thread(target=publish_on)
        thread.start()
        try:
            with connect([folder / "busy"], 10) as peers:
                subscriber = Subscriber(peers, live, 0)
                landed = allocate(live)
                for _ in range(200):
                    version = publisher.version or 0
                    try:
                        subscriber.pull(version, landed, threads=1)
                    except (SnapshotError, VersionError):
                        time.sleep(random.uniform(0, 1e-3))  # torn, or overtaken before it began
                        continue
                    assert (landed[0, "w"] == version % 251).all()
                stop.set()
                thread.join(20)
                assert publisher.version is not None
                subscriber.pull(publisher.version, landed, threads=1)
                assert (landed[0, "w"] == publisher.version % 251).all()
        finally:
            stop.set()
            thread.join(20)
