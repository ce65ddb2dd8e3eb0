"""A Hugging Face folder as a run starts from it: configuration, tokenizer, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kimisys.adapters.megatron.families import check_layout, family_of
from kimisys.errors import CheckpointError
from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.config import HEAD_DIMS, ConfigError, Dtype, RunConfig, ShapeConfig
from kimisys.trainer.initial import write_initial_checkpoint
from kimisys.trainer.task import Demonstration, Problem, Task
from kimisys.trainer.tokenizer import Tokenizer, arithmetic_files, read_files


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder says of itself. The weights are looked at only where they are loaded."""

    folder: Path
    hf_config: dict[str, Any]
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """Read once: a run that resumes deletes, in time, the checkpoint that it came from."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return int(self.hf_config["max_position_embeddings"])

    def files(self, dtype: Dtype) -> dict[str, str]:
        """The other files of a folder with this model's weights in `dtype`."""
        known = {k: v for k, v in self.hf_config.items() if k not in ("torch_dtype", "dtype")}
        text = json.dumps({**known, "torch_dtype": dtype}, indent=2) + "\n"
        return {"config.json": text, **self.tokenizer_files}

    def longest(self, task: Task, problems: Sequence[Problem]) -> int:
        """Tokens of the longest of the prompts with the longest completion that `task` allows.

        Raises ConfigError when that is more than the model can take, TokenizerError for a prompt
        that cannot be encoded.
        """
        prompts = [self.tokenizer.encode_prompt(problem.prompt) for problem in problems]
        most = max(map(len, prompts)) + task.max_completion_tokens
        context = self.context
        if most > context:
            raise ConfigError(
                f"the longest prompt and a completion of {task.max_completion_tokens} tokens take "
                f"{most} tokens, the model has room for {context} (max_position_embeddings); lower "
                "the task's max_completion_tokens or leave out long prompts"
            )
        return most

    def check_demonstrations(self, demonstrations: Sequence[Demonstration]) -> None:
        """Raise ConfigError for one that is longer than the model can take, TokenizerError for one
        that cannot be encoded."""
        context = self.context
        for i, one in enumerate(demonstrations):
            prompt = self.tokenizer.encode_prompt(one.prompt)
            most = len(prompt) + len(self.tokenizer.encode(one.completion)) + 1
            if most > context:
                raise ConfigError(
                    f"demonstration {i}, of {one.prompt[:40]!r}, takes {most} tokens, the model "
                    f"has room for {context} (max_position_embeddings); leave it out"
                )


def planned_model(folder: Path, shape: ShapeConfig, task: Task) -> ModelFolder:
    """The model of `shape`, with the bundled tokenizer, that `make` will write into `folder`."""
    tokenizer = Tokenizer.arithmetic()
    prompts = [tokenizer.encode_prompt(p.prompt) for p in (*task.problems, *task.held_out)]
    context = max(map(len, prompts)) + task.max_completion_tokens
    hf_config = shape.hugging_face(len(tokenizer), context, tokenizer.eos_id, tokenizer.pad_id)
    return ModelFolder(folder, hf_config, tokenizer, arithmetic_files())


def make_model(model: ModelFolder, seed: int) -> None:
    """Write what `planned_model` planned, with random weights; nothing if the folder exists."""
    if not model.folder.exists():
        write_initial_checkpoint(model.folder, model.hf_config, seed, model.tokenizer_files)


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
    if not isinstance(hf_config, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy the model's config.json there")
    return ModelFolder(folder, hf_config, Tokenizer.read(folder), read_files(folder))


def open_model(folder: Path) -> ModelFolder:
    """Like `read_model`, and look whether the folder has the model's weights.

    Raises CheckpointError for a folder that lacks something, LayoutError for an architecture that
    is not supported, TokenizerError.
    """
    model = read_model(folder)
    family = family_of(model.hf_config)
    wanted = {t.name: t.shape for t in family.hf_tensors("float32")}
    held = {t.name: t for t in open_checkpoint(folder).layout.tensors}
    if missing := sorted(wanted.keys() - held.keys()):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(wanted)} tensors, {missing[0]!r} "
            "first; copy the whole checkpoint"
        )
    for name, shape in wanted.items():
        if held[name].shape != shape or held[name].dtype not in get_args(Dtype):
            raise CheckpointError(
                f"{folder}: {name!r} is {held[name].dtype}{list(held[name].shape)}; config.json "
                f"says {list(shape)}, and float32 and bfloat16 can be read: see whether both files "
                "are of one model, and convert other dtypes"
            )
    if len(model.tokenizer) > family.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder} has {len(model.tokenizer)} tokens, the model "
            f"{family.vocab_size}: they are not of one model"
        )
    return model


def check_megatron(hf_config: dict[str, Any], config: RunConfig) -> None:
    """Raise LayoutError when the model cannot be laid out over the configured ranks."""
    check_layout(hf_config, config.tensor_parallel, config.pipeline_parallel, config.ranks)


def check_engine(hf_config: dict[str, Any], tensor_parallel: int, option: str) -> None:
    """Raise ConfigError when vLLM cannot serve the model in engines of `tensor_parallel` ranks,
    which `option` asked for."""
    family = family_of(hf_config)
    if family.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"the model's heads are {family.head_dim} wide; vLLM's attention on the CPU has "
            f"{HEAD_DIMS}"
        )
    # vLLM repeats key-value heads where there are more ranks than heads
    few, many = sorted((family.groups, tensor_parallel))
    for what, rest in (
        ("heads", family.heads % tensor_parallel),
        ("key-value heads", many % few),
        ("MLP columns", family.intermediate_size % tensor_parallel),
    ):
        if rest:
            raise ConfigError(f"{option} {tensor_parallel} does not divide the model's {what}")
