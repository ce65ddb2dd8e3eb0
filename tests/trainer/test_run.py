"""Real runs, cut short: Megatron TP 2, Ray, vLLM. Each starts every process of the real thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kimisys.reshard.safetensors import open_checkpoint

KEYS = {
    *("pass_rate_before", "pass_rate_after", "greedy_before", "greedy_after", "steps", "syncs"),
    *("wall_seconds", "sync_seconds_median", "sync_bytes_total", "digest_checks", "seed"),
    *("digest_mismatches", "logprob_gap_max", "rollout_tokens_per_second"),
}
SHORT = {
    **{"--steps": 2, "--prompts": 8, "--samples": 4, "--minibatches": 2},
    **{"--held-out": 32, "--sft.steps": 50},
}


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kimisys.trainer.cli", "train", "--out", str(out)]
    command += [str(part) for option in SHORT.items() for part in option]
    environment = {**os.environ, "KIMISYS_TEST_RUN": str(out)}
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # background jobs ignore it
    )


def left_behind(out: Path) -> list[str]:
    """Command lines of processes that were started under the run's environment and still live."""
    mark, found = f"KIMISYS_TEST_RUN={out}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended while we looked
    return found


def wait_for_nothing(out: Path, seconds: float = 20.0) -> list[str]:
    deadline = time.monotonic() + seconds
    while left_behind(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left_behind(out)


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_a_short_run(tmp_path: Path, wire_dtype: str) -> None:
    out = tmp_path / "run"
    run = start(out, "--wire-dtype", wire_dtype)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert (summary["steps"], summary["syncs"]) == (2, 3)
    assert summary["digest_mismatches"] == 0
    assert summary["digest_checks"] == 3 * 36  # every tensor at every sync
    assert summary["logprob_gap_max"] <= {"float32": 1e-3, "bfloat16": 0.03}[wire_dtype]
    assert summary["logprob_gap_exceeded_at"] is None
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    tensors = open_checkpoint(out / "model").layout.tensors
    assert len(tensors) == 36
    assert {tensor.dtype for tensor in tensors} == {wire_dtype}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "pass rate" in output
    assert wait_for_nothing(out) == []
    assert folders_left_behind(run.pid) == []


def test_a_frozen_engine_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start(out, "--freeze-engine", "--learning-rate", "1e-3")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["syncs"] == 1
    assert summary["logprob_gap_exceeded_at"] == 2  # the first step sees the synced weights
    assert summary["logprob_gap_max"] > summary["logprob_gap_bound"]
    assert "the engine was frozen" in output


def folders_left_behind(pid: int) -> list[Path]:
    """What a run with this process id made for sockets and for Ray."""
    return [
        f
        for where in {"/tmp", tempfile.gettempdir()}
        for f in Path(where).glob(f"kimisys*-{pid}-*")
    ]


@pytest.mark.parametrize(
    ("sent", "whole_group", "moment"),
    [
        (signal.SIGINT, True, "starting Megatron"),  # what a terminal sends on Ctrl-C
        (signal.SIGTERM, False, "supervised warm-up"),
        (signal.SIGINT, True, "1/1000"),
    ],
)
def test_an_interrupt_ends_everything(
    tmp_path: Path, sent: signal.Signals, whole_group: bool, moment: str
) -> None:
    out = tmp_path / "run"
    run = start(out, "--steps", "1000")
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if moment in line:
            break
    if whole_group:
        os.killpg(run.pid, sent)
    else:
        os.kill(run.pid, sent)
    try:
        rest, _ = run.communicate(timeout=90)
    finally:
        run.kill()  # nothing to do for a run that has ended
    assert run.returncode == 130, "".join(lines) + rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert wait_for_nothing(out) == []
    assert folders_left_behind(run.pid) == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"].startswith("KeyboardInterrupt")
