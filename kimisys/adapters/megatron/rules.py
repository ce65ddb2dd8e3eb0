"""A family's rules as boxes, traced once for each part, and where they meet a rank's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from kimisys.adapters.megatron.families.part import Part
from kimisys.adapters.megatron.shards import Shard
from kimisys.errors import KimisysError, LayoutError
from kimisys.reshard import Region
from kimisys.reshard.tracer import Mapped, dtype_name, trace_mapping


@dataclass(frozen=True)
class Holding:
    """What a rank holds of one occurrence of a part. label: stands for "{}" in the part's prefixes.
    shards: keys are below `key_prefix`, as the part's rule sees them."""

    part: Part
    label: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Meeting:
    """A region of Hugging Face's tensor `name` (below its part's prefix) in the parameter
    `parameter`, at byte offset and strides."""

    name: str
    region: Region
    parameter: str
    byte_offset: int
    byte_strides: tuple[int, ...]


@dataclass(frozen=True)
class _Boxes:
    """All that a rule reads of one Megatron tensor. offset, extent: those of `mapped` at the
    source, int64 [boxes, axes]. rows: of a padded vocabulary those that are real."""

    mapped: tuple[Mapped, ...]
    offset: np.ndarray
    extent: np.ndarray
    rows: int | None


class TracedPart:
    """A part's rule as boxes by Megatron's key. dtypes: what each of its tensors is made of."""

    def __init__(self, part: Part, shards: Sequence[Shard]) -> None:
        """Trace the rule on meta tensors of the global shapes that `shards` tell: those of one
        occurrence. Raises LayoutError for a rule that does not fit Megatron's tensors, TraceError
        for one that cannot be followed."""
        shapes = {shard.key: shard.global_shape for shard in shards}
        sources = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        goals = {name: torch.empty(shape, device="meta") for name, shape in part.shapes.items()}
        try:
            mapped = trace_mapping(sources, goals, part.rule)
        except KeyError as error:
            raise LayoutError(
                f"the rule for the part {part.name!r} asks for {error}, which is not there; "
                f"Megatron has {', '.join(sorted(sources))}; "
                f"the checkpoint has {', '.join(sorted(goals))}"
            ) from error
        except KimisysError:
            raise
        except Exception as error:  # whatever a rule of a user's raises
            raise LayoutError(
                f"the rule for the part {part.name!r} does not fit Megatron's tensors "
                f"{', '.join(f'{key} {list(shape)}' for key, shape in sorted(shapes.items()))}: "
                f"{type(error).__name__}: {error}"
            ) from error
        by_key: dict[str, list[Mapped]] = {}
        for box in mapped:
            by_key.setdefault(box.source, []).append(box)
        unread = sorted(set(sources) - set(by_key))
        if unread:
            raise LayoutError(
                f"the rule for the part {part.name!r} does not read the Megatron tensors "
                f"{', '.join(unread)}"
            )
        self._boxes = {key: _boxes(part, shapes[key], boxes) for key, boxes in by_key.items()}
        self.dtypes = _dtypes(part, mapped, shards)

    def meet(self, shard: Shard) -> Iterator[Meeting]:
        """What `shard` holds of the part's tensors."""
        boxes = self._boxes[shard.key]
        low = np.maximum(boxes.offset, shard.offset)
        high = np.minimum(
            boxes.offset + boxes.extent, np.add(shard.offset, shard.extent, dtype=np.int64)
        )
        for index in np.flatnonzero((low < high).all(axis=1)):
            yield _meeting(boxes.mapped[index], shard, low[index].tolist(), high[index].tolist())

    def padding(self, shard: Shard) -> tuple[int, int] | None:
        """Byte offset and count of the shard's vocabulary rows past the real vocabulary."""
        rows, held = self._boxes[shard.key].rows, shard.extent[0]
        if rows is None:
            return None
        real = min(max(rows - shard.offset[0], 0), held)
        row_bytes = shard.byte_strides[0]
        if real == held:
            return None
        return shard.byte_offset + real * row_bytes, (held - real) * row_bytes


def holdings(parts: Sequence[Part], shards: Sequence[Shard]) -> list[Holding]:
    """Whose part each shard is. Raises LayoutError for keys that no part knows."""
    homes = {
        part.key_prefix.replace("{}", label): (part, label)
        for part in parts
        for label in part.instances()
    }
    found: dict[str, list[Shard]] = {}
    unknown = []
    for shard in shards:
        ends = (at + 1 for at, letter in enumerate(shard.key) if letter == ".")
        prefix = next((shard.key[:end] for end in ends if shard.key[:end] in homes), None)
        if prefix is None:
            unknown.append(shard.key)
        else:
            key = shard.key.removeprefix(prefix)
            found.setdefault(prefix, []).append(replace(shard, key=key))
    if unknown:
        raise LayoutError(
            f"the model's family knows nothing of the Megatron tensors {', '.join(unknown)}; "
            f"its parts are {', '.join(part.name for part in parts)}"
        )
    return [Holding(*homes[prefix], tuple(own)) for prefix, own in found.items()]


def _boxes(part: Part, shape: tuple[int, ...], mapped: Sequence[Mapped]) -> _Boxes:
    read = {(box.source_offset, box.source_extent) for box in mapped}
    count, total = sum(prod(extent) for _, extent in read), prod(shape)
    rows = None
    if count < total and part.padded_rows:
        rows = count // prod(shape[1:])
    elif count < total:
        raise LayoutError(
            f"the rule for the part {part.name!r} reads only {count} of the {total} elements of "
            f"the Megatron tensor {mapped[0].source!r}: it must read all"
        )
    offset = np.array([box.source_offset for box in mapped], np.int64)
    extent = np.array([box.source_extent for box in mapped], np.int64)
    return _Boxes(tuple(mapped), offset, extent, rows)


def _dtypes(part: Part, mapped: Sequence[Mapped], shards: Sequence[Shard]) -> dict[str, str]:
    of_key = {shard.key: dtype_name(shard.dtype) for shard in shards}
    found: dict[str, str] = {}
    for box in mapped:
        dtype = of_key[box.source]
        if found.setdefault(box.destination, dtype) != dtype:
            raise LayoutError(
                f"{part.hf_prefix}{box.destination} is made of Megatron tensors of the dtypes "
                f"{found[box.destination]} and {dtype}: build them with one"
            )
    return found


def _meeting(box: Mapped, shard: Shard, low: list[int], high: list[int]) -> Meeting:
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
    return Meeting(box.destination, region, shard.name, byte_offset, tuple(strides))
