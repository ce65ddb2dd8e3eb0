"""The layout of a whole Megatron job from a configuration: no weights, no GPU, no other rank.

A layer is asked for once per kind and per share of it that a rank can hold: Megatron builds it on
the meta device over a fake process group and says what it holds. Which rank has which share, and
which stage has which layers, Megatron is asked too. What comes out is symbolic: a block for each
kind of layer, an instance for each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from kimisys.adapters import trace_cache
from kimisys.adapters.megatron import runtime
from kimisys.adapters.megatron.blocks import Piece, Pieces, Share, assemble
from kimisys.adapters.megatron.families import (
    Converter,
    Family,
    FamilyReader,
    check_model,
    family_of,
    is_registered_elsewhere,
)
from kimisys.adapters.megatron.model import build_chunk, transformer_config
from kimisys.adapters.megatron.parallel import Parallel
from kimisys.adapters.megatron.rules import holdings
from kimisys.adapters.megatron.seats import Seat, seats
from kimisys.adapters.megatron.shards import memory_of, model_shards
from kimisys.adapters.megatron.stages import stage_chunks
from kimisys.errors import LayoutError
from kimisys.reshard import SymbolicLayout

_DTYPES = ("bfloat16", "float16", "float32")
"""What Megatron keeps parameters in."""


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
    so; RuntimeError where process groups exist already.
    """
    if dtype not in _DTYPES:
        raise LayoutError(f"dtype {dtype!r} is not one of parameters: give {' or '.join(_DTYPES)}")
    known = family_of(hf_config, family, converter)
    check_model(known, parallel)

    def trace() -> SymbolicLayout:
        return _trace(known, parallel, dtype, grouped_experts)

    if family is not None or converter is not None or is_registered_elsewhere(hf_config):
        return trace()  # code that the cache's key does not know
    key = {
        "config": dict(hf_config),
        "parallel": asdict(parallel),
        "dtype": dtype,
        "grouped_experts": grouped_experts,
        **trace_cache.asked(["megatron-core"], ["adapters/megatron"]),
    }
    return trace_cache.cached(
        "megatron", key, trace, SymbolicLayout.to_bytes, SymbolicLayout.from_bytes
    )


def _trace(family: Family, parallel: Parallel, dtype: str, grouped_experts: bool) -> SymbolicLayout:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how best to train so is not the question here
        return _asked(family, parallel, dtype, getattr(torch, dtype), grouped_experts)


def _asked(
    family: Family,
    parallel: Parallel,
    dtype: str,
    torch_dtype: torch.dtype,
    grouped_experts: bool,
) -> SymbolicLayout:
    config = transformer_config(family, parallel, torch_dtype, grouped_experts)
    everyone = seats(parallel)
    with runtime.as_rank(parallel, 0):  # a custom pipeline layout asks whether there are chunks
        chunks = [chunk for s in range(parallel.pipeline) for chunk in stage_chunks(config, s)]
    pieces = _pieces(family, parallel, torch_dtype, grouped_experts, everyone)
    return assemble(family.parts(), everyone, chunks, pieces, dtype)


def _pieces(
    family: Family,
    parallel: Parallel,
    dtype: torch.dtype,
    grouped_experts: bool,
    everyone: Sequence[Seat],
) -> Pieces:
    """What a rank of each share holds of each part.

    Asked of a model with one layer of each kind, at each share in turn. Its pipeline has two
    stages where the real one has several: the ends of a pipeline hold what others do not.
    """
    kinds = [part for part in family.parts() if part.layers]
    number_of = {part.name: number for number, part in enumerate(kinds)}
    stages = min(parallel.pipeline, 2)
    small = replace(
        parallel,
        pipeline=stages,
        virtual=None,
        first=None,
        last=None,
        pipeline_layout="E" + "t" * len(kinds) + "|L" if stages == 2 else None,
    )
    config = transformer_config(
        family, small, dtype, grouped_experts, [part.layers[0] for part in kinds]
    )
    config.perform_initialization = False  # there is nothing to fill
    parts = [
        replace(part, layers=(number_of[part.name],)) if part.layers else part
        for part in family.parts()
    ]
    rank_of = {(seat.stage, seat.share): rank for rank, seat in enumerate(seats(small))}
    found: dict[str, dict[tuple[bool, Share], Piece]] = {}
    for share in sorted({seat.share for seat in everyone}):
        for stage in range(stages):
            with runtime.as_rank(small, rank_of[stage, share]):
                [chunk] = stage_chunks(config, stage)
                model = build_chunk(family, config, chunk, "meta")
                nbytes = {name: tensor.nbytes for name, tensor in memory_of(model).items()}
                for held in holdings(parts, model_shards(model)):
                    own = found.setdefault(held.part.name, {})
                    own[stage == stages - 1 and stages == 2, share] = Piece(held, nbytes)
    return found
