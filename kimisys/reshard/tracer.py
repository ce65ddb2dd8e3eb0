"""Where a loader or a converter puts every element, learnt by running it on meta tensors.

The function under trace gets full-size tensors on the meta device and copies views of them, as it
would with real weights. Every `copy_` is intercepted; the storage, offset, sizes and strides of its
two views say which elements go where. Copies that PyTorch makes on the way (clone, cat, stack) are
followed. What cannot be followed is refused by name: arithmetic on values, tensors of unknown
origin, parameters replaced through `.data =`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch

from kimisys.errors import TraceError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor
from kimisys.reshard.recorder import Recorder, Storage, Write, box_in, count_of, cut, storage_key
from kimisys.reshard.strided import Piece

__all__ = ["Mapped", "dtype_name", "trace_layout", "trace_mapping"]


@dataclass(frozen=True)
class Mapped:
    """A box of one tensor that is, element for element, a box of another.

    Axis `i` of the destination box runs along axis `axes[i]` of the source box; -1 where its extent
    is 1. Offsets and extents are in elements, one entry per tensor dimension.
    """

    destination: str
    destination_offset: tuple[int, ...]
    destination_extent: tuple[int, ...]
    source: str
    source_offset: tuple[int, ...]
    source_extent: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def region(self) -> Region:
        """Where the box lies in the destination."""
        return Region(self.destination_offset, self.destination_extent)

    def overlaps(self, other: Mapped) -> bool:
        """Whether both write some element of one destination."""
        return self.destination == other.destination and all(
            a < b + m and b < a + n
            for a, n, b, m in zip(
                self.destination_offset,
                self.destination_extent,
                other.destination_offset,
                other.destination_extent,
                strict=True,
            )
        )


def trace_mapping(
    sources: Mapping[str, torch.Tensor],
    destinations: Mapping[str, torch.Tensor],
    run: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None],
) -> list[Mapped]:
    """Which box of which source is which box of which destination, when `run(sources,
    destinations)` has run.

    Sources and destinations are full-size contiguous meta tensors. Raises TraceError.
    """
    with torch.no_grad(), Recorder(sources, destinations) as tracer:
        run(sources, destinations)
    mapped: list[Mapped] = []
    for write in tracer.writes:
        if write.source is None:
            raise TraceError(
                f"{write.destination.name!r} is filled with zeros: a mapping holds copies only"
            )
        shapes = (write.destination.shape, write.source.shape)
        for piece in cut(write.piece, shapes, write.destination.name):
            mapped.append(_mapped(piece, write.destination, write.source))
    _check_written_once(mapped, destinations)
    return mapped


def trace_layout(
    tensors: Sequence[Tensor],
    destinations: Mapping[str, torch.Tensor],
    load: Callable[[dict[str, torch.Tensor]], None],
    rank: int,
    current: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    guarded: Mapping[str, torch.Tensor] | None = None,
) -> Layout:
    """The layout of one rank whose parameters `destinations` are filled by `load`.

    tensors: the checkpoint's tensors (names, shapes), given to `load` by name as full-size meta
    tensors.
    destinations: the rank's parameters by name, contiguous, on the meta device; each becomes a
    buffer.
    current: gives the parameters by name after loading, to find those that were replaced.
    guarded: tensors by name that `load` must not load into, such as a model's other buffers.
    Tensors that `load` ignores do not appear. The layout's dtypes are those of the parameters.
    Raises TraceError for what cannot be followed, LayoutError for overlapping bounds.
    """
    sources = {
        t.name: torch.empty(tuple(t.shape), dtype=getattr(torch, t.dtype), device="meta")
        for t in tensors
    }
    with torch.no_grad(), Recorder(sources, destinations, guarded) as tracer:
        load(dict(sources))
    if current is not None:
        tracer.check_unreplaced(current())
    held: dict[str, Tensor] = {}
    fragments: list[Fragment] = []
    padding: list[Padding] = []
    for write in tracer.writes:
        to, size = write.destination, write.destination.dtype.itemsize
        if write.source is None:
            padding += _padding(write, rank)
            continue
        name, shape = write.source.name, write.source.shape
        tensor = Tensor(name, dtype_name(to.dtype), shape)
        if held.setdefault(name, tensor) != tensor:
            raise TraceError(
                f"{name!r} is loaded into parameters of dtype {held[name].dtype} and {tensor.dtype}"
            )
        for piece in cut(write.piece, (None, shape), to.name):
            offset, extent, dims = box_in(piece, 1, shape)
            strides = [0 if d < 0 else piece.sides[0].strides[d] * size for d in dims]
            region = Region(offset, extent)
            start = piece.sides[0].offset * size
            fragments.append(Fragment(name, region, rank, to.name, start, strides))
    buffers: dict[int, Buffer] = {}
    for (
        name,
        parameter,
    ) in destinations.items():  # tied parameters are one buffer, under the first name
        buffers.setdefault(storage_key(parameter), Buffer(rank, name, parameter.nbytes))
    return Layout(list(held.values()), list(buffers.values()), fragments, padding)


def dtype_name(dtype: torch.dtype) -> str:
    """kimisys' name of a torch dtype: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _check_written_once(mapped: Sequence[Mapped], destinations: Mapping[str, torch.Tensor]) -> None:
    """Raise TraceError for a destination element that was written twice, or not at all."""
    written: dict[str, list[Mapped]] = {name: [] for name in destinations}
    for box in mapped:
        written[box.destination].append(box)
    for name, boxes in written.items():
        for one, other in combinations(boxes, 2):
            if one.overlaps(other):
                raise TraceError(
                    f"{name!r} is written twice, from {one.source!r} and from {other.source!r}, in "
                    f"the regions {one.region} and {other.region}; write each element once"
                )
        count, total = sum(prod(b.destination_extent) for b in boxes), destinations[name].numel()
        if count != total:
            raise TraceError(
                f"only {count} of the {total} elements of {name!r} are written; "
                "the function must fill every destination"
            )


def _mapped(piece: Piece, destination: Storage, source: Storage) -> Mapped:
    to_offset, to_extent, to_dims = box_in(piece, 0, destination.shape)
    from_offset, from_extent, from_dims = box_in(piece, 1, source.shape)
    axes = tuple(-1 if d < 0 else from_dims.index(d) for d in to_dims)
    return Mapped(
        destination.name, to_offset, to_extent, source.name, from_offset, from_extent, axes
    )


def _padding(write: Write, rank: int) -> list[Padding]:
    size = write.destination.dtype.itemsize
    shape = (int(torch.Size(write.destination.shape).numel()),)
    return [
        Padding(rank, write.destination.name, p.sides[0].offset * size, count_of(p) * size)
        for p in cut(write.piece, (shape,), write.destination.name)
    ]
