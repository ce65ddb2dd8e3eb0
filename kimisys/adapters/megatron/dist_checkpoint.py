"""A checkpoint that Megatron's own dist_checkpointing wrote, as a layout to read from.

The format unpickles when it is read (`.metadata`, `common.pt`): open only what you trust.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.errors import CheckpointError
from kimisys.reshard import Layout


def is_dist_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one, by what it contains."""
    return (folder / "metadata.json").is_file() and (folder / ".metadata").is_file()


@contextmanager
def open_dist_checkpoint(
    folder: Path, hf_config: Mapping[str, Any]
) -> Iterator[tuple[Layout, dict[tuple[int, str], np.ndarray]]]:
    """The whole model of a checkpoint saved at any parallel sizes, in float32, in this process.

    hf_config: the config.json's contents of the same model; Megatron's checkpoint does not hold it.
    Inside the block: layout and buffers, as `Plan.execute` takes them. Raises CheckpointError when
    the folder is not such a checkpoint or is of another model, LayoutError for a model that is not
    supported, RuntimeError where process groups exist already.
    """
    if not is_dist_checkpoint(folder):
        raise CheckpointError(
            f"{folder} holds no metadata.json and .metadata, so it is no checkpoint of Megatron's "
            "dist_checkpointing; name the folder of one iteration, as in iter_0000100"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    runtime.initialize(1, 1, 0, 1, "127.0.0.1", port, seed=0, hf_config=hf_config)
    try:
        model = build_model(hf_config, torch.float32)
        _load(model, folder)
        yield model_layout(model, hf_config, 0), model_buffers(model, 0)
    finally:
        runtime.shutdown()


def _load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what megatron-core 0.16.1 calls
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
        model.load_state_dict(state["model"])
    # whatever torch, pickle and Megatron find wrong with the files
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise CheckpointError(
            f"{folder} cannot be loaded into the model of the given configuration: {reason}; see "
            "whether it is of this model, and complete"
        ) from error
