"""Where a rank of a DTensor model (FSDP2, tensor parallelism, both) keeps every element.

The answer is DTensor's own: its placements split the indices of each dimension as they split the
tensor. It covers uneven shards, 2-D meshes and the strided shards of FSDP2 over tensor parallelism.

On each rank of a trainer whose parameters are sharded with ``fully_shard``::

    layout = dtensor_layout(model, rank)        # once; the other ranks' with all_gather_object
    buffers = dtensor_buffers(model, rank)      # views of the parameters: they stay current
    plan = kimisys.reshard.plan(Layout.merge(layouts), destination)
    plan.of_source(rank).execute(buffers, ...)

The same layout and buffers are a destination: what a plan writes, the next forward pass gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor
from kimisys.reshard.tracer import Mapped, dtype_name, trace_mapping

Named = torch.nn.Module | Mapping[str, torch.Tensor]
Converter = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""The model's tensors by its own names to the checkpoint's tensors by theirs: ordinary tensor code
that views, splits and joins. It is run on full-size meta tensors, and traced."""


def dtensor_layout(held: Named, rank: int, converter: Converter | None = None) -> Layout:
    """What this process keeps, which is rank `rank` of the layout.

    held: a module, of which its parameters and persistent buffers are meant, or tensors by name.
    DTensors may be sharded over any dimensions of meshes of any shape, evenly or not, or
    replicated; plain tensors are whole on this rank.
    converter: to the checkpoint's names and shapes; None where they are the model's own. See
    ``kimisys.adapters.dtensor.hugging_face``.
    Returns one buffer for each tensor with elements here, in the model's names; tensors that are
    one parameter (tied embeddings) are one buffer, under the first name.
    LayoutError, naming tensor and rank: a partial placement, a dtype that layouts do not know, a
    local tensor that is not contiguous. TraceError: a converter that does more than copy.
    """
    tensors = named_tensors(held)
    boxes = _trace(tensors, converter or dict)
    fragments: list[Fragment] = []
    buffers: list[Buffer] = []
    for name, tensor in tensors.items():
        local = _local(name, tensor, rank)
        if local.numel() == 0:
            continue
        buffers.append(Buffer(rank, name, local.nbytes))
        pieces = list(_pieces(name, tensor, local, rank))
        for box in boxes[name]:
            fragments += [f for piece in pieces if (f := _meet(box, piece, rank, name)) is not None]
    return Layout(list(boxes.table.values()), buffers, fragments)


def dtensor_buffers(held: Named, rank: int) -> dict[tuple[int, str], np.ndarray]:
    """The memory of what ``dtensor_layout`` describes, {(rank, name): uint8[nbytes]}: views that
    write through. LayoutError for a tensor that is not contiguous or not in host memory."""
    found: dict[tuple[int, str], np.ndarray] = {}
    for name, tensor in named_tensors(held).items():
        local = _local(name, tensor, rank)
        if local.device.type != "cpu":
            raise LayoutError(
                f"tensor {name!r} of rank {rank} is on {local.device}: only host memory can be "
                "given as a buffer here"
            )
        if local.numel() > 0:
            found[rank, name] = local.view(-1).view(torch.uint8).numpy()
    return found


def named_tensors(held: Named) -> dict[str, torch.Tensor]:
    """The tensors by name, each once: parameters and persistent buffers of a module."""
    if not isinstance(held, torch.nn.Module):
        return dict(held)
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in held.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    return tensors


@dataclass(frozen=True)
class _Boxes:
    """The converter's copies by the model's tensor, and the checkpoint's table."""

    table: dict[str, Tensor]
    by_source: dict[str, list[Mapped]]

    def __getitem__(self, name: str) -> list[Mapped]:
        return self.by_source.get(name, [])


