"""Configurations that cannot run are refused before anything starts, naming the option."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kimisys.trainer.config import ConfigError, ModelConfig, SftConfig, TrainConfig


def test_the_recipe_itself_is_legal() -> None:
    TrainConfig().check()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"samples": 1}, "--samples is 1"),
        ({"minibatches": 5}, "--prompts 64 does not divide"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"tau": -0.1}, "--tau"),
        ({"clip_gradient": 0.0}, "--clip-gradient"),
        ({"tensor_parallel": 3}, "--tensor-parallel 3 does not divide --model.heads"),
        ({"tensor_parallel": 4}, "does not divide --model.kv-heads 2"),
        ({"model": ModelConfig(heads=6, kv_heads=4)}, "not a multiple"),
        ({"model": ModelConfig(head_dim=48)}, "--model.head-dim is 48"),
        ({"model": ModelConfig(rope_theta=-1.0)}, "--model.rope-theta"),
        ({"seed": -1}, "--seed is -1"),
        ({"held_out": 1_000_000}, "--held-out"),
        ({"clip_gradient": float("nan")}, "--clip-gradient"),
        ({"ready_timeout": float("nan")}, "--ready-timeout"),
        ({"sft": SftConfig(warmup_steps=-5)}, "--sft.warmup-steps"),
        ({"model": ModelConfig(layers=0)}, "--model.layers"),
        ({"sft": SftConfig(batch_size=0)}, "--sft.batch-size"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(TrainConfig(), **change).check()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="not empty"):
        TrainConfig(out=tmp_path).check()
    with pytest.raises(ConfigError, match="is a file"):
        TrainConfig(out=tmp_path / "summary.json").check()


def test_the_learning_rate_warms_up_and_decays() -> None:
    sft = SftConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [sft.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.05 <= rates[-1] < 0.07


def kimisys(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimisys.trainer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_refuses_in_one_line_and_makes_nothing(tmp_path: Path) -> None:
    run = kimisys("train", "--out", str(tmp_path / "run"), "--tensor-parallel", "3")
    assert run.returncode == 1
    assert "ConfigError: --tensor-parallel 3" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = kimisys("train", "--out", str(tmp_path / "file" / "run"))
    assert run.returncode == 1
    assert "ConfigError: --out" in run.stderr


def test_help_teaches() -> None:
    text = kimisys("train", "--help").stdout
    for option in ("--out", "--seed", "--steps", "--learning-rate", "--freeze-engine", "--tau"):
        assert option in text
