"""`make gpu-check` on this machine, whatever it has, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()


def gpu_check(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tests" / "gpu" / "check.py", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800
    )


def test_it_builds_tests_what_can_be_tested_and_says_what_was_not(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    run = gpu_check("--json", file)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(file.read_text())
    outcomes = {each["name"]: each["outcome"] for each in report["outcomes"]}
    assert report["versions"]["torch"] == torch.__version__
    assert (outcomes.pop("build"), outcomes.pop("smoke")) == ("passed", "passed")
    assert len(outcomes) > 10  # the benches and each test of tests/gpu
    assert set(outcomes.values()) == {"passed" if GPU else check.NOT_TESTED}
    assert report["gpu_present"] == GPU == bool(report["benches"])
    assert (check.NOT_TESTED in run.stdout.splitlines()) != GPU


def test_the_usual_run_of_the_tests_says_what_was_not_tested() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout
    assert (f"{check.NOT_TESTED} (" in run.stdout) != GPU


def test_what_is_missing_is_named_before_anything_is_built(tmp_path: Path) -> None:
    run = gpu_check(PATH=str(tmp_path))
    assert (run.returncode, "cmake, a C++ compiler missing" in run.stdout) == (2, True)


@pytest.mark.parametrize(
    ("source", "outcomes"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0", ["passed", "failed"]),
        ("import absent", ["failed"]),
        ("import os\ndef test_a(): os._exit(0)", []),  # the tests are lost, and with them the file
    ],
    ids=["a test fails", "an import fails", "the process ends"],
)
def test_a_failure_is_reported(
    source: str, outcomes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "HERE", tmp_path)
    monkeypatch.setattr(check, "WORK", tmp_path)
    (tmp_path / "test_planted.py").write_text(source)
    found = check.run_tests()
    assert [each.outcome for each in found if each.name != "tests/gpu"] == outcomes
    assert not check.succeeded(found, gpu=True)
    assert not check.succeeded(found, gpu=False)


def test_what_is_left_out_fails_beside_a_gpu_only() -> None:
    outcomes = [check.Outcome("a", "passed", 0.1), check.Outcome("b", check.NOT_TESTED, 0.0)]
    assert check.succeeded(outcomes, gpu=False)
    assert not check.succeeded(outcomes, gpu=True)
