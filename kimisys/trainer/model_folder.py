"""A Hugging Face folder as a run starts from it: configuration, tokenizer, weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimisys.adapters.megatron.families import check_layout, family_of
from kimisys.errors import CheckpointError
from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.config import HEAD_DIMS, ConfigError, Dtype, RunConfig, ShapeConfig
from kimisys.trainer.initial import write_initial_checkpoint
from kimisys.trainer.task import Problem, Task
from kimisys.trainer.tokenizer import Tokenizer, arithmetic_files, read_files


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder says of itself. The weights are looked at only where they are loaded."""

    folder: Path
    hf_config: dict[str, Any]
    tokenizer: Tokenizer

    def files(self, dtype: Dtype) -> dict[str, str]:
        """The other files of a folder with this model's weights in `dtype`."""
        known = {k: v for k, v in self.hf_config.items() if k not in ("torch_dtype", "dtype")}
        text = json.dumps({**known, "torch_dtype": dtype}, indent=2) + "\n"
        return {"config.json": text, **read_files(self.folder)}

    def longest(self, task: Task, problems: Sequence[Problem]) -> int:
        """Tokens of the longest of the prompts with the longest completion that `task` allows.

        Raises ConfigError when that is more than the model can take, TokenizerError for a prompt
        that cannot be encoded.
        """
        prompts = [self.tokenizer.encode_prompt(problem.prompt) for problem in problems]
        most = max(map(len, prompts)) + task.max_completion_tokens
        context = int(self.hf_config["max_position_embeddings"])
        if most > context:
            raise ConfigError(
                f"the longest prompt and a completion of {task.max_completion_tokens} tokens take "
                f"{most} tokens, the model has room for {context} (max_position_embeddings); lower "
                "the task's max_completion_tokens or leave out long prompts"
            )
        return most


def planned_model(folder: Path, shape: ShapeConfig, task: Task) -> ModelFolder:
    """The model of `shape`, with the bundled tokenizer, that `make` will write into `folder`."""
    tokenizer = Tokenizer.arithmetic()
    prompts = [tokenizer.encode_prompt(p.prompt) for p in (*task.problems, *task.held_out)]
    context = max(map(len, prompts)) + task.max_completion_tokens
    hf_config = shape.hugging_face(len(tokenizer), context, tokenizer.eos_id, tokenizer.pad_id)
    return ModelFolder(folder, hf_config, tokenizer)


def make_model(model: ModelFolder, seed: int) -> None:
    """Write what `planned_model` planned, with random weights; nothing if the folder exists."""
    if not model.folder.exists():
        write_initial_checkpoint(model.folder, model.hf_config, seed, arithmetic_files())


def read_model(folder: Path) -> ModelFolder:
    """Read configuration and tokenizer, no weights. Raises CheckpointError, TokenizerError."""
    path = folder / "config.json"
    try:
        hf_config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); give a Hugging Face folder with config.json, a "
            "tokenizer and *.safetensors"
        ) from error
    return ModelFolder(folder, hf_config, Tokenizer.read(folder))


def open_model(folder: Path) -> ModelFolder:
    """Like `read_model`, and look whether the folder has the model's weights.

    Raises CheckpointError for a folder that lacks something, LayoutError for an architecture that
    is not supported, TokenizerError.
    """
    model = read_model(folder)
    wanted = {t.name for t in family_of(model.hf_config).hf_tensors("float32")}
    held = {t.name for t in open_checkpoint(folder).layout.tensors}
    if missing := sorted(wanted - held):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(wanted)} tensors, {missing[0]!r} "
            "first; copy the whole checkpoint"
        )
    return model


def check_megatron(hf_config: dict[str, Any], config: RunConfig) -> None:
    """Raise LayoutError when the model cannot be laid out over the configured ranks."""
    check_layout(hf_config, config.tensor_parallel, config.pipeline_parallel, config.ranks)


def check_engine(hf_config: dict[str, Any], tensor_parallel: int) -> None:
    """Raise ConfigError when vLLM cannot serve the model in such engines."""
    heads = int(hf_config["num_attention_heads"])
    width = int(hf_config.get("head_dim") or int(hf_config["hidden_size"]) // heads)
    if width not in HEAD_DIMS:
        raise ConfigError(
            f"the model's heads are {width} wide; vLLM's attention on the CPU has {HEAD_DIMS}"
        )
    if heads % tensor_parallel:
        raise ConfigError(
            f"--engine-tensor-parallel {tensor_parallel} does not divide the model's {heads} heads"
        )
