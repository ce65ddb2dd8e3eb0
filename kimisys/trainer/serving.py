"""Engines that serve the weights of a folder: no trainer, the same publisher and the same pull."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.errors import CheckpointError
from kimisys.reshard.safetensors import open_checkpoint
from kimisys.trainer.checkpoint import last_checkpoint
from kimisys.trainer.config import Dtype
from kimisys.trainer.engines import Engines
from kimisys.trainer.model_folder import ModelFolder
from kimisys.trainer.processes import processes

VERSION = 1


def find_weights(path: Path) -> Path:
    """The Hugging Face folder that `path` means: itself, or of a run its final weights, its last
    checkpoint, or what it started from. Raises CheckpointError."""
    last = last_checkpoint(path / "checkpoints")
    trained = [folder for folder in (path / "model", last) if folder and folder.exists()]
    trained.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)  # a run may have gone on
    for folder in (path, *trained, path / "initial"):
        if any(folder.glob("*.safetensors")):
            return folder
    raise CheckpointError(
        f"{path} is neither a Hugging Face folder (config.json, tokenizer, *.safetensors) nor a "
        "folder of a run; name one, or make one of Megatron's checkpoint with kimisys export"
    )


@contextmanager
def served(
    model: ModelFolder,
    dtype: Dtype,
    max_length: int,
    tensor_parallel: int = 1,
    seed: int = 0,
    timeout_seconds: float = 240.0,
) -> Iterator[Engines]:
    """One engine that serves the folder's weights as `VERSION`, verified by digest."""
    with processes(timeout_seconds, "") as (actors, sockets):
        engines = Engines(
            actors,
            model.folder,
            dtype,
            max_length,
            tensor_parallel=tensor_parallel,
            seed=seed,
            timeout_seconds=timeout_seconds,
        )
        engines.start()
        checkpoint = open_checkpoint(model.folder)
        snapshot = snapshot_layout(checkpoint.layout, dtype)
        with Publisher(checkpoint.layout, snapshot, 0, sockets / "rank0") as publisher:
            publisher.publish(VERSION, checkpoint.buffers)
            engines.connect([publisher.address])
            engines.update(VERSION)
            yield engines
