"""Real runs, cut short: Megatron, Ray, vLLM. Each starts every process of the real thing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from runs import folders_left_behind, read_until, start, start_run, wait_for_nothing

from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.metrics import read_metrics

TENSORS = 47  # of the recipe's model


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_a_short_run(tmp_path: Path, wire_dtype: str) -> None:
    out = tmp_path / "run"
    run = start_run(out, "--wire-dtype", wire_dtype)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert (summary["steps"], summary["syncs"]) == (2, 3)
    assert summary["digest_mismatches"] == 0
    assert summary["digest_checks"] == 3 * TENSORS  # every tensor at every sync
    assert summary["logprob_gap_max"] <= {"float32": 1e-3, "bfloat16": 0.03}[wire_dtype]
    assert summary["logprob_gap_exceeded_at"] is None
    assert [step.step for step in read_metrics(out / "metrics.jsonl")] == [1, 2]
    tensors = open_checkpoint(out / "model").layout.tensors
    assert len(tensors) == TENSORS
    assert {tensor.dtype for tensor in tensors} == {wire_dtype}
    assert (
        "<svg" in (out / "report.html").read_text()
        or "data:image" in (out / "report.html").read_text()
    )
    assert "pass rate" in output
    assert wait_for_nothing() == {}
    assert folders_left_behind(run.pid) == []


def test_stages_and_two_engines_of_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    layout = ["--tensor-parallel", "1", "--pipeline-parallel", "2"]
    engines = ["--engines", "2", "--engine-tensor-parallel", "2"]
    run = start_run(out, *layout, *engines)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["digest_checks"] >= 3 * 2 * TENSORS
    assert summary["logprob_gap_max"] <= 1e-3
    assert wait_for_nothing() == {}


def test_a_frozen_engine_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_run(out, "--freeze-engine", "--learning-rate", "1e-3")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["syncs"] == 1
    assert summary["logprob_gap_exceeded_at"] == 2  # the first step sees the synced weights
    assert summary["logprob_gap_max"] > summary["logprob_gap_bound"]
    assert "the engine was frozen" in output


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
    run = start_run(out, "--steps", "1000")
    before = read_until(run, moment)
    if whole_group:
        os.killpg(run.pid, sent)
    else:
        os.kill(run.pid, sent)
    try:
        rest, _ = run.communicate(timeout=90)
    finally:
        run.kill()  # nothing to do for a run that has ended
    assert run.returncode == 130, before + rest
    assert "interrupted" in rest
    assert f"--resume {out}" in rest
    assert "Traceback" not in rest
    assert wait_for_nothing() == {}
    assert folders_left_behind(run.pid) == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"].startswith("KeyboardInterrupt")


def test_a_task_and_a_model_of_ones_own_from_sft_to_samples(tmp_path: Path) -> None:
    """sft, train from its result, eval, generate, export: what the documentation shows."""
    task = ["--task", "examples/my_task.py:task"]
    made = tmp_path / "sft"
    run = start("--out", made, *task, "--sft.steps", "30", command="sft")
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    assert len((made / "sft.jsonl").read_text().splitlines()) == 30

    out = tmp_path / "run"
    run = start_run(out, *task, "--model", str(made / "model"), "--sft.steps", "0")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert not (out / "initial").exists()

    figures = tmp_path / "figures.json"
    asked = [out, *task, "--samples", "4", "--problems", "16", "--json", figures]
    run = start(*asked, command="eval")
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    record = json.loads(figures.read_text())
    assert {"pass@1", "pass@2", "pass@4", "mean length"} <= set(record["figures"])
    assert len(record["completions"]) == 64

    run = start(out, "123=", "9876=", "--samples", "2", command="generate")
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    assert output.count("123=") == 2 and output.count("9876=") == 2

    exported = tmp_path / "exported"
    run = start(out, exported, "--dtype", "bfloat16", command="export")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    assert {t.dtype for t in open_checkpoint(exported).layout.tensors} == {"bfloat16"}
    assert (exported / "tokenizer.json").exists()
    assert wait_for_nothing() == {}
