"""The layout of a whole Megatron job from a configuration: no weights, no GPU, no other rank.

A layer is asked for once per kind and per share of it that a rank can hold: Megatron builds it on
the meta device over a fake process group and says what it holds. Which rank has which share, and
which stage has which layers, Megatron is asked too. What comes out is symbolic: a block for each
kind of layer, an instance for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.families import (
    Converter,
    Family,
    FamilyReader,
    check_model,
    family_of,
)
from kimisys.adapters.megatron.families.part import Part
from kimisys.adapters.megatron.model import build_chunk, transformer_config
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.megatron.rules import Holding, TracedPart, holdings
from kimisys.adapters.megatron.seats import Seat, seats
from kimisys.adapters.megatron.shards import memory_of, model_shards
from kimisys.adapters.megatron.stages import Chunk, stage_chunks
from kimisys.errors import LayoutError
from kimisys.reshard import (
    Block,
    Buffer,
    Fragment,
    Instance,
    Layout,
    Padding,
    SymbolicLayout,
    Tensor,
)
from kimisys.reshard.tracer import dtype_name

Share = tuple[int, int, int]


@dataclass(frozen=True)
class _Piece:
    """What a rank of some share holds of one part: `holding`, and the bytes of its parameters."""

    holding: Holding
    nbytes: Mapping[str, int]


def offline_layout(
    hf_config: Mapping[str, Any],
    parallel: Parallel,
    dtype: str = "bfloat16",
    family: FamilyReader | None = None,
    converter: Converter | None = None,
    grouped_experts: bool = False,
) -> SymbolicLayout:
    """What `model_layout` says on every rank of `parallel`, without any of them.

    hf_config: the contents of config.json. dtype: of the parameters, kimisys' name of it; what
    Megatron keeps in another keeps that. family, converter: as `family_of` takes them.
    grouped_experts: a layer's experts in two parameters instead of one by one. The label of a layer
    is its number. Raises LayoutError, saying what would be legal, when the model cannot be laid out
    so.
    """
    known = family_of(hf_config, family, converter)
    check_model(known, parallel)
    config = transformer_config(known, parallel, getattr(torch, dtype), grouped_experts)
    everyone = seats(parallel)
    with runtime.as_rank(parallel, 0):  # a custom pipeline layout asks whether there are chunks
        chunks = [chunk for s in range(parallel.pipeline) for chunk in stage_chunks(config, s)]
    pieces = _pieces(known, parallel, getattr(torch, dtype), grouped_experts, everyone)
    return _Writer(known, everyone, chunks, pieces, dtype).layout()