@dataclass(frozen=True)
class _Piece:
    """A box of a tensor as this rank stores it: offsets and extents in elements of the tensor,
    strides in bytes."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]
    byte_offset: int
    byte_strides: tuple[int, ...]


def _trace(tensors: Mapping[str, torch.Tensor], converter: Converter) -> _Boxes:
    def on_meta(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sources = {name: on_meta(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with torch.no_grad():
        asked = {name: (t.shape, t.dtype) for name, t in converter(dict(sources)).items()}
    destinations = {name: on_meta(*of) for name, of in asked.items()}

    def run(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in converter(dict(given)).items():
            wanted[name].copy_(tensor)

    by_source: dict[str, list[Mapped]] = {}
    for box in trace_mapping(sources, destinations, run):
        by_source.setdefault(box.source, []).append(box)
    table = {n: Tensor(n, dtype_name(dtype), tuple(shape)) for n, (shape, dtype) in asked.items()}
    return _Boxes(table, by_source)


def _local(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    # to_local() of a parameter takes part in autograd, which memory does not
    local = tensor.detach()
    if isinstance(local, DTensor):
        local = local.to_local()
    if not local.is_contiguous():
        raise LayoutError(
            f"tensor {name!r} of rank {rank} has strides {local.stride()} in memory: only "
            "contiguous tensors can be given as buffers; call contiguous() on it first"
        )
    return local


def _pieces(name: str, tensor: torch.Tensor, local: torch.Tensor, rank: int) -> Iterator[_Piece]:
    indices = _indices(name, tensor, rank)
    if tuple(len(dimension) for dimension in indices) != tuple(local.shape):
        raise LayoutError(
            f"tensor {name!r} of rank {rank} has a local shape of {tuple(local.shape)} where its "
            f"placements give {tuple(len(dimension) for dimension in indices)}: shard it again"
        )
    strides = tuple(stride * local.element_size() for stride in local.stride())
    for runs in product(*(_runs(dimension) for dimension in indices)):
        yield _Piece(
            offset=tuple(first for first, _, _ in runs),
            extent=tuple(length for _, length, _ in runs),
            byte_offset=sum(at * s for (_, _, at), s in zip(runs, strides, strict=True)),
            byte_strides=strides,
        )


def _indices(name: str, tensor: torch.Tensor, rank: int) -> list[torch.Tensor]:
    """For each dimension, which of its indices this rank holds, in the order of its memory."""
    indices = [torch.arange(size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return indices
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this process is not in the tensor's mesh
        return [dimension[:0] for dimension in indices]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise LayoutError(
                f"tensor {name!r} of rank {rank} is placed as {placement}: its values are not "
                "there before a reduction; redistribute it to shards or replicas first"
            )
        dim = placement.dim
        shape = [1] * tensor.dim()
        shape[dim] = -1
        chunks, _ = placement._split_tensor(
            indices[dim].view(shape), mesh.size(axis), with_padding=False, contiguous=False
        )
        indices[dim] = chunks[coordinate[axis]].reshape(-1)
    return indices


def _runs(indices: torch.Tensor) -> list[tuple[int, int, int]]:
    """(first index, length, place) of each run of consecutive indices."""
    if len(indices) == 0:
        return []
    breaks = (torch.diff(indices) != 1).nonzero().reshape(-1) + 1
    places = [0, *breaks.tolist(), len(indices)]
    return [(int(indices[at]), end - at, at) for at, end in pairwise(places)]


def _meet(box: Mapped, piece: _Piece, rank: int, buffer: str) -> Fragment | None:
    """The part of `box` that `piece` holds; None when it holds nothing of it."""
    low = [max(b, p) for b, p in zip(box.source_offset, piece.offset, strict=True)]
    high = [
        min(b + n, p + m)
        for b, n, p, m in zip(
            box.source_offset, box.source_extent, piece.offset, piece.extent, strict=True
        )
    ]
    if any(first >= last for first, last in zip(low, high, strict=True)):
        return None
    byte_offset = piece.byte_offset + sum(
        (first - start) * stride
        for first, start, stride in zip(low, piece.offset, piece.byte_strides, strict=True)
    )
    offset, extent, strides = list(box.destination_offset), [], []
    for i, axis in enumerate(box.axes):
        if axis >= 0:
            offset[i] += low[axis] - box.source_offset[axis]
        extent.append(high[axis] - low[axis] if axis >= 0 else 1)
        strides.append(piece.byte_strides[axis] if axis >= 0 else 0)
    return Fragment(box.destination, Region(offset, extent), rank, buffer, byte_offset, strides)
