"""One process that answers as any rank of any engine, for vLLM's constructors and loaders.

They ask process groups for sizes and ranks. The groups here know these and cannot communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import vllm.distributed.parallel_state as parallel_state
from vllm.distributed import utils as partitions
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.models import utils as model_parts

from kimisys.adapters.vllm.parallel import EngineParallel


@dataclass(frozen=True)
class Group:
    """What a model's constructor and loader ask of a process group; it cannot communicate."""

    world_size: int = 1
    rank_in_group: int = 0

    @property
    def rank(self) -> int:
        return self.rank_in_group

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    @property
    def device_group(self) -> Members:
        return Members(self.world_size, self.rank_in_group)

    @property
    def cpu_group(self) -> Members:
        return Members(self.world_size, self.rank_in_group)


@dataclass(frozen=True)
class Members:
    """What is asked of the torch group inside a group."""

    count: int
    own: int

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.own


def _groups(parallel: EngineParallel, rank: int) -> dict[str, Group]:
    """vLLM's module-level groups by name, as `initialize_model_parallel` would set them."""
    at = parallel.place(rank)
    return {
        "_TP": Group(parallel.tensor, at.tensor),
        "_PP": Group(parallel.pipeline, at.pipeline),
        "_DP": Group(parallel.data, at.data),
        "_EP": Group(parallel.data * parallel.tensor, at.data * parallel.tensor + at.tensor),
        "_PCP": Group(),  # context parallelism splits tokens, no weights
        "_DCP": Group(),
    }


@contextmanager
def as_rank(parallel: EngineParallel, rank: int, layers: range | None = None) -> Iterator[None]:
    """This process answers as that rank, for model constructors and loaders.

    layers: those that constructors make, as if the rank's pipeline stage had no others; None: all
    of its stage. Everything that is replaced is put back, a running engine's groups too.
    """
    groups = _groups(parallel, rank)
    saved: dict[str, Any] = {name: getattr(parallel_state, name) for name in groups}
    ropes = dict(rotary_embedding._ROPE_DICT)
    missing = dict(model_parts._model_to_pp_missing_layer_names)
    maps: Any = ExpertMapManager
    calculate = maps._calculate_expert_maps

    def calculate_on_cpu(manager: ExpertMapManager) -> None:
        # Loaders read these maps; on the meta device they would hold nothing.
        with torch.device("cpu"):
            calculate(manager)

    parts: Any = partitions
    indices = parts.get_pp_indices

    def window(count: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
        if layers is None:
            found: tuple[int, int] = indices(count, pp_rank, pp_size)
            return found
        return layers.start, layers.stop

    try:
        for name, group in groups.items():
            # Not GroupCoordinators, and they must not be, as those communicate.
            setattr(parallel_state, name, group)
        maps._calculate_expert_maps = calculate_on_cpu
        parts.get_pp_indices = window
        # vLLM remembers the missing layers by a model's address, which the next model may have.
        model_parts._model_to_pp_missing_layer_names.clear()
        yield
    finally:
        maps._calculate_expert_maps = calculate
        parts.get_pp_indices = indices
        for name, before in saved.items():
            setattr(parallel_state, name, before)
        model_parts._model_to_pp_missing_layer_names.clear()
        model_parts._model_to_pp_missing_layer_names.update(missing)
        # vLLM shares rotary embeddings between models by their shape; one on meta must not stay.
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(ropes)
