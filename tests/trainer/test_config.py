"""Configurations that cannot run are refused before anything starts, naming the option."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kimisys.errors import KimisysError
from kimisys.trainer.config import ConfigError, RunConfig, SftConfig, ShapeConfig, TrainConfig
from kimisys.trainer.rollouts import scheduler_config
from kimisys.trainer.run_folder import (
    check_resumable,
    folder_of,
    locked,
    make_folder,
    resolved,
    saved_config,
)
from kimisys.trainer.setting import prepare


def test_the_recipe_itself_is_legal() -> None:
    TrainConfig().check()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"samples": 1}, "--samples is 1"),
        ({"minibatches": 5}, "--prompts 64 does not divide"),
        ({"control_engine": True, "freeze_engine": True}, "--freeze-engine leaves"),
        ({"token_budget": -1}, "--token-budget is -1"),
        ({"max_staleness": -1}, "--max-staleness"),
        ({"mask_cap": 0.5}, "--mask-cap"),
        ({"repetition_penalty": 0.1, "early_stop": False}, "--repetition-penalty needs"),
        ({"repetition_penalty": 0.1, "rollouts": "whole"}, "--repetition-penalty needs"),
        ({"deployment": "disaggregated", "rollouts": "whole"}, "needs --rollouts budget"),
        ({"deployment": "disaggregated", "max_staleness": 0}, "--max-staleness 0 needs"),
        ({"token_budget": 900, "rollouts": "whole"}, "--token-budget 900 needs --rollouts budget"),
        ({"live_limit": 9, "rollouts": "whole"}, "--live-limit 9 needs --rollouts budget"),
        ({"deployment": "disaggregated", "freeze_engine": True}, "need --deployment hybrid"),
        ({"deployment": "disaggregated", "control_engine": True}, "need --deployment hybrid"),
        ({"engines": 64, "pin_engines": True}, "--pin-engines: 64 engines"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"tau": -0.1}, "--tau"),
        ({"clip_gradient": 0.0}, "--clip-gradient"),
        ({"shape": ShapeConfig(heads=6, kv_heads=4)}, "not a multiple"),
        ({"shape": ShapeConfig(rope_theta=-1.0)}, "--shape.rope-theta"),
        ({"length_reward": float("nan")}, "--length-reward"),
        ({"curriculum": 1.5}, "--curriculum"),
        ({"engines": 0}, "--engines"),
        ({"checkpoint_every": 0}, "--checkpoint-every"),
        ({"seed": -1}, "--seed is -1"),
        ({"held_out": 0}, "--held-out"),
        ({"clip_gradient": float("nan")}, "--clip-gradient"),
        ({"ready_timeout": float("nan")}, "--ready-timeout"),
        ({"sft": SftConfig(warmup_steps=-5)}, "--sft.warmup-steps"),
        ({"shape": ShapeConfig(layers=0)}, "--shape.layers"),
        ({"sft": SftConfig(batch_size=0)}, "--sft.batch-size"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(TrainConfig(), **change).check()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel 3 does not divide num_attention_heads 4"),
        ({"pipeline_parallel": 3}, "pipeline_parallel 3 does not divide num_hidden_layers 4"),
        ({"shape": ShapeConfig(head_dim=48)}, "heads are 48 wide"),
        ({"engine_tensor_parallel": 3}, "--engine-tensor-parallel 3 does not divide"),
        ({"task": "nowhere:task"}, "nowhere"),
        ({"model": Path("nowhere")}, "nowhere/config.json cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_or_the_task_is_refused(
    change: dict[str, object], match: str
) -> None:
    with pytest.raises(KimisysError, match=match):
        prepare(dataclasses.replace(TrainConfig(), **change))


def test_a_configuration_comes_back_from_its_folder(tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "run", seed=7, steps=3, wire_dtype="bfloat16", sft=SftConfig(steps=9)
    )
    folder = make_folder(config, folder_of(config))
    saved = saved_config(folder, TrainConfig)
    assert saved == dataclasses.replace(config, out=None, resume=folder)


def test_a_resumed_run_may_change_its_layout_but_not_its_seed(tmp_path: Path) -> None:
    saved = saved_config(make_folder(TrainConfig(), tmp_path / "run"), TrainConfig)
    check_resumable(dataclasses.replace(saved, tensor_parallel=1, pipeline_parallel=2), saved)
    with pytest.raises(ConfigError, match="--seed cannot be changed"):
        check_resumable(dataclasses.replace(saved, seed=2), saved)
    with pytest.raises(ConfigError, match="exclude each other"):
        check_resumable(dataclasses.replace(saved, out=tmp_path), saved)


@pytest.mark.parametrize("kind", ["nothing", "model", "other command"])
def test_a_folder_that_is_no_such_run_cannot_be_resumed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "model":
        path.write_text('{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 16}')
    if kind == "other command":
        make_folder(RunConfig(), tmp_path)
    before = path.read_text() if path.exists() else None
    with pytest.raises(ConfigError, match=r"config\.json is not the configuration"):
        saved_config(tmp_path, TrainConfig)
    run = kimisys("train", "--resume", str(tmp_path))
    assert run.returncode == 1
    assert "is not the configuration" in run.stderr
    assert before == (path.read_text() if path.exists() else None)


def test_paths_are_kept_whole() -> None:
    config = resolved(TrainConfig(model=Path("m"), task="examples/my_task.py:task"))
    assert config.model == Path.cwd() / "m"
    assert config.task == f"{Path.cwd()}/examples/my_task.py:task"
    assert resolved(TrainConfig(task="p.jsonl")).task == f"{Path.cwd()}/p.jsonl"
    assert resolved(TrainConfig()) == TrainConfig()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_frozen_run_cannot_be_resumed(tmp_path: Path) -> None:
    saved = saved_config(make_folder(TrainConfig(freeze_engine=True), tmp_path), TrainConfig)
    with pytest.raises(ConfigError, match="--freeze-engine cannot be resumed"):
        check_resumable(saved, saved)


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
    assert "LayoutError: tensor_parallel 3" in run.stderr
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
    for option in ("--rollouts", "--deployment", "--token-budget", "--max-staleness"):
        assert option in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {"token_budget": 900, "live_limit": 512, "groups": 0, "max_staleness": 4}
            | {"deployment": "alternate", "placement": "kv_aware", "order": "probe_first"},
        ),
        (
            {"deployment": "disaggregated", "live_limit": 7, "staleness": "admission"},
            {"deployment": "overlap", "live_limit": 7, "staleness": "admission", "groups": 64},
        ),
        (
            {"rollouts": "whole"},
            {"token_budget": 0, "groups": 64, "over_issue": 1.0, "concurrency": "fixed"}
            | {"placement": "group_round_robin", "order": "fifo", "deployment": "alternate"},
        ),
    ],
)
def test_what_the_scheduler_is_told(
    options: dict[str, object], expected: dict[str, object]
) -> None:
    config = dataclasses.replace(TrainConfig(ready_timeout=2.5), **options)
    fields = scheduler_config(config, token_budget=900).fields()
    assert {name: fields[name] for name in expected} == expected
    assert fields["lease_timeout"] == 2_500_000
