"""One rank that saves a checkpoint with Megatron's own dist_checkpointing.

A script: Megatron's writer starts processes of its own. Arguments: rank, tensor- and
pipeline-parallel size, port, the Hugging Face folder to load, the folder to save into.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.reshard import plan
from kimisys.reshard.safetensors import open_checkpoint


def main(rank: int, shards: int, stages: int, port: int, folder: Path, into: Path) -> None:
    from megatron.core import dist_checkpointing

    torch.set_num_threads(1)
    config = json.loads((folder / "config.json").read_text())
    runtime.initialize(shards, stages, rank, shards * stages, "127.0.0.1", port, 0, 120.0, config)
    model = build_model(config, torch.float32)
    checkpoint = open_checkpoint(folder)
    wanted = model_layout(model, config, rank)
    plan(checkpoint.layout, wanted).execute(checkpoint.buffers, model_buffers(model, rank))
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(into))
    runtime.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), Path(sys.argv[5]), Path(sys.argv[6]))
