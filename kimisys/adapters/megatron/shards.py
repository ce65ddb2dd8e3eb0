"""What `sharded_state_dict()` says of one rank's memory: which box of which global tensor lies
where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kimisys.adapters.megatron.core import GPTModel, ShardedTensor, ShardedTensorFactory
from kimisys.errors import LayoutError
from kimisys.reshard.recorder import Recorder, box_in, cut, storage_key

_METADATA = {"non_homogeneous_layers": True}
"""Keys with the layer's number in them, instead of a leading axis of layers: layers differ."""


@dataclass(frozen=True)
class Shard:
    """A box of the global tensor `key` that this rank holds in `name`, a parameter or a buffer.

    Offsets and extents are in elements of the global tensor. Byte offset and strides are those of
    the parameter's memory, one stride for each global axis.
    """

    name: str
    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    byte_offset: int
    byte_strides: tuple[int, ...]


def memory_of(model: GPTModel) -> dict[str, torch.Tensor]:
    """The model's parameters, and its buffers that a checkpoint keeps, by Megatron's name."""
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state")
    }


def model_shards(model: GPTModel) -> list[Shard]:
    """All that the rank holds. Raises LayoutError for memory that Megatron does not describe, or
    describes in a way that cannot be followed."""
    memory = memory_of(model)
    names = {storage_key(tensor): name for name, tensor in memory.items()}
    found: list[Shard] = []
    for entry in model.sharded_state_dict(metadata=dict(_METADATA)).values():
        if isinstance(entry, ShardedTensorFactory):
            name = _name(names, entry.key, entry.data)
            found += _factory_shards(name, entry, memory[name])
        elif isinstance(entry, ShardedTensor):  # others are extra state: no elements
            name = _name(names, entry.key, entry.data)
            found.append(_shard(name, entry, memory[name]))
    missing = sorted(set(memory) - {shard.name for shard in found})
    if missing:
        raise LayoutError(f"sharded_state_dict() does not describe {', '.join(missing)}")
    return found


def _name(names: Mapping[int, str], key: str, data: torch.Tensor) -> str:
    name = names.get(storage_key(data))
    if name is None:
        raise LayoutError(
            f"Megatron's {key!r} is not stored in a parameter of the model: it cannot be addressed"
        )
    return name


def _shard(name: str, part: ShardedTensor, parameter: torch.Tensor) -> Shard:
    size, leading = part.data.element_size(), part.prepend_axis_num
    return Shard(
        name=name,
        key=part.key,
        dtype=part.data.dtype,
        global_shape=tuple(part.global_shape),
        offset=tuple(part.global_offset),
        extent=(1,) * leading + tuple(part.local_shape),
        byte_offset=(part.data.storage_offset() - parameter.storage_offset()) * size,
        byte_strides=(0,) * leading + tuple(stride * size for stride in part.data.stride()),
    )


def _factory_shards(
    name: str, entry: ShardedTensorFactory, parameter: torch.Tensor
) -> Iterator[Shard]:
    """The gated MLP's halves and the experts of a group lie apart in the global tensor: a factory
    cuts the parameter up, by views or by copies."""
    parts = _parts(entry.build())
    if all(storage_key(part.data) == storage_key(parameter) for part in parts):
        yield from (_shard(name, part, parameter) for part in parts)
        return
    # it copied: let it do so under the recorder, which follows copies
    twin = torch.empty_like(parameter, device="meta").contiguous()
    goals = {f"part {i}": torch.empty(p.local_shape, dtype=p.dtype, device="meta")
             for i, p in enumerate(parts)}  # fmt: skip
    with torch.no_grad(), Recorder({name: twin}, goals) as recorder:
        for part, goal in zip(
            _parts(replace(entry, data=twin).build()), goals.values(), strict=True
        ):
            goal.copy_(part.data)
    size = parameter.element_size()
    for write in recorder.writes:
        part = parts[int(write.destination.name.removeprefix("part "))]
        for piece in cut(write.piece, (part.local_shape, None), name):
            offset, extent, dims = box_in(piece, 0, part.local_shape)
            strides = (0 if d < 0 else piece.sides[1].strides[d] * size for d in dims)
            lead = len(part.global_offset) - len(offset)
            yield Shard(
                name=name,
                key=part.key,
                dtype=part.data.dtype,
                global_shape=tuple(part.global_shape),
                offset=(
                    *part.global_offset[:lead],
                    *(g + o for g, o in zip(part.global_offset[lead:], offset, strict=True)),
                ),
                extent=(1,) * lead + extent,
                byte_offset=piece.sides[1].offset * size,
                byte_strides=(0,) * lead + tuple(strides),
            )


def _parts(built: object) -> list[ShardedTensor]:
    return list(built) if isinstance(built, (list, tuple)) else [built]
