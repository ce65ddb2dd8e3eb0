"""Real runs that feed two engines, one by deltas and one whole: they compute the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import start_run, wait_for_nothing

from kimisys.trainer.metrics import read_metrics

STEPS = 4


@pytest.mark.parametrize(("rate", "sparse"), [("1e-6", True), ("1e-3", False)])
def test_an_engine_fed_by_deltas_is_the_one_that_is_fed_whole(
    tmp_path: Path, rate: str, sparse: bool
) -> None:
    """Digests, log-probabilities bit for bit, and greedy tokens, after every step."""
    out = tmp_path / "run"
    wire = ["--wire-dtype", "bfloat16", "--learning-rate", rate]
    run = start_run(out, *wire, "--steps", str(STEPS), "--control-engine")
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert wait_for_nothing() == {}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["control_compared"] == summary["syncs"] == STEPS + 1
    assert summary["digest_mismatches"] == 0
    steps = read_metrics(out / "metrics.jsonl")
    densities = [step.delta_density for step in steps]
    assert None not in densities
    full = steps[0].full_bytes
    assert full and summary["full_bytes_total"] == (STEPS + 1) * full
    received = [step.delta_bytes or 0 for step in steps]
    first = summary["delta_bytes_total"] - sum(received)
    assert full < first < 1.01 * full  # nothing to build on yet; headers and digests are read too
    if sparse:
        assert max(densities) < 0.15  # type: ignore[type-var]
        assert max(received) < 0.4 * full
    else:
        assert min(densities) > 0.5  # type: ignore[type-var]
        assert max(received) <= 1.01 * full
    assert "the control engine" in output
