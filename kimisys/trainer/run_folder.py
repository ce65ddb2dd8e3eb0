"""The folder of a run: its configuration, written when it starts and read when it is resumed."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kimisys.trainer.config import ConfigError, RunConfig, TrainConfig
from kimisys.trainer.metrics import write_json

Config = TypeVar("Config", bound=RunConfig)

_FIXED = ("seed", "model", "task", "shape")  # a checkpoint means nothing under another
_COMMAND = "command"  # that wrote a config.json: `train` and `sft` do not resume each other's runs


def resolved(config: Config) -> Config:
    """`config` with whole paths, so that a run can be resumed from any working directory."""
    task, colon, function = config.task.rpartition(":")
    if config.task.endswith(".jsonl"):
        name = str(Path(config.task).resolve())
    else:
        name = (
            f"{Path(task).resolve()}:{function}" if colon and task.endswith(".py") else config.task
        )
    model = config.model and config.model.resolve()
    return dataclasses.replace(config, task=name, model=model)


def folder_of(config: RunConfig) -> Path:
    """The folder of a run that is about to start."""
    default = Path("runs") / time.strftime(f"%Y%m%d-%H%M%S-seed{config.seed}")
    return config.resume or config.out or default


def make_folder(config: RunConfig, out: Path) -> Path:
    """Make the folder `out` if need be, with config.json in it. Raises ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", _record(config))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return out


def saved_config(folder: Path, kind: type[Config]) -> Config:
    """The configuration that the run in `folder` was started with, to be resumed there.

    Raises ConfigError when there is none, or when it is of another command.
    """
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text())
        command = record.pop(_COMMAND, None)
        unknown = sorted(set(record) - {field.name for field in dataclasses.fields(kind)})
        if command != command_of(kind) or unknown:
            raise ValueError(f"it is of {command or 'no command'}; unknown here: {unknown}")
        config = msgspec.convert(
            record, kind, strict=True, dec_hook=lambda wanted, value: wanted(value)
        )
    except (OSError, ValueError, AttributeError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"--resume {folder}: {path} is not the configuration of a run of `kimisys "
            f"{command_of(kind)}` ({error}); name the folder that the run wrote (its --out)"
        ) from error
    return dataclasses.replace(config, out=None, resume=folder)


def check_resumable(config: RunConfig, saved: RunConfig) -> None:
    """Raise ConfigError when `config` changes what a checkpoint of `saved` depends on."""
    for name in _FIXED:
        if getattr(config, name) != getattr(saved, name):
            raise ConfigError(
                f"--{name} cannot be changed on --resume: the run was started with "
                f"{getattr(saved, name)}; start another run with --model {config.resume}/model"
            )
    if config.out is not None:
        raise ConfigError("--out and --resume exclude each other: a resumed run goes on in place")
    if isinstance(config, TrainConfig) and config.freeze_engine:
        raise ConfigError(
            "a run with --freeze-engine cannot be resumed: its engine's weights are not saved; "
            "start it again"
        )


def command_of(kind: type[RunConfig]) -> str:
    """The command whose runs a configuration of this kind describes."""
    return "train" if issubclass(kind, TrainConfig) else "sft"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in the run's folder inside the block. Raises ConfigError if one does."""
    with open(folder / "lock", "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is running in {folder}: wait for it, or end it, or name another "
                "folder"
            ) from error
        yield


def _record(config: RunConfig) -> dict[str, Any]:
    record = dataclasses.asdict(config) | {"out": None, "resume": None}
    record = {_COMMAND: command_of(type(config)), **record}
    return {k: str(v) if isinstance(v, Path) else v for k, v in record.items()}
