"""`kimisys export`: a checkpoint of a run, or of Megatron, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from kimisys.adapters.megatron.dist_checkpoint import is_dist_checkpoint, open_dist_checkpoint
from kimisys.reshard import Layout, Tensor, plan
from kimisys.reshard.safetensors import create_checkpoint, open_checkpoint
from kimisys.trainer.config import ConfigError
from kimisys.trainer.model_folder import ModelFolder, open_model, read_model
from kimisys.trainer.serve_config import ExportConfig
from kimisys.trainer.serving import find_weights


def run(config: ExportConfig, console: Console) -> None:
    """Write the folder and say what is in it."""
    with _opened(config) as (model, layout, buffers):
        tensors = [Tensor(t.name, config.dtype, t.shape) for t in layout.tensors]
        with create_checkpoint(config.out, tensors, model.files(config.dtype)) as made:
            moved = plan(layout, made.layout)
            moved.execute(buffers, made.buffers)
    console.print(
        f"{config.out}: {len(tensors)} tensors, {moved.nbytes / 1e6:,.1f} MB in {config.dtype}",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _opened(config: ExportConfig) -> Iterator[tuple[ModelFolder, Layout, Any]]:
    if not is_dist_checkpoint(config.source):
        model = open_model(find_weights(config.source))
        checkpoint = open_checkpoint(model.folder)
        yield model, checkpoint.layout, checkpoint.buffers
        return
    if config.config is None:
        raise ConfigError(
            f"{config.source} is a checkpoint of Megatron, which does not say what its model is; "
            "name a folder with its config.json and tokenizer: --config DIR"
        )
    model = read_model(Path(config.config))
    with open_dist_checkpoint(config.source, model.hf_config) as (layout, buffers):
        yield model, layout, buffers
