"""The folder of a run: its configuration, written when it starts and read when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kimisys.trainer.config import ConfigError, RunConfig
from kimisys.trainer.metrics import write_json

Config = TypeVar("Config", bound=RunConfig)

_FIXED = ("seed", "model", "task", "shape")  # a checkpoint means nothing under another


def make_folder(config: RunConfig) -> Path:
    """The run's folder, made if need be, with config.json in it. Raises ConfigError."""
    out = config.resume or config.out
    out = out or Path("runs") / time.strftime(f"%Y%m%d-%H%M%S-seed{config.seed}")
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
        config = msgspec.convert(
            record, kind, strict=True, dec_hook=lambda wanted, value: wanted(value)
        )
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"--resume {folder}: {path} is not the configuration of such a run ({error}); name the "
            "folder that the run wrote (its --out)"
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


def _record(config: RunConfig) -> dict[str, Any]:
    record = dataclasses.asdict(config) | {"out": None, "resume": None}
    return {k: str(v) if isinstance(v, Path) else v for k, v in record.items()}
