"""Records what a function copies: a dispatch mode under which views are followed and copies written
down. `tracer` turns the record into layouts and mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimisys.errors import TraceError
from kimisys.reshard.strided import Piece, Side, axis_of, boxes, unravel

_aten = torch.ops.aten
_FOLLOWED_UNARY = {_aten.clone.default, _aten._to_copy.default, _aten._reshape_copy.default}
_CREATED = "a tensor created inside the function"


@dataclass
class Storage:
    """What is known of one storage: a root (source or destination), or an intermediate with its
    origins."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    origins: list[tuple[Piece, Storage]] = field(default_factory=list)  # disjoint boxes of `shape`
    spoilt_by: str = ""

    def spoil(self, reason: str) -> None:
        """Forget the origins: what the storage holds are no longer copies."""
        self.origins.clear()
        self.spoilt_by = reason

    def fill(self, part: Piece, root: Storage) -> None:
        """Note that `part` (this storage, `root`) was copied in, over whatever was there."""
        for box in cut(part, (self.shape, None), self.name):
            start, extent, _ = box_in(box, 0, self.shape)
            kept = []
            for origin in self.origins:
                covered = _covered(box_in(origin[0], 0, self.shape)[:2], (start, extent))
                if covered == "partly":
                    self.spoil("elements that the function wrote twice")
                    return
                if covered == "not":
                    kept.append(origin)
            self.origins = [*kept, (box, root)]


@dataclass(frozen=True)
class Write:
    """Sides of the piece: destination, source. No source: filled with zeros."""

    destination: Storage
    source: Storage | None
    piece: Piece


