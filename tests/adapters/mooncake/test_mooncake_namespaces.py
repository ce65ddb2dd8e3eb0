"""Mooncake between two network namespaces: what is read comes over a wire, from another host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HOSTS = {"publish": "10.213.7.1", "subscribe": "10.213.7.2"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """One per role, with an address each, joined by a veth pair."""
    names = {role: f"kimisys{os.getpid()}{role[0]}" for role in HOSTS}
    try:
        ip("netns", "add", names["publish"])
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        print(f"not tested: Mooncake between network namespaces: {reason}")
        pytest.skip(f"ip netns is not permitted here: {reason}")
    try:
        ip("netns", "add", names["subscribe"])
        ends = {role: f"k{os.getpid()}{role[0]}" for role in HOSTS}
        first, second = ends.values()
        ip("-n", names["publish"], "link", "add", first, "type", "veth", "peer", "name", second,
           "netns", names["subscribe"])  # fmt: skip
        for role, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[role]}/24", "dev", ends[role])
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", ends[role], "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


@dataclass
class Host:
    process: subprocess.Popen[str]

    def ask(self, line: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process ended; its stderr, above, says why"
        return json.loads(line)


@contextlib.contextmanager
def host(role: str, namespace: str, folder: Path) -> Iterator[Host]:
    tests = str(HERE.parents[1] / "broadcast")
    command = [sys.executable, str(HERE / "far_process.py"), role, str(folder), HOSTS[role], tests]
    process = subprocess.Popen(
        ["ip", "netns", "exec", namespace, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MC_LOG_LEVEL": "WARNING"},
    )
    try:
        started = Host(process)
        assert started.answer() == "ready"
        yield started
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_full_pull_and_deltas_arrive_bit_equal_on_another_host(
    namespaces: dict[str, str], tmp_path: Path
) -> None:
    os.chmod(tmp_path, 0o700)
    with host("publish", namespaces["publish"], tmp_path) as trainer:
        assert trainer.ask(1) == 1
        with host("subscribe", namespaces["subscribe"], tmp_path) as engine:
            version, base, wire, full = engine.ask(1)
            assert (version, base) == (1, None) and wire >= full > 2_000_000
            for version in (2, 3):
                assert trainer.ask(version) == version
                pulled, base, wire, full = engine.ask(version)
                assert (pulled, base) == (version, version - 1)
                assert wire < full / 5
            for version in (4, 5, 6):  # a chain
                trainer.ask(version)
            pulled, base, wire, full = engine.ask(6)
            assert (pulled, base) == (6, 3) and wire < full / 2
            trainer.process.kill()
            trainer.process.wait(20)
            said = engine.ask(7)
            assert said.startswith("SnapshotError: publisher") and "0.card" in said
