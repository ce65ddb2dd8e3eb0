"""A run that was killed goes on where its last checkpoint was, in this layout or another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from runs import read_until, start, start_run, wait_for_nothing

from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.metrics import read_metrics

# whole iterations do the same again; with a budget it depends on what the clock interrupts
WHOLE = ["--rollouts", "whole"]
OPTIONS = ["--steps", "4", "--checkpoint-every", "1", "--length-reward-from", "2", *WHOLE]


def finish(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return output


def kill_at(out: Path, moment: str) -> None:
    run = start_run(out, *OPTIONS)
    read_until(run, moment)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=100)
    assert wait_for_nothing() == {}


def curve(out: Path) -> list[dict[str, Any]]:
    """All that is no time, of each step. Nor the bytes that were read: a subscriber that connects
    anew reads a record's header once more than one that followed."""
    steps = [asdict(step) for step in read_metrics(out / "metrics.jsonl")]
    other = {"version", "delta_bytes", "utilisation"}
    return [
        {k: v for k, v in step.items() if "second" not in k and k not in other} for step in steps
    ]


def weights(out: Path) -> bytes:
    checkpoint = open_checkpoint(out / "model")
    return bytes(checkpoint.buffers[0, "model.safetensors"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start_run(out, *OPTIONS))
    return out


@pytest.mark.parametrize("moment", ["supervised warm-up: step 25", "2/4"])
def test_a_killed_run_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    kill_at(out, moment)
    finish(start("--resume", out))
    assert curve(out) == curve(undisturbed)
    assert weights(out) == weights(undisturbed)
    losses = [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]
    assert losses[-1] == json.loads((undisturbed / "sft.jsonl").read_text().splitlines()[-1])


def test_a_run_goes_on_in_another_layout(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_at(out, "2/4")
    layout = ["--tensor-parallel", "1", "--pipeline-parallel", "2", "--engines", "2"]
    output = finish(start("--resume", out, *layout))
    assert "resuming from" in output
    assert [step["step"] for step in curve(out)] == [1, 2, 3, 4]
    summary = json.loads((out / "summary.json").read_text())
    done = summary["resumed_at"][0]  # the kill may have come before the last step's checkpoint
    assert done >= 1
    assert curve(out)[:done] == curve(undisturbed)[:done]
    assert summary["logprob_gap_max"] <= 1e-3
    assert len(summary["resumed_at"]) == 1


def test_a_complete_run_goes_further(tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(start_run(out, "--steps", "1"))
    run = start("--resume", out, "--seed", "2")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 1
    assert "--seed cannot be changed on --resume" in output
    finish(start("--resume", out, "--steps", "2"))
    assert [step.step for step in read_metrics(out / "metrics.jsonl")] == [1, 2]
