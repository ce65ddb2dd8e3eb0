"""What each rank of the tests of DTensor layouts does, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from kimisys.adapters.dtensor.layout import dtensor_buffers, dtensor_layout, named_tensors
from kimisys.reshard import Layout, Tensor, plan


def start(rank: int, world: int, folder: Path) -> None:
    """Join a gloo group on loopback, which meets in a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


class Mlp(torch.nn.Module):
    """Odd sizes, so that shards are uneven; one layer is smaller than four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 13)
        self.down = torch.nn.Linear(13, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.register_buffer("steps", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.norm(self.down(torch.relu(self.up(x))))
        return made


def random_mlp(seed: int) -> Mlp:
    torch.manual_seed(seed)
    model = Mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def gathered(rank: int, layout: Layout, buffers: Mapping[Any, np.ndarray]) -> tuple[Any, Any]:
    """All ranks' layouts as one, and all ranks' bytes."""
    made: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(made, (layout.to_json(), dict(buffers)))
    layouts = [Layout.from_json(text) for text, _ in made]
    return Layout.merge(layouts), {key: b for _, held in made for key, b in held.items()}


def whole(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The same tensors, whole, on a rank of their own."""
    return dtensor_layout(tensors, 0)


def full(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DTensor's own gather: the oracle."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def check_both_ways(rank: int, held: Any) -> Layout:
    """From the shards to whole tensors, and other whole tensors into the shards."""
    tensors = named_tensors(held)
    layout, buffers = dtensor_layout(held, rank), dtensor_buffers(held, rank)
    merged, everything = gathered(rank, layout, buffers)
    expected = full(tensors)
    landed = {name: torch.zeros_like(t) for name, t in expected.items()}
    plan(merged, whole(landed)).execute(everything, dtensor_buffers(landed, 0))
    for name, tensor in expected.items():
        assert torch.equal(landed[name], tensor), name

    other = {name: (tensor + 1).contiguous() for name, tensor in expected.items()}
    back = plan(whole(other), merged).of_rank(rank)
    back.execute(dtensor_buffers(other, 0), buffers)
    for name, tensor in full(tensors).items():
        assert torch.equal(tensor, other[name]), name
    return merged


def fsdp(rank: int, world: int, _port: int, folder: Path) -> None:
    start(rank, world, folder)
    model = random_mlp(1)
    fully_shard(model.up)
    fully_shard(model)
    layout = check_both_ways(rank, model)
    assert {t.name for t in layout.tensors} == set(random_mlp(1).state_dict())
    # what a plan wrote, the model computes with, and a step of training is seen in the buffers
    twin = random_mlp(2)
    expected = {name: t.detach().clone() for name, t in full(named_tensors(model)).items()}
    twin.load_state_dict(expected)
    data = torch.randn((4, 6), generator=torch.Generator().manual_seed(rank))
    assert torch.equal(model(data), twin(data))
    model(data).sum().backward()
    buffers = dtensor_buffers(model, rank)
    before = buffers[rank, "up.weight"].copy()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert not np.array_equal(before, buffers[rank, "up.weight"])
    check_both_ways(rank, model)
    dist.destroy_process_group()


def fsdp_over_tensor_parallel(rank: int, world: int, _port: int, folder: Path) -> None:
    start(rank, world, folder)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = random_mlp(3)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert any(
        isinstance(placement, _StridedShard)
        for tensor in named_tensors(model).values()
        if isinstance(tensor, DTensor)
        for placement in tensor.placements
    )
    check_both_ways(rank, model)
    dist.destroy_process_group()


def placements(rank: int, world: int, _port: int, folder: Path) -> None:
    """Every placement on one- and two-dimensional meshes, by distribute_tensor."""
    start(rank, world, folder)
    flat = init_device_mesh("cpu", (world,))
    square = DeviceMesh("cpu", torch.arange(world).reshape(world // 2, 2))
    value = torch.randn((7, 5, 3), generator=torch.Generator().manual_seed(4))
    kinds = [Replicate(), Shard(0), Shard(1), Shard(2)]
    # a replica is the tensor given, not a copy of it
    held = {f"flat {i}": distribute_tensor(value.clone(), flat, [k]) for i, k in enumerate(kinds)}
    for i, first in enumerate(kinds):
        for j, second in enumerate(kinds):
            held[f"square {i} {j}"] = distribute_tensor(value.clone(), square, [first, second])
    held["narrow"] = distribute_tensor(torch.arange(2.0), flat, [Shard(0)])
    held["half"] = distribute_tensor(value.bfloat16(), flat, [Shard(0)])
    check_both_ways(rank, held)
    dist.destroy_process_group()


def renamed(rank: int, world: int, _port: int, folder: Path) -> None:
    """A fused parameter, which the checkpoint keeps as three tensors, two of them transposed."""
    start(rank, world, folder)
    value = torch.arange(12.0 * 5).reshape(12, 5)
    held = {"qkv": distribute_tensor(value, init_device_mesh("cpu", (world,)), [Shard(0)])}

    def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        q, k, v = tensors["qkv"].split([6, 3, 3])
        return {"q.weight": q, "k.weight": k.T, "v.weight": v.T}

    layout = dtensor_layout(held, rank, convert)
    merged, everything = gathered(rank, layout, dtensor_buffers(held, rank))
    assert {t.name: t for t in merged.tensors}["k.weight"] == Tensor("k.weight", "float32", (5, 3))
    expected = {name: t.contiguous() for name, t in convert({"qkv": value}).items()}
    landed = {name: torch.zeros_like(t) for name, t in expected.items()}
    plan(merged, whole(landed)).execute(everything, dtensor_buffers(landed, 0))
    assert all(torch.equal(landed[name], t) for name, t in expected.items())
    dist.destroy_process_group()
