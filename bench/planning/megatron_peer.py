"""megatron-core's collective reshard planner on the same placement: rank 0's part of the work.

`build_centralized_reshard_plan` gathers every rank's parameters on rank 0, which plans for all. The
planner is megatron-core's own; what the other ranks would send is made by its own
`extract_param_metadata` beforehand and handed over by stand-ins of five collectives of
`torch.distributed`, so that no pickling and no network is in its time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.resharding import ParameterMetadata, ReshardPlan, build_centralized_reshard_plan
from megatron.core.resharding.utils import _build_layer_module_prefix_map, extract_param_metadata
from torch import nn

from bench.planning.experts import ExpertPlacement, Traffic
from kimisys.reshard import itemsize

LINEARS = {"gate_proj": "linear_gate", "up_proj": "linear_up", "down_proj": "linear_fc2"}


@dataclass(frozen=True)
class Setting:
    """What rank 0 holds and what it hears. sizes: a parameter's shape by its local name."""

    source: nn.Module
    destination: nn.Module
    heard: tuple[list[list[ParameterMetadata]], list[list[ParameterMetadata]]]
    experts: int
    source_ranks: int
    itemsize: int


def setting(placement: ExpertPlacement) -> Setting:
    """Both models of every rank on the meta device; the destination's ranks follow the source's."""
    sources, ranks = placement.source_ranks, placement.destination_ranks
    heard: tuple[list[Any], list[Any]] = ([], [])
    kept: list[nn.Module] = []
    held = placement.experts // placement.source_expert_ranks
    wanted = placement.experts // ranks
    with _collectives(sources + ranks, heard):
        for rank in range(sources + ranks):
            stage, _ = divmod(rank, placement.source_expert_ranks)
            here = [i for i in range(placement.layers) if placement.stage(i) == stage]
            first = stage * placement.source_expert_ranks
            stage_ranks = list(range(first, first + placement.source_expert_ranks))
            all_ranks = list(range(sources, sources + ranks))
            source = _model(placement, rank, stage_ranks, here, held if rank < sources else 0)
            layers = list(range(placement.layers))
            destination = _model(
                placement, rank, all_ranks, layers, wanted if rank >= sources else 0
            )
            for model, side in zip((source, destination), heard, strict=True):
                side.append(_metadata(model, rank, placement.experts))
            if rank == 0:
                kept = [source, destination]
    size = itemsize(placement.dtype)
    return Setting(kept[0], kept[1], heard, placement.experts, sources, size)


def planned(given: Setting) -> list[ReshardPlan]:
    """The plans of all ranks, as its rank 0 makes them."""
    sent: list[ReshardPlan] = []
    with _collectives(len(given.heard[0]), given.heard, sent):
        build_centralized_reshard_plan(given.source, given.destination, given.experts)
    return sent


def traffic_of(plans: list[ReshardPlan], given: Setting) -> Traffic:
    """What its plans move, in our numbering of the ranks."""
    total: Traffic = Counter()
    for rank, (plan, held) in enumerate(zip(plans, given.heard[1], strict=True)):
        shapes = {metadata.name: metadata.shape for metadata in held}
        for operation in plan.recv_ops:
            extents = (
                len(range(*cut.indices(length)))
                for cut, length in zip(
                    operation.my_slice, shapes[operation.param_name], strict=True
                )
            )
            pair = operation.peer_rank, rank - given.source_ranks
            total[pair] += prod(extents) * given.itemsize
    return total


def _model(
    placement: ExpertPlacement, rank: int, ranks: list[int], layers: list[int], held: int
) -> nn.Module:
    """A skeleton with a Megatron model's names and attributes: `held` experts of each layer."""
    shapes = {LINEARS[kind]: shape for kind, shape in placement.matrices.items()}
    dtype = getattr(torch, placement.dtype)
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList()
    for number in layers if held else []:
        layer, experts = nn.Module(), nn.Module()
        layer.layer_number = number + 1
        layer.mlp = nn.Module()
        layer.mlp.experts = experts
        for name, shape in shapes.items():
            linear = nn.Module()
            for i in range(held):
                weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
                weight.allreduce = False
                weight.tensor_model_parallel = True
                weight.partition_dim = 1 if name == "linear_fc2" else 0
                weight.partition_stride = 1
                linear.register_parameter(f"weight{i}", weight)
            experts.add_module(name, linear)
        model.decoder.layers.append(layer)
    alone = [rank]
    model.pg_collection = SimpleNamespace(tp=alone, expt_tp=alone, ep=ranks, dp=ranks, pp=alone)
    return model


def _metadata(model: nn.Module, rank: int, experts: int) -> list[ParameterMetadata]:
    prefixes = _build_layer_module_prefix_map(model)
    return [
        extract_param_metadata(parameter, name, rank, model.pg_collection, experts, prefixes)
        for name, parameter in model.named_parameters()
    ]


@contextmanager
def _collectives(
    world: int, heard: tuple[list[Any], list[Any]], sent: list[ReshardPlan] | None = None
) -> Iterator[None]:
    """torch.distributed as rank 0 of `world` ranks sees it; a group is the list of its ranks."""
    answers = iter(heard)

    def gather(into: list[Any], own: list[Any]) -> None:
        into[:] = next(answers)
        assert into[0] == own

    def broadcast(plans: list[ReshardPlan], src: int) -> None:
        if sent is not None:
            sent[:] = plans

    stand_ins = {
        "get_rank": lambda: 0,
        "get_world_size": lambda: world,
        "get_process_group_ranks": lambda group: group,
        "all_gather_object": gather,
        "broadcast_object_list": broadcast,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.distributed, name, stand_in))
        yield
