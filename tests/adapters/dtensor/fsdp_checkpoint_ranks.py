"""What each FSDP2 rank of the tests with transformers' models does, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dtensor_ranks import full, gathered, start
from tiny_checkpoints import random_model
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from kimisys.adapters.dtensor.hugging_face import checkpoint_converter
from kimisys.adapters.dtensor.layout import dtensor_buffers, dtensor_layout, named_tensors
from kimisys.reshard import Layout, plan
from kimisys.reshard.safetensors import new_checkpoint, open_checkpoint, open_for_writing


def sharded_model(folder: Path, seed: int) -> PreTrainedModel:
    model = random_model(folder, seed)
    for module in list(model.modules()):
        if type(module).__name__.endswith(("DecoderLayer", "VisionBlock")):
            fully_shard(module)
    fully_shard(model)
    return model


def save_and_load(rank: int, world: int, _port: int, folder: Path, out: Path) -> None:
    """Leave this rank's layout and bytes in `out`, then a checkpoint of all ranks; then fill the
    shards from the checkpoint in `out`/other."""
    start(rank, world, out)
    model = sharded_model(folder, seed=5)
    layout = dtensor_layout(model, rank, checkpoint_converter(model))
    buffers = dtensor_buffers(model, rank)
    (out / f"{rank}.json").write_text(layout.to_json())
    # arguments of savez may not be called "file"
    names = [name for _, name in buffers]
    np.savez(out / f"{rank}.npz", *[buffers[rank, name] for name in names])
    (out / f"{rank}.txt").write_text("\n".join(names))
    merged, _ = gathered(rank, layout, {})
    save(rank, merged, buffers, out)
    load(rank, model, merged, buffers, out, folder)
    dist.destroy_process_group()


def save(rank: int, merged: Layout, buffers: dict[Any, Any], out: Path) -> None:
    """One checkpoint folder of two files, into which every rank writes its share."""
    tensors = merged.tensors
    files = {"a.safetensors": tensors[::2], "b.safetensors": tensors[1::2]}
    partial: list[Any] = [None]
    context = new_checkpoint(out / "saved", files)
    if rank == 0:
        partial = [str(context.__enter__())]
    dist.broadcast_object_list(partial, 0)
    for name in files:
        with open_for_writing(Path(partial[0]) / name) as file:
            share = plan(merged, file.layout).of_source(rank)
            share.execute(buffers, file.buffers)
    dist.barrier()
    if rank == 0:
        context.__exit__(None, None, None)


def load(
    rank: int,
    model: PreTrainedModel,
    merged: Layout,
    buffers: dict[Any, Any],
    out: Path,
    folder: Path,
) -> None:
    checkpoint = open_checkpoint(out / "other")
    plan(checkpoint.layout, merged).of_rank(rank).execute(checkpoint.buffers, buffers)
    expected = named_tensors(random_model(folder, seed=6))
    found = full(named_tensors(model))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
