"""Which layers each chunk of a pipeline holds: Megatron's own answers, for any stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimisys.adapters.megatron.core import (
    TransformerConfig,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from kimisys.adapters.megatron.parallel import Parallel


@dataclass(frozen=True)
class Chunk:
    """What a rank builds as one model. number: of the stage's chunks; None where there is one.
    layers: by their numbers in the whole model."""

    stage: int
    number: int | None
    layers: tuple[int, ...]
    first: bool
    last: bool

    @property
    def prefix(self) -> str:
        """Before the names of this chunk's parameters, as Megatron's checkpoints write them."""
        return "" if self.number is None else f"model{self.number}."


def stage_chunks(config: TransformerConfig, stage: int) -> list[Chunk]:
    """The chunks of a stage, in order."""
    stages = config.pipeline_model_parallel_size
    count = config.virtual_pipeline_model_parallel_size
    numbers: list[int | None] = [None] if count is None or count == 1 else list(range(count))
    return [
        Chunk(
            stage,
            number,
            _layers(config, stage, number if count is not None else None),
            first=stage == 0 and not number,
            last=stage == stages - 1 and number in (None, (count or 1) - 1),
        )
        for number in numbers
    ]


def _layers(config: TransformerConfig, stage: int, number: int | None) -> tuple[int, ...]:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        # get_num_layers_to_build answers for this process' stage only when there is such a layout
        return tuple(layout.get_layer_id_list(vp_stage=number or 0, pp_rank=stage))
    start = get_transformer_layer_offset(config, number, stage)
    return tuple(range(start, start + get_num_layers_to_build(config, number, stage)))


def pipeline_arguments(parallel: Parallel) -> Mapping[str, Any]:
    """`parallel` as arguments of megatron-core's TransformerConfig."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "num_layers_in_first_pipeline_stage": parallel.first,
        "num_layers_in_last_pipeline_stage": parallel.last,
        "pipeline_model_parallel_layout": parallel.pipeline_layout,
    }
