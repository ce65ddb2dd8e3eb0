"""Where a loader or a converter puts every element, learnt by running it on meta tensors.

The function under trace gets full-size tensors on the meta device and copies views of them, as it
would with real weights. Every `copy_` is intercepted; the storage, offset, sizes and strides of its
two views say which elements go where. Copies that PyTorch makes on the way (clone, cat, stack) are
followed. What cannot be followed is refused by name: arithmetic on values, tensors of unknown
origin, parameters replaced through `.data =`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimisys.errors import TraceError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Region, Tensor
from kimisys.reshard.strided import Piece, Side, axis_of, boxes, unravel

_aten = torch.ops.aten
_FOLLOWED_UNARY = {_aten.clone.default, _aten._to_copy.default, _aten._reshape_copy.default}
_CREATED = "created inside the function"


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


@dataclass
class _Storage:
    """What is known of one storage: a root (source or destination), or an intermediate with its
    origins."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    origins: list[tuple[Piece, _Storage]] = field(default_factory=list)
    spoilt_by: str = ""


@dataclass(frozen=True)
class _Write:
    """Sides of the piece: destination, source. No source: filled with zeros."""

    destination: _Storage
    source: _Storage | None
    piece: Piece


class Tracer(TorchDispatchMode):
    """Records which elements of `sources` the code inside the `with` block copies to
    `destinations`.

    All tensors are on the meta device and contiguous. Raises TraceError, naming tensor and
    operation, for what cannot be followed: at the operation, or at the end of the block.
    """

    def __init__(
        self, sources: Mapping[str, torch.Tensor], destinations: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.writes: list[_Write] = []
        self._storages: dict[int, _Storage] = {}
        self._alive: list[torch.Tensor] = []  # a freed storage's address would be used again
        self._destinations = dict(destinations)
        for role, tensors in (("source", sources), ("destination", destinations)):
            for name, tensor in tensors.items():
                self._register(name, tensor, role)

    def _register(self, name: str, tensor: torch.Tensor, role: str) -> None:
        if tensor.device.type != "meta" or not tensor.is_contiguous():
            raise TraceError(
                f"{role} {name!r} must be a contiguous tensor on the meta device, "
                f"not {tensor.device} with strides {tensor.stride()}"
            )
        self._alive.append(tensor)
        key = _key(tensor)
        if key in self._storages and self._storages[key].role != role:
            raise TraceError(f"{name!r} shares its storage with {self._storages[key].name!r}")
        self._storages.setdefault(key, _Storage(name, tuple(tensor.shape), tensor.dtype, role))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default:
            self._copy(args[0], args[1])
            return args[0]
        if func in (_aten.fill_.Scalar, _aten.zero_.default, _aten.fill_.Tensor):
            value = args[1] if len(args) > 1 else 0
            if isinstance(value, torch.Tensor) or value != 0:
                self._refuse_writes(func, args, kwargs)
            self._zero(args[0])
            return args[0]
        self._refuse_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        self._follow(func, args, result)
        return result

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if exc_type is None:
            self.check_unreplaced(self._destinations)

    def check_unreplaced(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise TraceError for a destination that no longer lives in the storage it had."""
        for name, tensor in tensors.items():
            known = self._storages.get(_key(tensor))
            if known is None or known.role != "destination":
                raise TraceError(
                    f"{name!r} was replaced while loading (`.data =` or a new parameter), so what "
                    "it holds cannot be traced; copy into it instead"
                )

    def _copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        source = source.expand(destination.shape)
        to, origin = self._known(destination), self._known(source)
        if to.role == "source":
            raise TraceError(
                f"the function writes into source {to.name!r}; sources must stay as they are"
            )
        piece = Piece(tuple(destination.shape), (_side(destination), _side(source)))
        for part, root in self._resolve(piece, origin, to.name):
            if to.role == "destination":
                self.writes.append(_Write(to, root, part))
            else:
                to.origins += [(box, root) for box in _boxes(part, (to.shape, None), to.name)]

    def _zero(self, destination: torch.Tensor) -> None:
        to = self._known(destination)
        if to.role == "source":
            raise TraceError(
                f"the function overwrites source {to.name!r}; sources must stay as they are"
            )
        if to.role == "destination":
            piece = Piece(tuple(destination.shape), (_side(destination),))
            self.writes.append(_Write(to, None, piece))

    def _known(self, tensor: torch.Tensor) -> _Storage:
        known = self._storages.get(_key(tensor))
        if known is None:  # made outside the trace, or by a factory function
            self._alive.append(tensor)
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            shape = tuple(tensor.shape) if tensor.is_contiguous() else (numel,)
            known = _Storage("", shape, tensor.dtype, "intermediate", spoilt_by=_CREATED)
            self._storages[_key(tensor)] = known
        if known.dtype != tensor.dtype:
            raise TraceError(
                f"{known.name or 'a tensor'!r} is read as {tensor.dtype} though it is "
                f"{known.dtype}: views that change the dtype cannot be followed"
            )
        return known

    def _resolve(self, piece: Piece, origin: _Storage, name: str) -> list[tuple[Piece, _Storage]]:
        """`piece` (destination, origin) in terms of root sources."""
        if origin.role != "intermediate":
            return [(piece, origin)]
        found: list[tuple[Piece, _Storage]] = []
        for want in boxes(piece, (None, origin.shape)):
            overlaps = ((_overlap(want, have, origin.shape), root) for have, root in origin.origins)
            found += [(overlap, root) for overlap, root in overlaps if overlap is not None]
        if sum(_numel(part) for part, _ in found) != _numel(piece):
            raise TraceError(
                f"{name!r} receives elements that are not copies of any source: they come from "
                f"{origin.spoilt_by or 'an unknown tensor'}; only views and copies can be followed"
            )
        return found

    def _refuse_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not writes or not isinstance(value, torch.Tensor):
                continue
            known = self._storages.get(_key(value))
            if known is not None and known.role != "intermediate":
                raise TraceError(
                    f"{func} changes {known.role} {known.name!r} in place: only copies of "
                    "elements, and filling with zeros, can be followed"
                )
            if known is not None:
                known.origins.clear()
                known.spoilt_by = str(func)

    def _follow(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if not isinstance(output, torch.Tensor) or _key(output) in self._storages:
                continue
            self._alive.append(output)
            made = _Storage(str(func), tuple(output.shape), output.dtype, "intermediate")
            self._storages[_key(output)] = made
            parts = self._parts(func, args, output)
            if parts is None:
                made.spoilt_by = str(func)
                continue
            for destination, source in parts:
                if source.dtype != output.dtype:
                    made.spoilt_by = f"{func} from {source.dtype} to {output.dtype}"
                    continue
                self._copy(destination, source)

    def _parts(
        self, func: Any, args: tuple[Any, ...], output: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """(view of the output, what it is a copy of) for the operations that only copy; None for
        others."""
        if func in _FOLLOWED_UNARY:
            if output.is_contiguous():
                return [(output.view(args[0].shape), args[0])]
            # clone keeps the strides of a permuted tensor: address the new storage as one flat axis
            self._storages[_key(output)].shape = (output.numel(),)
            return [(output, args[0])]
        if func in (_aten.cat.default, _aten.stack.default):
            dim = args[1] if len(args) > 1 else 0
            if func is _aten.stack.default:
                return list(zip(output.unbind(dim), args[0], strict=True))
            sizes = [part.shape[dim] for part in args[0]]
            return list(zip(output.split(sizes, dim), args[0], strict=True))
        return None


def trace_mapping(
    sources: Mapping[str, torch.Tensor],
    destinations: Mapping[str, torch.Tensor],
    run: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None],
) -> list[Mapped]:
    """Which box of which source is which box of which destination, when `run(sources,
    destinations)` has run.

    Sources and destinations are full-size contiguous meta tensors. Raises TraceError.
    """
    with torch.no_grad(), Tracer(sources, destinations) as tracer:
        run(sources, destinations)
    mapped: list[Mapped] = []
    for write in tracer.writes:
        if write.source is None:
            raise TraceError(
                f"{write.destination.name!r} is filled with zeros: a mapping holds copies only"
            )
        shapes = (write.destination.shape, write.source.shape)
        for piece in _boxes(write.piece, shapes, write.destination.name):
            mapped.append(_mapped(piece, write.destination, write.source))
    return mapped


def trace_layout(
    tensors: Sequence[Tensor],
    destinations: Mapping[str, torch.Tensor],
    load: Callable[[dict[str, torch.Tensor]], None],
    rank: int,
    current: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> Layout:
    """The layout of one rank whose parameters `destinations` are filled by `load`.

    tensors: the checkpoint's tensors (names, shapes), given to `load` by name as full-size meta
    tensors.
    destinations: the rank's parameters by name, contiguous, on the meta device; each becomes a
    buffer.
    current: gives the parameters by name after loading, to find those that were replaced.
    Tensors that `load` ignores do not appear. The layout's dtypes are those of the parameters.
    Raises TraceError for what cannot be followed, LayoutError for overlapping bounds.
    """
    sources = {
        t.name: torch.empty(tuple(t.shape), dtype=getattr(torch, t.dtype), device="meta")
        for t in tensors
    }
    with torch.no_grad(), Tracer(sources, destinations) as tracer:
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
        for piece in _boxes(write.piece, (None, shape), to.name):
            offset, extent, dims = _box(piece, 1, shape)
            strides = [0 if d < 0 else piece.sides[0].strides[d] * size for d in dims]
            region = Region(offset, extent)
            start = piece.sides[0].offset * size
            fragments.append(Fragment(name, region, rank, to.name, start, strides))
    buffers: dict[int, Buffer] = {}
    for (
        name,
        parameter,
    ) in destinations.items():  # tied parameters are one buffer, under the first name
        buffers.setdefault(_key(parameter), Buffer(rank, name, parameter.nbytes))
    return Layout(list(held.values()), list(buffers.values()), fragments, padding)


def dtype_name(dtype: torch.dtype) -> str:
    """kimisys' name of a torch dtype: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _side(tensor: torch.Tensor) -> Side:
    return Side(int(tensor.storage_offset()), tuple(tensor.stride()))


def _numel(piece: Piece) -> int:
    return int(torch.Size(piece.sizes).numel())


def _boxes(piece: Piece, shapes: Sequence[Sequence[int] | None], name: str) -> list[Piece]:
    try:
        return list(boxes(piece, shapes))
    except ValueError as error:
        raise TraceError(f"the views copied into {name!r} are too scattered: {error}") from error


def _box(
    piece: Piece, side: int, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Offset and extent of the box in `shape`, and for each axis the piece's dimension along it
    (-1: none)."""
    dims = [-1] * len(shape)
    for d, stride in enumerate(piece.sides[side].strides):
        dims[axis_of(stride, shape)[0]] = d
    extent = tuple(1 if d < 0 else piece.sizes[d] for d in dims)
    return unravel(piece.sides[side].offset, shape), extent, tuple(dims)


def _mapped(piece: Piece, destination: _Storage, source: _Storage) -> Mapped:
    to_offset, to_extent, to_dims = _box(piece, 0, destination.shape)
    from_offset, from_extent, from_dims = _box(piece, 1, source.shape)
    axes = tuple(-1 if d < 0 else from_dims.index(d) for d in to_dims)
    return Mapped(
        destination.name, to_offset, to_extent, source.name, from_offset, from_extent, axes
    )


def _overlap(want: Piece, have: Piece, shape: Sequence[int]) -> Piece | None:
    """The part of `want` (destination, intermediate) that `have` (intermediate, source) filled."""
    want_at, want_extent, want_dims = _box(want, 1, shape)
    have_at, have_extent, have_dims = _box(have, 0, shape)
    sizes, to_strides, from_strides = [], [], []
    to, origin = want.sides[0].offset, have.sides[1].offset
    for axis in range(len(shape)):
        low = max(want_at[axis], have_at[axis])
        high = min(want_at[axis] + want_extent[axis], have_at[axis] + have_extent[axis])
        if low >= high:
            return None
        to_stride = want.sides[0].strides[want_dims[axis]] if want_dims[axis] >= 0 else 0
        from_stride = have.sides[1].strides[have_dims[axis]] if have_dims[axis] >= 0 else 0
        to += (low - want_at[axis]) * to_stride
        origin += (low - have_at[axis]) * from_stride
        sizes.append(high - low)
        to_strides.append(to_stride)
        from_strides.append(from_stride)
    return Piece(tuple(sizes), (Side(to, tuple(to_strides)), Side(origin, tuple(from_strides))))


def _padding(write: _Write, rank: int) -> list[Padding]:
    size = write.destination.dtype.itemsize
    shape = (int(torch.Size(write.destination.shape).numel()),)
    return [
        Padding(rank, write.destination.name, p.sides[0].offset * size, _numel(p) * size)
        for p in _boxes(write.piece, (shape,), write.destination.name)
    ]


__all__ = ["Mapped", "Tracer", "dtype_name", "trace_layout", "trace_mapping"]
