"""What docs/reshard.md says that other planners refuse, or get wrong, asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mooncake.reshard.weight import (
    OwnershipAxis,
    ParallelRank,
    ParallelTopology,
    PlacementFragment,
    TensorDescriptor,
    TopologyParticipant,
    WeightPlacementManifest,
    plan_placement_transfer,
)
from torch import nn
from vllm.distributed.weight_transfer.m2n_common import (
    REPLICATE,
    M2NMesh,
    check_placements,
    check_transferable,
    validate_layout,
)
from vllm.distributed.weight_transfer.m2n_layout import resolve_parameter_destinations

from bench.planning import megatron_peer
from bench.planning.megatron_peer import Setting

# -- mooncake.reshard ------------------------------------------------------------------------------

WHOLE = TensorDescriptor(
    tensor_id="w",
    global_shape=(8, 4),
    dtype="bfloat16",
    itemsize=2,
    shard_dims=(),
    layout_fingerprint="row-major",
    parallel_axes=(OwnershipAxis("pp"),),
)


def manifest(tensor: TensorDescriptor = WHOLE, rows: int | None = None) -> WeightPlacementManifest:
    """One rank that holds the first `rows` rows of a matrix, or all."""
    extent = (tensor.global_shape[0] if rows is None else rows, tensor.global_shape[1])
    nbytes = extent[0] * extent[1] * tensor.itemsize
    rank = ParallelRank()
    return WeightPlacementManifest.from_fragments(
        resource_id="r",
        revision="1",
        weight_generation=1,
        placement_set_id="s",
        topology=ParallelTopology(
            tp_size=1,
            pp_size=1,
            ep_size=1,
            dp_size=1,
            participants=(TopologyParticipant("p", rank),),
        ),
        tensors=[tensor],
        fragments=[PlacementFragment(tensor.tensor_id, (0, 0), extent, nbytes, rank)],
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dtype": "float32", "itemsize": 4}, "tensor descriptor mismatch: w"),  # a cast
        ({"global_shape": (10, 4)}, "tensor descriptor mismatch: w"),  # padded rows on one side
        ({"layout_fingerprint": "fused"}, "layout mismatch for tensor w"),
        ({"tensor_id": "qkv"}, "target manifests are missing tensors: w"),  # a fused name
    ],
)
def test_mooncake_wants_the_same_tensors_on_both_sides(other: dict[str, Any], message: str) -> None:
    assert plan_placement_transfer(manifest(), manifest()).total_bytes == 64
    with pytest.raises(ValueError, match=message):
        plan_placement_transfer(manifest(), manifest(replace(WHOLE, **other)))


def test_mooncake_refuses_a_gap() -> None:
    with pytest.raises(ValueError, match="not fully covered: w"):
        manifest(rows=7)


# -- megatron.core.resharding ----------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A parameter of a rank: its name, shape, and whether it is an expert's."""

    name: str
    shape: tuple[int, int]
    expert: bool = False


def megatron_model(held: list[Held], rank: int, **groups: list[int]) -> nn.Module:
    model = nn.Module()
    for each in held:
        *path, leaf = each.name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        parameter = nn.Parameter(torch.empty(each.shape, device="meta"))
        parameter.allreduce = not each.expert
        parameter.tensor_model_parallel, parameter.partition_dim = True, 0
        module.register_parameter(leaf, parameter)
    alone = [rank]
    of_rank = {"tp": alone, "expt_tp": alone, "ep": alone, "dp": [0, 1], "pp": alone}
    model.pg_collection = SimpleNamespace(**{**of_rank, **groups})
    return model


def megatron_plans(sources: list[nn.Module], destinations: list[nn.Module], experts: int) -> Any:
    heard: Any = ([], [])
    with megatron_peer._collectives(len(sources), heard):
        for side, models in zip(heard, (sources, destinations), strict=True):
            side.extend(megatron_peer._metadata(m, r, experts) for r, m in enumerate(models))
    return megatron_peer.planned(Setting(sources[0], destinations[0], heard, experts, 0, 2))


def experts_of(count: int, rank: int, **groups: list[int]) -> nn.Module:
    """A SequentialMLP: expert i of a rank is called local_experts.i."""
    names = [f"mlp.experts.local_experts.{i}.linear_fc1.weight" for i in range(count)]
    return megatron_model([Held(name, (4, 4), True) for name in names], rank, **groups)


def test_megatron_core_takes_sequential_experts_for_one_another() -> None:
    whole = [experts_of(4, rank) for rank in range(2)]
    halves = [experts_of(2, rank, ep=[0, 1]) for rank in range(2)]
    with pytest.raises(RuntimeError, match=r"local_experts\.2\..* on rank 0 not found"):
        megatron_plans(halves, whole, 4)
    second = megatron_plans(whole, halves, 4)[1].recv_ops
    # rank 1's local experts 0 and 1 are the model's 2 and 3; they are filled from 0 and 1
    assert [operation.param_name for operation in second] == [
        f"mlp.experts.local_experts.{i}.linear_fc1.weight" for i in range(2)
    ]
    sent = megatron_plans(whole, halves, 4)[0].send_ops
    assert {operation.param_name.split(".")[3] for operation in sent} == {"0", "1"}


def test_megatron_core_refuses_a_vocabulary_padded_differently() -> None:
    halves = [
        megatron_model([Held("embedding.weight", (64, 4))], rank, tp=[0, 1], dp=[rank])
        for rank in range(2)
    ]
    whole = [megatron_model([Held("embedding.weight", (120, 4))], rank) for rank in range(2)]
    with pytest.raises(RuntimeError, match=r"src_local=2\*64 != 1\*120"):
        megatron_plans(halves, whole, 0)


# -- vLLM's nccl_m2n -------------------------------------------------------------------------------


def test_nccl_m2n_refuses_two_sharded_axes_four_dimensions_and_uneven_cuts() -> None:
    with pytest.raises(ValueError, match="needs one REPLICATE mesh axis"):
        check_placements((0, 1))
    with pytest.raises(ValueError, match=r"supports rank 1\.\.3"):
        check_transferable("w", torch.bfloat16, (2, 2, 2, 2))
    with pytest.raises(ValueError, match="does not divide evenly"):
        validate_layout(M2NMesh((2, 1), 0), (0, REPLICATE), (5, 4), "source")


def test_nccl_m2n_sends_fused_parameters_whole_to_every_rank() -> None:
    model = nn.Module()
    model.qkv_proj = nn.Linear(4, 12, bias=False)
    (found,) = resolve_parameter_destinations(
        model,
        ["q_proj.weight"],
        [torch.float32],
        [(4, 4)],
        num_workers=2,
        shard_axis_size=2,
        allow_direct=True,
    )
    assert not found.direct and found.placements is None
