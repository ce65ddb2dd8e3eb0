"""What a model folder must be for a run to start from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kimisys.errors import CheckpointError, KimisysError
from kimisys.reshard import Tensor
from kimisys.reshard.safetensors import create_checkpoint, open_checkpoint
from kimisys.trainer.config import ConfigError, ShapeConfig
from kimisys.trainer.model_folder import check_engine, make_model, open_model, planned_model
from kimisys.trainer.serving import find_weights
from kimisys.trainer.task import Demonstration, Problem, Task


def task(prompt: str = "1+2=") -> Task:
    return Task([Problem(prompt, "3")], [Problem("4+4=", "8")], lambda *_: 1.0, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(planned_model(tmp_path / "model", ShapeConfig(layers=1), task()), seed=1)
    return tmp_path / "model"


def rewrite(folder: Path, dtype: str, first_rows: int) -> None:
    """The same files with other tensors: all of `dtype`, the embedding with so many rows more."""
    old = open_checkpoint(folder).layout.tensors
    texts = {p.name: p.read_text() for p in folder.iterdir() if p.suffix == ".json"}
    tensors = [
        Tensor(t.name, dtype, (t.shape[0] + first_rows * ("embed" in t.name), *t.shape[1:]))
        for t in old
    ]
    with create_checkpoint(folder.with_name("new"), tensors, texts):
        pass
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)


def test_a_made_model_opens(folder: Path) -> None:
    model = open_model(folder)
    assert model.longest(task(), task().problems) == 4 + 8
    assert set(model.files("bfloat16")) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_tokenizer_outlives_its_folder(folder: Path) -> None:
    model = open_model(folder)
    shutil.rmtree(folder)
    assert "tokenizer.json" in model.files("float32")


def test_other_shapes_and_dtypes_are_refused(folder: Path) -> None:
    rewrite(folder, "float32", first_rows=1)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' is float32\[17, 128\]"):
        open_model(folder)


def test_a_dtype_that_cannot_be_cast_is_refused(folder: Path) -> None:
    rewrite(folder, "float16", first_rows=0)
    with pytest.raises(CheckpointError, match="float32 and bfloat16 can be read"):
        open_model(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(KimisysError, match=r"config\.json"):
        open_model(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="lacks 11 of the model's 25 tensors"):
        open_model(folder)


def test_what_is_too_long_is_refused(folder: Path) -> None:
    model = open_model(folder)
    with pytest.raises(ConfigError, match="take 16 tokens, the model has room for 12"):
        model.longest(task("1+2+1+2="), task("1+2+1+2=").problems)
    with pytest.raises(ConfigError, match=r"demonstration 0, of '1\+1='"):
        model.check_demonstrations([Demonstration("1+1=", "1+1=2#2,1+1=2#2")])


def test_engines_that_vllm_cannot_split_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    check_engine(config, 4, "--tp")  # two key-value heads, each on two ranks
    with pytest.raises(ConfigError, match="--tp 3 does not divide the model's heads"):
        check_engine(config, 3, "--tp")
    odd = {**config, "num_attention_heads": 12, "num_key_value_heads": 6}
    with pytest.raises(ConfigError, match="--tp 4 does not divide the model's key-value heads"):
        check_engine(odd, 4, "--tp")


def test_of_a_run_the_newest_weights_are_found(tmp_path: Path) -> None:
    for number, name in enumerate(["initial", "model", "checkpoints/sft-000050"]):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").touch()
        os.utime(tmp_path / name, (number, number))
        assert find_weights(tmp_path) == tmp_path / name
    os.utime(tmp_path / "model", (9, 9))
    assert find_weights(tmp_path) == tmp_path / "model"
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder"):
        find_weights(tmp_path / "nowhere")
