"""mooncake.reshard plans the same placement; its planner proves coverage too."""

from __future__ import annotations

from collections import Counter
from math import prod

from mooncake.reshard.weight import (
    LogicalTransferPlan,
    OwnershipAxis,
    ParallelRank,
    ParallelTopology,
    PlacementFragment,
    PlanningLimits,
    SplitAxis,
    TensorDescriptor,
    TopologyParticipant,
    WeightPlacementManifest,
    plan_placement_transfer,
)

from bench.planning.experts import ExpertPlacement, Traffic
from kimisys.reshard import itemsize

LIMITS = PlanningLimits(
    max_transfer_regions=1 << 40,
    max_segments_per_region=1 << 40,
    max_total_lowered_segments=1 << 40,
)
"""So high that none of its refusals of size stands in the way."""


def manifests(
    placement: ExpertPlacement,
) -> tuple[WeightPlacementManifest, WeightPlacementManifest]:
    """Its placements of the source and of the destination: whole experts with declared owners, or
    stacked experts split among the expert ranks."""
    size = itemsize(placement.dtype)
    tensors: dict[str, TensorDescriptor] = {}
    sides: tuple[list[PlacementFragment], list[PlacementFragment]] = [], []
    grid = placement.source_expert_ranks, placement.destination_ranks
    for side, pieces, ranks in zip(
        sides, (placement.source(), placement.destination()), grid, strict=True
    ):
        for name, shape, layer, expert, rank, offset, extent in pieces:
            if name not in tensors:
                split = SplitAxis("ep", 0) if expert is None else OwnershipAxis("ep")
                tensors[name] = TensorDescriptor(
                    tensor_id=name,
                    global_shape=shape,
                    dtype=placement.dtype,
                    itemsize=size,
                    shard_dims=(0,) if expert is None else (),
                    layout_fingerprint="row-major",
                    parallel_axes=(OwnershipAxis("pp"), split),
                    layer_id=layer,
                    expert_id=expert,
                )
            stage, owner = divmod(rank, ranks)
            at = ParallelRank(pp=stage, ep=owner)
            side.append(PlacementFragment(name, offset, extent, prod(extent) * size, at))
    described = list(tensors.values())
    return (
        _manifest("source", placement.source_stages, grid[0], described, sides[0]),
        _manifest("destination", 1, grid[1], described, sides[1]),
    )


def _manifest(
    name: str,
    stages: int,
    ranks: int,
    tensors: list[TensorDescriptor],
    fragments: list[PlacementFragment],
) -> WeightPlacementManifest:
    participants = tuple(
        TopologyParticipant(f"{stage:03d}-{rank:03d}", ParallelRank(pp=stage, ep=rank))
        for stage in range(stages)
        for rank in range(ranks)
    )
    return WeightPlacementManifest.from_fragments(
        resource_id="experts",
        revision="1",
        weight_generation=1,
        placement_set_id=name,
        topology=ParallelTopology(
            tp_size=1, pp_size=stages, ep_size=ranks, dp_size=1, participants=participants
        ),
        tensors=tensors,
        fragments=fragments,
    )


def planned(
    source: WeightPlacementManifest, destination: WeightPlacementManifest
) -> LogicalTransferPlan:
    """Its plan, with its proof."""
    return plan_placement_transfer(source, destination, planning_limits=LIMITS)


def traffic_of(plan: LogicalTransferPlan, source_expert_ranks: int) -> Traffic:
    """What its plan moves, in our numbering of the ranks."""
    total: Traffic = Counter()
    for region in plan.operations:
        source = region.source.rank.pp * source_expert_ranks + region.source.rank.ep
        total[source, region.target.rank.ep] += region.total_bytes
    return total
