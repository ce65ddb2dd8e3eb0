"""The configurations of the commands that train nothing: eval, generate, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from kimisys.trainer.config import DEFAULT_TASK, MANY, ConfigError, Dtype, check_ranges


@dataclass(frozen=True)
class ServeConfig:
    """What is common to the commands that sample from one folder's weights."""

    folder: tyro.conf.Positional[Path]
    """A Hugging Face folder, or the folder of a run (its final weights, or its last checkpoint)."""
    dtype: Dtype = "float32"
    """In which the engine computes."""
    tensor_parallel: int = 1
    """Ranks of the engine."""
    samples: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 1
    """Seeds the sampling."""
    ready_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 240.0
    """How long the engine may take to start or to answer."""

    def check(self) -> None:
        """Raise ConfigError for what cannot run."""
        check_ranges(
            [
                ("--tensor-parallel", self.tensor_parallel, 1, 64),
                ("--samples", self.samples, 1, 1024),
                ("--temperature", self.temperature, 0.0, 100.0),
                ("--seed", self.seed, 0, 2**31 - 1),
                ("--ready-timeout", self.ready_timeout, 1.0, 86_400.0),
            ]
        )


@dataclass(frozen=True)
class EvalConfig(ServeConfig):
    """Measure a model on a task's held-out problems."""

    task: str = DEFAULT_TASK
    """MODULE:FUNCTION, FILE.py:FUNCTION or FILE.jsonl, as for train."""
    max_tokens: int | None = None
    """Of a completion; if not given, the task's limit, or what the model has room for."""
    problems: int = 512
    """Held-out problems to measure on; fewer if the task has fewer."""
    json: Path | None = None
    """Also write the figures and every completion to this file."""

    def check(self) -> None:
        super().check()
        check_ranges([("--problems", self.problems, 1, MANY)])
        if self.max_tokens is not None:
            check_ranges([("--max-tokens", self.max_tokens, 1, MANY)])
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ConfigError(f"--json {self.json}: name a file in a folder that exists")


@dataclass(frozen=True)
class GenerateConfig(ServeConfig):
    """Print completions."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to complete; without any, a prompt a line from standard input."""
    max_tokens: int | None = None
    """Of a completion; if not given, 64, or what the model has room for."""

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None:
            check_ranges([("--max-tokens", self.max_tokens, 1, MANY)])


@dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder: config.json, tokenizer, model.safetensors."""

    source: tyro.conf.Positional[Path]
    """A run's folder, one of its checkpoints, or a folder that Megatron's dist_checkpointing
    wrote."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    dtype: Dtype = "bfloat16"
    """Of the exported weights."""
    config: Path | None = None
    """For a checkpoint of Megatron: a folder with the model's config.json and tokenizer."""

    def check(self) -> None:
        """Raise ConfigError when there is something where the folder should be made."""
        if self.out.exists():
            raise ConfigError(f"{self.out} exists; name a folder that does not")
