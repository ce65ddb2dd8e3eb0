"""A checkpoint that Megatron's dist_checkpointing wrote over several ranks, exported: bit for bit
what the ranks held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron_ranks import free_port
from tiny_models import tiny_config

from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.initial import write_initial_checkpoint
from kimisys.trainer.tokenizer import arithmetic_files

SCRIPT = Path(__file__).parent / "save_dist_checkpoint.py"


def export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kimisys.trainer.cli", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_initial_checkpoint(folder, tiny_config("qwen2"), 3, arithmetic_files())
    return folder


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by two ranks and two stages."""
    folder, port = tmp_path_factory.mktemp("dist"), free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, (rank, 2, 2, port)), model, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    for rank in ranks:
        try:
            said, _ = rank.communicate(timeout=200)
        finally:
            rank.kill()
        assert rank.returncode == 0, said
    return folder


def test_an_export_is_what_the_ranks_held(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    run = export(checkpoint, out, "--config", model, "--dtype", "float32")
    assert run.returncode == 0, run.stderr
    found, expected = open_checkpoint(out), open_checkpoint(model)
    assert list(found.layout.tensors) == list(expected.layout.tensors)
    for got, wanted in zip(found.buffers.values(), expected.buffers.values(), strict=True):
        np.testing.assert_array_equal(np.frombuffer(got, np.uint8), np.frombuffer(wanted, np.uint8))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").exists()


def test_what_is_missing_is_named(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    run = export(checkpoint, out)
    assert run.returncode == 1 and "--config DIR" in run.stderr
    other = tmp_path / "other"
    write_initial_checkpoint(other, tiny_config("qwen2", hidden_size=256), 3, arithmetic_files())
    run = export(checkpoint, out, "--config", other)
    assert run.returncode == 1 and "cannot be loaded into the model" in run.stderr, run.stderr
    run = export(tmp_path, out)
    assert run.returncode == 1 and "neither a Hugging Face folder" in run.stderr
    assert not out.exists()
