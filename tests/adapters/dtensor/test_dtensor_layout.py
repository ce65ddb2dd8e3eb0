"""Layouts of DTensors against DTensor's own gather, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dtensor_ranks
import pytest
import torch
import torch.distributed as dist
from megatron_ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from kimisys.adapters.dtensor.layout import dtensor_buffers, dtensor_layout
from kimisys.errors import LayoutError, TraceError


@pytest.mark.parametrize(
    ("work", "world"),
    [
        (dtensor_ranks.fsdp, 2),
        (dtensor_ranks.fsdp_over_tensor_parallel, 4),
        (dtensor_ranks.placements, 4),
        (dtensor_ranks.renamed, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_shards_and_whole_tensors_are_the_same_both_ways(
    tmp_path: Path, work: Callable[..., None], world: int
) -> None:
    run_ranks(world, work, tmp_path, deadline=240)


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """This process as rank 5 of eight that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("eight_ranks")
def test_a_partial_tensor_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (8,))
    held = {"w": DTensor.from_local(torch.ones(4), mesh, [Partial()])}
    with pytest.raises(LayoutError, match=r"'w' of rank 5 is placed as P.*redistribute"):
        dtensor_layout(held, 5)


@pytest.mark.usefixtures("eight_ranks")
def test_a_local_tensor_of_another_shape_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (8,))
    local = DTensor.from_local(
        torch.ones(3, 2), mesh, [Shard(0)], shape=torch.Size((8, 2)), stride=(2, 1)
    )
    with pytest.raises(LayoutError, match=r"'w' of rank 5 has a local shape of \(3, 2\)"):
        dtensor_layout({"w": local}, 5)


@pytest.mark.usefixtures("eight_ranks")
def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))["tp"]
    other = DeviceMesh("cpu", [0, 1])
    held = {
        "here": DTensor.from_local(torch.ones(2), mesh, [Shard(0)]),
        "there": DTensor.from_local(torch.ones(0), other, [Shard(0)]),
    }
    layout = dtensor_layout(held, 5)
    [fragment] = layout.fragments
    assert (fragment.tensor, fragment.region.offset) == ("here", (2,))
    assert list(dtensor_buffers(held, 5)) == [(5, "here")]


def test_what_cannot_be_a_buffer_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"'w' of rank 0 has strides \(1, 2\)"):
        dtensor_layout({"w": torch.ones(3, 2).T.reshape(2, 3).as_strided((2, 3), (1, 2))}, 0)
    with pytest.raises(LayoutError, match="'w' of rank 0 is on meta"):
        dtensor_buffers({"w": torch.ones(3, device="meta")}, 0)
    with pytest.raises(LayoutError, match="complex64"):
        dtensor_layout({"w": torch.ones(3, dtype=torch.complex64)}, 0)


def test_a_converter_that_computes_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="'w2'"):
        dtensor_layout({"w": torch.ones(3)}, 0, lambda given: {"w2": given["w"] * 2})


def test_tied_parameters_are_one_buffer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    layout = dtensor_layout(model, 0)
    assert [b.name for b in layout.buffers] == ["0.bias", "0.weight", "1.bias"]
