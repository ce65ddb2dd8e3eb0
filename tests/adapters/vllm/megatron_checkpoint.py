"""A tensor-parallel Megatron model with random weights, saved as a checkpoint through a plan.

A script, as Megatron's process groups and patches are no company for vLLM's. Arguments: a folder
with config.json, the number of ranks, the folder to make, and one for what is compared with it:
layout.json and buffers.npz, the bytes of each rank's parameters by "rank/name".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.layout import model_buffers, model_layout
from kimisys.adapters.megatron.model import build_model
from kimisys.reshard import Layout, plan
from kimisys.reshard.safetensors import create_checkpoint


def main(model: Path, ranks: int, checkpoint: Path, memory: Path) -> None:
    text = (model / "config.json").read_text()
    config = json.loads(text)
    layouts, buffers = [], {}
    for rank in range(ranks):
        with runtime.offline(ranks, 1, rank, ranks):
            built = build_model(config, torch.float32)
            randomize(built, seed=rank)
            layouts.append(model_layout(built, config, rank))
            buffers |= model_buffers(built, rank)
    layout = Layout.merge(layouts)
    with create_checkpoint(checkpoint, layout.tensors, {"config.json": text}) as made:
        plan(layout, made.layout).execute(buffers, made.buffers)
    memory.mkdir()
    (memory / "layout.json").write_text(layout.to_json())
    np.savez(memory / "buffers.npz", **{f"{rank}/{name}": a for (rank, name), a in buffers.items()})


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter, padding of the vocabulary too; whole ones alike at every rank."""
    for name, parameter in model.named_parameters():
        norm = "norm" in name
        generator = torch.Generator().manual_seed(sum(name.encode()) * 16 + (0 if norm else seed))
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.15 + (1.0 if norm else 0.0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
