"""A running Megatron model as a kimisys layout, in Hugging Face coordinates.

Two answers are put together, and neither is a table of ours. Megatron's `sharded_state_dict()` says
which box of each global tensor this rank holds, and where. The family's rule, traced on meta
tensors, says which box of each global tensor is which box of which Hugging Face tensor. Where the
boxes meet is a fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kimisys.adapters.megatron.core import GPTModel
from kimisys.adapters.megatron.families import Converter, FamilyReader, family_of
from kimisys.adapters.megatron.families.part import tensors_of
from kimisys.adapters.megatron.rules import TracedPart, holdings
from kimisys.adapters.megatron.shards import memory_of, model_shards
from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Padding
from kimisys.reshard.tracer import dtype_name


def model_layout(
    model: GPTModel | Sequence[GPTModel],
    hf_config: Mapping[str, Any],
    rank: int,
    family: FamilyReader | None = None,
    converter: Converter | None = None,
) -> Layout:
    """Where `rank` holds which regions of the Hugging Face tensors; a buffer is a parameter, or a
    buffer that Megatron keeps in checkpoints, by Megatron's name.

    model: built in this process for that rank, all chunks of it in order; meta tensors will do.
    The names of several chunks' buffers begin with "model0.", "model1.". family, converter: as
    `family_of` takes them, for models that it does not know. Rows of the padded vocabulary are
    Padding. All tensors are listed, also those that other ranks hold. Raises LayoutError when the
    model holds something that the family's rules do not know.
    """
    known = family_of(hf_config, family, converter)
    chunks = list(_named(model))
    traced: dict[str, TracedPart] = {}
    fragments, padding, buffers = [], [], []
    for prefix, chunk in chunks:
        for held in holdings(known.parts(), model_shards(chunk)):
            if held.part.name not in traced:
                traced[held.part.name] = TracedPart(held.part, held.shards)
            part = traced[held.part.name]
            name = held.part.hf_prefix.replace("{}", held.label)
            for shard in held.shards:
                fragments += [
                    Fragment(name + m.name, m.region, rank, prefix + m.parameter,
                             m.byte_offset, m.byte_strides)
                    for m in part.meet(shard)
                ]  # fmt: skip
                if (rows := part.padding(shard)) is not None:
                    padding.append(Padding(rank, prefix + shard.name, *rows))
        buffers += [Buffer(rank, prefix + n, t.nbytes) for n, t in memory_of(chunk).items()]

    parts = [
        replace(part, dtypes=traced[part.name].dtypes) if part.name in traced else part
        for part in known.parts()
    ]
    dtype = dtype_name(chunks[0][1].config.params_dtype)
    return Layout(tensors_of(parts, dtype), buffers, fragments, padding)


def model_buffers(
    model: GPTModel | Sequence[GPTModel], rank: int
) -> dict[tuple[int, str], np.ndarray]:
    """The memory behind `model_layout`'s buffers as bytes: {(rank, name): uint8[nbytes]}, views
    that write through.

    Raises LayoutError for a parameter that is not contiguous or not in host memory.
    """
    return {
        (rank, prefix + name): tensor_bytes(prefix + name, tensor.detach())
        for prefix, chunk in _named(model)
        for name, tensor in memory_of(chunk).items()
    }


def tensor_bytes(name: str, parameter: torch.Tensor) -> np.ndarray:
    """A tensor's memory as uint8[nbytes], a view that writes through. `name` is for the
    LayoutError that a tensor raises which is not contiguous or not in host memory."""
    if parameter.device.type != "cpu" or not parameter.is_contiguous():
        raise LayoutError(
            f"parameter {name!r} is on {parameter.device} with strides {parameter.stride()}: "
            "only contiguous parameters in host memory can be given as buffers"
        )
    array: np.ndarray = parameter.view(-1).view(torch.uint8).numpy()
    return array


def _named(model: GPTModel | Sequence[GPTModel]) -> Iterator[tuple[str, GPTModel]]:
    """Chunks, and what comes before the names of their parameters: Megatron's checkpoints call
    several chunks model0, model1."""
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    for number, chunk in enumerate(chunks):
        yield f"model{number}." if len(chunks) > 1 else "", chunk
