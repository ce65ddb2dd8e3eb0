"""Publishers that die and publishers that do not wait: a clean version or an error, never a mix."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from damage import Damaging, connect_through, flipped, truncated
from training import engine, training
from worlds import allocate, assert_holds, split, whole

from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout
from kimisys.errors import DigestError, SnapshotError, VersionError

PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from worlds import allocate, split
from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout

live = split("w", "uint8", (512, 4096), 0, 1)
address = Path(sys.argv[2])
"""

PUBLISHING = (
    PROCESS
    + """
publisher = Publisher(live, snapshot_layout(live), 0, address)
weights = allocate(live, 1)
publisher.publish(1, weights)
print("published", flush=True)
sys.stdin.readline()
for version in range(2, 1_000_000):
    weights[0, "w"][version % 7 :: 7] = version % 251
    publisher.publish(version, weights, 1)
"""
)

READING = (
    PROCESS
    + """
landed = allocate(live)
with connect([address], 10) as peers:
    subscriber = Subscriber(peers, live, 0)
    print("reading", flush=True)
    while True:
        subscriber.pull(None, landed, threads=1, full=True)
"""
)


@contextlib.contextmanager
def child(program: str, address: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, os.path.dirname(__file__), str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def weights_of(version: int) -> np.ndarray:
    """What the publishing process has at a version."""
    weights = np.ones(512 * 4096, np.uint8)
    for each in range(2, version + 1):
        weights[each % 7 :: 7] = each % 251
    return weights


@pytest.mark.parametrize("seed", range(4))
def test_a_publisher_killed_at_any_moment(folder: Path, seed: int) -> None:
    """Near subscribers go as far as its log goes; a full pull gives a whole version or an error;
    the heir at the same address serves again."""
    address = folder / "dying"
    live = split("w", "uint8", (512, 4096), 0, 1)
    landed = allocate(live)
    with child(PUBLISHING, address) as process:
        assert said(process) == "published\n"
        with connect([address], 10) as peers:
            subscriber = Subscriber(peers, live, 0)
            subscriber.pull(1, landed)
            assert process.stdin is not None
            process.stdin.write("go on\n")
            process.stdin.flush()
            for _ in range(3):
                subscriber.pull(None, landed, timeout_seconds=20)
            time.sleep(0.01 + np.random.default_rng(seed).uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(10) == -signal.SIGKILL
            before = subscriber.version
            assert before is not None
            try:
                last = subscriber.pull(None, landed, timeout_seconds=0.2).version
                assert last >= before
            except SnapshotError as error:  # it died while its log did not lead on from here
                assert "failed or died" in str(error)
            if subscriber.version is not None:
                np.testing.assert_array_equal(landed[0, "w"], weights_of(subscriber.version))
            with contextlib.suppress(SnapshotError):
                version = subscriber.pull(None, landed, full=True, timeout_seconds=0.2).version
                np.testing.assert_array_equal(landed[0, "w"], weights_of(version))
        with pytest.raises(SnapshotError, match="Connection refused"):
            connect([address], 10)
        with Publisher(live, snapshot_layout(live), 0, address) as heir:
            heir.publish(3, allocate(live, 3))
            with connect([address], 10) as peers:
                Subscriber(peers, live, 0).pull(3, landed)
            assert (landed[0, "w"] == 3).all()


def test_a_publisher_that_died_while_writing(folder: Path) -> None:
    """Its data is torn, and full pulls say so by name; its log is whole."""
    with training(folder) as (trainer, peers):
        destination = engine(1)
        landed = allocate(destination)
        near, new = Subscriber(peers, destination, 0), Subscriber(peers, destination, 0)
        trainer.publish()
        near.pull(1, landed)
        values = trainer.next()
        trainer.publishers[1]._snapshot.begin(3)
        np.asarray(trainer.publishers[1].memory)[:1000] = 0
        died = r"1\.sock \(trainer rank 1\).*failed or died"
        for version in (2, None):
            with pytest.raises(SnapshotError, match=died):
                new.pull(version, allocate(destination), timeout_seconds=0.05)
        with pytest.raises(VersionError, match="has version 2, asked was 3"):
            near.pull(3, landed, timeout_seconds=0.05)
        assert near.version == 1
        assert near.pull(None, landed).version == 2
        assert_holds(destination, landed, values)
        values = trainer.next()
        assert trainer.version == 3
        assert near.pull(3, landed).base is None  # what was half-written is published in full
        assert_holds(destination, landed, values)


def test_a_reader_killed_in_mid_pull_disturbs_nobody(folder: Path) -> None:
    address = folder / "busy"
    live = split("w", "uint8", (512, 4096), 0, 1)
    weights = allocate(live, 1)
    with Publisher(live, snapshot_layout(live), 0, address) as publisher:
        publisher.publish(1, weights)
        before = len(os.listdir("/proc/self/fd"))
        version = 1
        for seed in range(3):
            with child(READING, address) as process:
                assert said(process) == "reading\n"
                end = time.monotonic() + np.random.default_rng(seed).uniform(0.02, 0.1)
                while time.monotonic() < end:
                    version += 1
                    weights[0, "w"][version % 7 :: 7] = version % 251
                    publisher.publish(version, weights, 1)
                assert process.poll() is None
                process.kill()
                process.wait(10)
                version += 1
                publisher.publish(version, weights, 1)
        with connect([address], 10) as peers:
            landed = allocate(live)
            Subscriber(peers, live, 0).pull(version, landed)
            np.testing.assert_array_equal(landed[0, "w"], weights[0, "w"])
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_thousand_damages_on_the_way_are_detected(folder: Path) -> None:
    """Truncated and flipped tables, payloads, blocks and digests. Whatever is damaged, what the
    subscriber says it holds is what it holds, to the bit; and the next version heals.

    Some of what is read between two pieces that are needed is itself not needed: such damage
    passes, and the comparison with what was published shows that it did no harm."""
    destination = engine(1)
    landed = allocate(destination)
    detected = harmed = 0
    with training(folder, log_nbytes=24 << 10) as (trainer, _):
        trainer.publish()
        addresses = [each.address for each in trainer.publishers]
        peers, memories = connect_through(addresses, Damaging)
        with peers:
            subscriber = Subscriber(peers, destination, 0)
            subscriber.pull(None, landed)
            history = {1: {name: array.copy() for name, array in trainer.values.items()}}
            seed = 0
            while harmed < 1000 and (seed := seed + 1) < 3000:
                random = np.random.default_rng(seed)
                steps = int(random.integers(1, 3))
                for _ in range(steps):
                    values = trainer.next(0.3 if seed % 10 == 0 else 0.01)
                    history[trainer.version] = values
                victim = memories[int(random.integers(2))]
                change = (flipped if seed % 2 else truncated)(random)
                assert isinstance(victim, Damaging)
                victim.arm(int(random.integers(4)), change)
                full = seed % 7 == 0
                refused = False
                try:
                    subscriber.pull(None, landed, None, 1, full=full, timeout_seconds=1)
                except (SnapshotError, DigestError):
                    refused = True
                victim.disarm()
                harmed += victim.harmed
                detected += refused
                assert victim.harmed or not refused
                if subscriber.version is not None:
                    assert_holds(destination, landed, history[subscriber.version])
                history = {v: kept for v, kept in history.items() if v >= (subscriber.version or v)}
                values = trainer.next()
                history[trainer.version] = values
                assert subscriber.pull(None, landed).version == trainer.version
                assert_holds(destination, landed, values)
    print(f"{harmed} reads damaged, {detected} pulls refused")
    assert harmed == 1000 and detected > 900  # the others hit bytes that nobody needs


def test_descriptors_and_memory_stay_flat(folder: Path) -> None:
    destination = engine(1)
    landed = allocate(destination)

    def usage() -> tuple[int, int, int]:
        gc.collect()
        fields = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return (
            len(os.listdir("/proc/self/fd")),
            int(fields["RssShmem"].split()[0]) << 10,
            int(fields["RssAnon"].split()[0]) << 10,
        )

    with training(folder, log_nbytes=64 << 10) as (trainer, peers):
        subscriber = Subscriber(peers, destination, 0)
        trainer.publish()
        for cycle in range(230):
            if cycle == 30:  # all of the log has been touched by now
                before = usage()
            trainer.next(0.02)
            subscriber.pull(None, landed, full=cycle % 10 == 0)
        after = usage()
    assert after[0] == before[0]
    assert after[1] <= before[1] + (256 << 10)
    assert after[2] <= before[2] + (8 << 20)


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
