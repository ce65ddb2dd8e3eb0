"""Whole jobs on both sides in one process, for tests of the way from a trainer to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_worlds import Memory, memory
from own_loading import loaded_by_vllm
from tiny_checkpoints import checkpoint, family_config, memory_layout, write_config

from kimisys.adapters.megatron.offline import offline_layout
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.vllm.layout import offline_config
from kimisys.adapters.vllm.offline import engine_layout
from kimisys.adapters.vllm.parallel import EngineParallel
from kimisys.reshard import Block, Instance, Place, SymbolicLayout, SymbolicPlan, symbolic_plan

Weights = dict[str, torch.Tensor]

LAYERS = {"num_hidden_layers": 4}


@dataclass(frozen=True)
class Model:
    """config.json in a folder, and random float32 weights by their Hugging Face names."""

    folder: Path
    config: dict[str, Any]
    masters: Weights

    @staticmethod
    def make(folder: Path, family: str, tied: bool = False, **overrides: Any) -> Model:
        write_config(folder, tied, family, **LAYERS | overrides)
        config = family_config(family, tied, **LAYERS | overrides)
        return Model(folder, config, checkpoint(folder, seed=11))

    @property
    def given(self) -> Weights:
        """The weights as checkpoints have them: bfloat16, but for the router's bias."""
        return {
            name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
            for name, tensor in self.masters.items()
        }

    def loaded(self, parallel: EngineParallel, given: Weights) -> Memory:
        """What vLLM's own loader makes of a checkpoint on all ranks, in bfloat16: its parameters'
        bytes. Replicas are equal."""
        vllm = offline_config(self.folder, "bfloat16")
        engine = {
            (rank, name): bits(parameter)
            for rank in range(parallel.engine_size)
            for name, parameter in loaded_by_vllm((vllm, given), parallel, rank).items()
        }
        return {
            (replica * parallel.engine_size + rank, name): parameter
            for replica in range(parallel.replicas)
            for (rank, name), parameter in engine.items()
        }


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's bytes: uint8[nbytes]."""
    found: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return found


def flat(weights: Weights) -> Memory:
    """The memory behind `whole`."""
    return {(0, name): bits(tensor) for name, tensor in weights.items()}


def sides(
    config: Mapping[str, Any],
    train: str,
    infer: str,
    dtype: str = "bfloat16",
    grouped: bool = False,
) -> tuple[SymbolicLayout, SymbolicLayout]:
    """Megatron's ranks and vLLM's, each on a node of its own."""
    source = offline_layout(config, Parallel.parse(train), dtype, grouped_experts=grouped)
    engine = engine_layout(config, source.tensors, EngineParallel.parse(infer), "bfloat16")
    return on_nodes(source, 0), on_nodes(engine, len(source.ranks))


def on_nodes(side: SymbolicLayout, first: int) -> SymbolicLayout:
    """A node for each rank, from node `first` on."""
    return SymbolicLayout(side.blocks, [Place(rank, first + rank) for rank in side.ranks])


def whole(weights: Weights) -> SymbolicLayout:
    """Whole tensors on one rank, as a checkpoint has them."""
    return SymbolicLayout([Block(memory_layout(weights), [Instance("", [0])])])


def table(layout: SymbolicLayout) -> set[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of a side's tensors."""
    return {(t.name, t.dtype, t.shape) for t in layout.tensors}


def by_destination(made: SymbolicPlan, sources: Memory) -> Memory:
    """Each destination rank executes its own slice, on its own memory alone."""
    landed: Memory = {}
    for rank in made.destination.ranks:
        part = made.of_rank(rank)
        own = memory(part.destination)
        part.execute(sources, own)
        landed |= own
    return landed


def by_source(made: SymbolicPlan, sources: Memory) -> Memory:
    """Each source rank executes its share, of its own memory alone; the destination begins with
    other bytes than in `by_destination`, so that a byte that nobody writes cannot be equal."""
    landed = {key: ~array for key, array in memory(made.destination.concrete()).items()}
    for rank in made.source.ranks:
        own = {key: array for key, array in sources.items() if key[0] == rank}
        made.of_source(rank).execute(own, landed)
    return landed


def gathered(layout: SymbolicLayout, held: Memory, like: Weights) -> Memory:
    """From what all ranks hold to whole tensors of the names, dtypes and shapes of `like`."""
    return by_destination(symbolic_plan(layout, whole(like)), held)


def assert_same(found: Memory, expected: Memory) -> None:
    """The same buffers with the same bytes."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:8]
    for (rank, name), array in expected.items():
        assert np.array_equal(found[rank, name], array), f"{name} of rank {rank}"
