"""A running Megatron model as a kimisys layout, in Hugging Face coordinates.

Two answers are put together, and neither is a table of ours. Megatron's `sharded_state_dict()` says
which box of each global tensor this rank holds, and where. The family's rule, traced on meta
tensors, says which box of each global tensor is which box of which Hugging Face tensor. Where the
boxes meet is a fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kimisys.adapters.megatron.core import ShardedTensor, ShardedTensorFactory
from kimisys.adapters.megatron.families import Family, family_of
from kimisys.adapters.megatron.model import Model, whole_pipeline
from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region
from kimisys.reshard.tracer import Mapped, dtype_name, trace_mapping


@dataclass(frozen=True)
class _Shard:
    """A box of the global tensor `key` that this rank holds in parameter `name`.

    Offsets and extents are in elements of the global tensor (leading layer axes included). Byte
    offset and strides are those of the parameter's memory, one stride for each global axis.
    """

    name: str
    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    byte_offset: int
    byte_strides: tuple[int, ...]


def model_layout(model: Model, hf_config: Mapping[str, Any], rank: int) -> Layout:
    """Where `rank` holds which regions of the Hugging Face tensors; a buffer is a parameter, by
    Megatron's name.

    model: built in this process for that rank; meta tensors will do. Rows of the padded vocabulary
    are Padding. All tensors are listed, also those that other ranks hold. Raises LayoutError when
    the model holds something that the family's rule does not know.
    """
    family = family_of(hf_config)
    parameters = dict(model.named_parameters())
    shards = list(_shards(model, parameters))
    _check_known(shards, parameters)
    dtype = dtype_name(shards[0].dtype)

    tensors = family.hf_tensors(dtype)
    boxes = _trace(family, _global_shapes(model, shards), dtype)
    fragments = [
        fragment
        for shard in shards
        for box in boxes.get(shard.key, [])
        if (fragment := _meet(box, shard, rank)) is not None
    ]
    padding = [pad for shard in shards for pad in _padding(family, shard, rank)]
    buffers = [Buffer(rank, name, parameter.nbytes) for name, parameter in parameters.items()]
    return Layout(tensors, buffers, fragments, padding)


def model_buffers(model: torch.nn.Module, rank: int) -> dict[tuple[int, str], np.ndarray]:
    """The memory of each parameter as bytes: {(rank, name): uint8[nbytes]}, views that write
    through.

    Raises LayoutError for a parameter that is not contiguous or not in host memory.
    """
    return {
        (rank, name): tensor_bytes(name, parameter.detach())
        for name, parameter in model.named_parameters()
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


def _shards(model: Model, parameters: Mapping[str, torch.Tensor]) -> Iterator[_Shard]:
    names = {_storage(parameter): name for name, parameter in parameters.items()}
    for entry in model.sharded_state_dict().values():
        # the gated MLP's two halves lie apart in the global tensor: a factory cuts them
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if not isinstance(part, ShardedTensor):
                continue  # extra state: no elements
            name = names.get(_storage(part.data))
            if name is None:
                raise LayoutError(
                    f"Megatron's {part.key!r} is not stored in a parameter of the model: "
                    "it cannot be addressed"
                )
            yield _shard(name, part, parameters[name])


def _shard(name: str, part: ShardedTensor, parameter: torch.Tensor) -> _Shard:
    size, leading = part.data.element_size(), part.prepend_axis_num
    return _Shard(
        name=name,
        key=part.key,
        dtype=part.data.dtype,
        global_shape=tuple(part.global_shape),
        offset=tuple(part.global_offset),
        extent=(1,) * leading + tuple(part.local_shape),
        byte_offset=(part.data.storage_offset() - parameter.storage_offset()) * size,
        byte_strides=(0,) * leading + tuple(stride * size for stride in part.data.stride()),
    )


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _check_known(shards: list[_Shard], parameters: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(set(parameters) - {shard.name for shard in shards})
    if missing or not shards:
        raise LayoutError(
            "sharded_state_dict() does not describe the parameters "
            f"{', '.join(missing) or '(it is empty)'}"
        )
    dtypes = sorted({dtype_name(shard.dtype) for shard in shards})
    if len(dtypes) > 1:
        raise LayoutError(
            f"the model's parameters are of several dtypes, {', '.join(dtypes)}: build it with one"
        )


def _global_shapes(model: Model, shards: list[_Shard]) -> dict[str, tuple[int, ...]]:
    """The shapes of all global tensors by key, also of those that other pipeline stages hold."""
    if not (model.pre_process and model.post_process):
        whole = whole_pipeline(model)
        shards = list(_shards(whole, dict(whole.named_parameters())))
    return {shard.key: shard.global_shape for shard in shards}


def _trace(
    family: Family, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> dict[str, list[Mapped]]:
    """The family's rule as boxes, by the key of the Megatron tensor they lie in."""

    def on_meta(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    sources = {key: on_meta(shape) for key, shape in shapes.items()}
    destinations = {t.name: on_meta(tuple(t.shape)) for t in family.hf_tensors(dtype)}
    try:
        mapped = trace_mapping(sources, destinations, family.rule)
    except KeyError as error:
        raise LayoutError(
            f"the rule for {type(family).__name__} asks for the Megatron tensor {error}, which "
            f"this model does not have; it has {', '.join(sorted(sources))}"
        ) from error
    boxes: dict[str, list[Mapped]] = {}
    for box in mapped:
        boxes.setdefault(box.source, []).append(box)
    unread = sorted(set(sources) - set(boxes))
    if unread:
        raise LayoutError(
            f"the rule for {type(family).__name__} does not read the Megatron tensors "
            f"{', '.join(unread)}"
        )
    return boxes


def _meet(box: Mapped, shard: _Shard, rank: int) -> Fragment | None:
    """The part of `box` that `shard` holds; None when it holds nothing of it."""
    low = [max(b, s) for b, s in zip(box.source_offset, shard.offset, strict=True)]
    high = [
        min(b + be, s + se)
        for b, be, s, se in zip(
            box.source_offset, box.source_extent, shard.offset, shard.extent, strict=True
        )
    ]
    if any(first >= last for first, last in zip(low, high, strict=True)):
        return None
    byte_offset = shard.byte_offset + sum(
        (first - start) * stride
        for first, start, stride in zip(low, shard.offset, shard.byte_strides, strict=True)
    )
    offset, extent, strides = list(box.destination_offset), [], []
    for i, axis in enumerate(box.axes):
        if axis >= 0:
            offset[i] += low[axis] - box.source_offset[axis]
        extent.append(high[axis] - low[axis] if axis >= 0 else 1)
        strides.append(shard.byte_strides[axis] if axis >= 0 else 0)
    region = Region(offset, extent)
    return Fragment(box.destination, region, rank, shard.name, byte_offset, strides)


def _padding(family: Family, shard: _Shard, rank: int) -> Iterator[Padding]:
    """The bytes of this shard's vocabulary rows past the real vocabulary."""
    if shard.key not in family.vocabulary_keys:
        return
    rows, row_bytes = shard.extent[0], shard.byte_strides[0]
    real = min(max(family.vocab_size - shard.offset[0], 0), rows)
    if real < rows:
        first = shard.byte_offset + real * row_bytes
        yield Padding(rank, shard.name, first, (rows - real) * row_bytes)