class Recorder(TorchDispatchMode):
    """Records which elements of `sources` the code inside the `with` block copies to
    `destinations`.

    All tensors are on the meta device and contiguous. Raises TraceError, naming tensor and
    operation, for what cannot be followed: at the operation, or at the end of the block.
    guarded: tensors that must not be copied to: what lands there would be lost from sight.
    """

    def __init__(
        self,
        sources: Mapping[str, torch.Tensor],
        destinations: Mapping[str, torch.Tensor],
        guarded: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self._storages: dict[int, Storage] = {}
        self._alive: list[torch.Tensor] = []  # a freed storage's address would be used again
        self._destinations = dict(destinations)
        for role, tensors in (("source", sources), ("destination", destinations)):
            for name, tensor in tensors.items():
                self._register(name, tensor, role)
        for name, tensor in (guarded or {}).items():
            if tensor.numel():
                self._alive.append(tensor)
                known = Storage(name, tuple(tensor.shape), tensor.dtype, "guarded")
                self._storages.setdefault(storage_key(tensor), known)

    def _register(self, name: str, tensor: torch.Tensor, role: str) -> None:
        if tensor.device.type != "meta" or not tensor.is_contiguous():
            raise TraceError(
                f"{role} {name!r} must be a contiguous tensor on the meta device, "
                f"not {tensor.device} with strides {tensor.stride()}"
            )
        self._alive.append(tensor)
        key = storage_key(tensor)
        if key in self._storages and self._storages[key].role != role:
            raise TraceError(f"{name!r} shares its storage with {self._storages[key].name!r}")
        self._storages.setdefault(key, Storage(name, tuple(tensor.shape), tensor.dtype, role))

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
            known = self._storages.get(storage_key(tensor))
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
        if to.role == "guarded":
            raise TraceError(
                f"the function loads into {to.name!r}, which is not one of the parameters that are "
                "traced; make it a parameter, or derive it after loading"
            )
        piece = Piece(tuple(destination.shape), (_side(destination), _side(source)))
        for part, root in self._resolve(piece, origin, to.name):
            if to.role == "destination":
                if root.role != "source":  # its name may be a source's too, of other elements
                    raise TraceError(
                        f"{to.name!r} receives elements of {root.name!r}, which is no source but a "
                        f"{root.role} tensor; copy them from the source that they came from"
                    )
                self.writes.append(Write(to, root, part))
            elif destination.dtype == source.dtype:
                to.fill(part, root)
            else:
                to.spoil(f"a cast from {source.dtype} to {destination.dtype}")

    def _zero(self, destination: torch.Tensor) -> None:
        to = self._known(destination)
        if to.role == "source":
            raise TraceError(
                f"the function overwrites source {to.name!r}; sources must stay as they are"
            )
        if to.role == "destination":
            piece = Piece(tuple(destination.shape), (_side(destination),))
            self.writes.append(Write(to, None, piece))
        else:
            to.spoil("zeros")

    def _known(self, tensor: torch.Tensor) -> Storage:
        known = self._storages.get(storage_key(tensor))
        if known is None:  # made outside the trace, or by a factory function
            self._alive.append(tensor)
            numel = tensor.untyped_storage().nbytes() // tensor.element_size()
            shape = tuple(tensor.shape) if tensor.is_contiguous() else (numel,)
            known = Storage("", shape, tensor.dtype, "intermediate", spoilt_by=_CREATED)
            self._storages[storage_key(tensor)] = known
        if known.dtype != tensor.dtype:
            raise TraceError(
                f"{known.name or 'a tensor'!r} is read as {tensor.dtype} though it is "
                f"{known.dtype}: views that change the dtype cannot be followed"
            )
        return known

    def _resolve(self, piece: Piece, origin: Storage, name: str) -> list[tuple[Piece, Storage]]:
        """`piece` (destination, origin) in terms of root sources."""
        if origin.role != "intermediate":
            return [(piece, origin)]
        found: list[tuple[Piece, Storage]] = []
        for want in boxes(piece, (None, origin.shape)):
            overlaps = ((_overlap(want, have, origin.shape), root) for have, root in origin.origins)
            found += [(overlap, root) for overlap, root in overlaps if overlap is not None]
        if sum(count_of(part) for part, _ in found) != count_of(piece):
            raise TraceError(
                f"{name!r} receives elements that are not copies of any source: they come from "
                f"{origin.spoilt_by or 'an unknown tensor'}; only views and copies can be followed"
            )
        return found

    def _refuse_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for position, name in _written(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                known = None
                if isinstance(tensor, torch.Tensor):
                    known = self._storages.get(storage_key(tensor))
                if known is not None and known.role != "intermediate":
                    raise TraceError(
                        f"{func} changes {known.role} {known.name!r} in place: only copies of "
                        "elements, and filling with zeros, can be followed"
                    )
                if known is not None:
                    known.spoil(str(func))

    def _follow(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if not isinstance(output, torch.Tensor) or storage_key(output) in self._storages:
                continue
            self._alive.append(output)
            made = Storage(str(func), tuple(output.shape), output.dtype, "intermediate")
            self._storages[storage_key(output)] = made
            parts = self._parts(func, args, output)
            if parts is None:
                made.spoilt_by = str(func)
                continue
            for destination, source in parts:
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
            self._storages[storage_key(output)].shape = (output.numel(),)
            return [(output, args[0])]
        if func in (_aten.cat.default, _aten.stack.default):
            dim = args[1] if len(args) > 1 else 0
            if func is _aten.stack.default:
                return list(zip(output.unbind(dim), args[0], strict=True))
            sizes = [part.shape[dim] for part in args[0]]
            return list(zip(output.split(sizes, dim), args[0], strict=True))
        return None


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operation writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _covered(
    region: tuple[tuple[int, ...], tuple[int, ...]], by: tuple[tuple[int, ...], tuple[int, ...]]
) -> str:
    """Whether `region` (offset, extent) lies in `by` "wholly", "partly", or "not"."""
    axes = [
        (start, start + extent, first, first + count)
        for start, extent, first, count in zip(*region, *by, strict=True)
    ]
    if any(end <= first or start >= last for start, end, first, last in axes):
        return "not"
    inside = all(first <= start and end <= last for start, end, first, last in axes)
    return "wholly" if inside else "partly"


def storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _side(tensor: torch.Tensor) -> Side:
    return Side(int(tensor.storage_offset()), tuple(tensor.stride()))


def count_of(piece: Piece) -> int:
    return int(torch.Size(piece.sizes).numel())


def cut(piece: Piece, shapes: Sequence[Sequence[int] | None], name: str) -> list[Piece]:
    try:
        return list(boxes(piece, shapes))
    except ValueError as error:
        raise TraceError(f"the views copied into {name!r} are too scattered: {error}") from error


def box_in(
    piece: Piece, side: int, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Offset and extent of the box in `shape`, and for each axis the piece's dimension along it
    (-1: none)."""
    dims = [-1] * len(shape)
    for d, stride in enumerate(piece.sides[side].strides):
        dims[axis_of(stride, shape)[0]] = d
    extent = tuple(1 if d < 0 else piece.sizes[d] for d in dims)
    return unravel(piece.sides[side].offset, shape), extent, tuple(dims)


def _overlap(want: Piece, have: Piece, shape: Sequence[int]) -> Piece | None:
    """The part of `want` (destination, intermediate) that `have` (intermediate, source) filled."""
    want_at, want_extent, want_dims = box_in(want, 1, shape)
    have_at, have_extent, have_dims = box_in(have, 0, shape)
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
