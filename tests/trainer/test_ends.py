"""However a run ends, it says why and how to go on, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from runs import (
    folders_left_behind,
    left_behind,
    read_until,
    shared_memory,
    start_run,
    wait_for_nothing,
)

HANG = 90  # seconds; far beyond what it takes, which docs/log.md tells


@pytest.mark.parametrize("victim", ["MegatronRank", "EngineActor"])
def test_a_killed_actor_ends_the_run_by_name(tmp_path: Path, victim: str) -> None:
    out = tmp_path / "run"
    run = start_run(out, "--steps", "1000", "--checkpoint-every", "1")
    before, memory = read_until(run, "1/1000"), shared_memory()
    os.kill(
        next(p for p, text in left_behind().items() if f"ray::{victim}" in text), signal.SIGKILL
    )
    try:
        rest, _ = run.communicate(timeout=HANG)
    finally:
        run.kill()
    assert run.returncode == 1, before + rest
    name = r"Megatron rank [01]" if victim == "MegatronRank" else "engine 0"
    assert re.search(f"ActorLostError: {name} is lost", rest), rest
    assert f"kimisys train --resume {out}" in rest
    assert "Traceback" not in rest
    assert wait_for_nothing() == {}
    assert folders_left_behind(run.pid) == []
    assert not [path for path in memory if path.exists()]
    assert re.match(
        f"ActorLostError: {name}", json.loads((out / "summary.json").read_text())["status"]
    )


def test_a_killed_rank_of_an_engine_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_run(out, "--steps", "1000", "--engine-tensor-parallel", "2")
    before = read_until(run, "1/1000")
    workers = [p for p, text in left_behind().items() if re.search(r"VLLM::Worker", text)]
    assert len(workers) == 2, left_behind()
    memory = shared_memory()
    assert memory  # else this test would not see what stays
    os.kill(workers[1], signal.SIGKILL)
    try:
        rest, _ = run.communicate(timeout=HANG)
    finally:
        run.kill()
    assert run.returncode == 1, before + rest
    assert "engine 0" in rest, rest
    assert "EngineError" in rest or "ActorLostError" in rest, rest
    assert f"--resume {out}" in rest
    assert wait_for_nothing() == {}
    assert not [path for path in memory if path.exists()]


def test_a_killed_master_takes_everything_with_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_run(out, "--steps", "1000", "--engine-tensor-parallel", "2")
    read_until(run, "1/1000")
    memory = shared_memory()
    assert memory  # else this test would not see what stays
    os.kill(run.pid, signal.SIGKILL)
    rest, _ = run.communicate(timeout=HANG)  # the keeper speaks, and ends last
    assert f"the master (process {run.pid}) was killed" in rest
    assert f"kimisys train --resume {out}" in rest
    assert wait_for_nothing() == {}
    assert folders_left_behind(run.pid) == []
    assert not [path for path in memory if path.exists()]
