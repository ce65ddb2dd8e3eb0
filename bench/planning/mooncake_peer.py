"""mooncake.reshard plans the same placement; its planner proves coverage too."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import prod

from mooncake.reshard.weight import (
    LogicalTransferPlan,
    OwnershipAxis,
    ParallelRank,
    ParallelTopology,
    PlacementFragment,
    PlanningLimits,
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
    """Its placements of the source and of the destination: whole experts with declared owners."""
    size = itemsize(placement.dtype)
    owned = (OwnershipAxis("pp"), OwnershipAxis("ep"))
    tensors, sides = [], ([], [])
    for name, layer, expert, _, shape in placement.matrices():
        tensors.append(
            TensorDescriptor(
                tensor_id=name,
                global_shape=shape,
                dtype=placement.dtype,
                itemsize=size,
                shard_dims=(),
                layout_fingerprint=hashlib.sha256(b"row-major").hexdigest(),
                parallel_axes=owned,
                layer_id=layer,
                expert_id=expert,
            )
        )
        stage, source = divmod(placement.source_rank(layer, expert), placement.source_expert_ranks)
        owners = (
            ParallelRank(pp=stage, ep=source),
            ParallelRank(ep=placement.destination_rank(expert)),
        )
        for side, owner in zip(sides, owners, strict=True):
            side.append(PlacementFragment(name, (0, 0), shape, prod(shape) * size, owner))
    stages, ranks = placement.source_stages, placement.source_expert_ranks
    return (
        _manifest("source", stages, ranks, tensors, sides[0]),
        _manifest("destination", 1, placement.destination_ranks, tensors, sides[1]),
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
