"""The layout of snapshots: where a published tensor lies in a trainer rank's shared memory."""

from __future__ import annotations

import itertools

from kimisys.errors import LayoutError
from kimisys.reshard import Buffer, Fragment, Layout, Padding, Tensor, itemsize

SNAPSHOT_BUFFER = "snapshot"
"""Name of the one buffer that each rank publishes."""

ALIGNMENT = 64
"""Bytes: every live buffer begins on a cache line of the snapshot."""

_FLOATING = {"float32", "bfloat16", "float16", "float8_e4m3fn"}
_CASTABLE = {"float32", "bfloat16"}


def snapshot_layout(live: Layout, wire_dtype: str | None = None) -> Layout:
    """The layout in which ``live`` is published.

    Fragments and padding stay as they are; every live buffer of a rank becomes a 64-byte aligned
    block of that rank's one buffer ``"snapshot"``, with offsets and strides scaled to the size of
    the wire dtype. The gaps between blocks are padding.

    Args:
        live: the trainer's layout, of one rank or of several.
        wire_dtype: ``"float32"`` or ``"bfloat16"``: floating tensors are published in it, others as
            they are. None publishes every tensor in its own dtype.

    Raises:
        LayoutError: a floating tensor cannot be cast to ``wire_dtype``, or one buffer mixes tensors
            whose sizes change by different factors, so that there is no scaled picture of it.
    """
    wire = {tensor.name: _wire_dtype(tensor, wire_dtype) for tensor in live.tensors}
    scales = _buffer_scales(live, wire)
    buffers: list[Buffer] = []
    padding: list[Padding] = []
    starts: dict[tuple[int, str], int] = {}
    for rank, blocks in itertools.groupby(live.buffers, key=lambda buffer: buffer.rank):
        end = 0
        for buffer in blocks:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if start > end:
                padding.append(Padding(rank, SNAPSHOT_BUFFER, end, start - end))
            starts[rank, buffer.name] = start
            end = start + scales[rank, buffer.name].apply(buffer.nbytes)
        buffers.append(Buffer(rank, SNAPSHOT_BUFFER, end))
    for pad in live.padding:
        scale = scales[pad.rank, pad.buffer]
        begin = starts[pad.rank, pad.buffer] + scale.apply(pad.byte_offset)
        padding.append(Padding(pad.rank, SNAPSHOT_BUFFER, begin, scale.apply(pad.nbytes)))
    fragments = [_moved(f, starts, scales) for f in live.fragments]
    tensors = [Tensor(t.name, wire[t.name], t.shape) for t in live.tensors]
    return Layout(tensors, buffers, fragments, padding, live.places)


class _Scale:
    """Bytes of a live buffer to bytes of its block: times ``wire`` over ``live``, exactly."""

    def __init__(self, live: int, wire: int, where: str) -> None:
        self.live, self.wire, self._where = live, wire, where

    def apply(self, nbytes: int) -> int:
        scaled, rest = divmod(nbytes * self.wire, self.live)
        if rest:
            raise LayoutError(
                f"{self._where}: byte {nbytes} does not lie on an element of {self.live} bytes, so "
                f"it has no place at {self.wire} bytes per element; align the buffer's fragments "
                "and padding, or publish with wire dtype None"
            )
        return scaled


def _wire_dtype(tensor: Tensor, wire_dtype: str | None) -> str:
    if wire_dtype is None or tensor.dtype not in _FLOATING or tensor.dtype == wire_dtype:
        return tensor.dtype
    if wire_dtype not in _CASTABLE or tensor.dtype not in _CASTABLE:
        raise LayoutError(
            f"tensor '{tensor.name}' of dtype {tensor.dtype} cannot be published as {wire_dtype}; "
            "only float32 and bfloat16 are cast: use one of them, or wire dtype None"
        )
    return wire_dtype


def _buffer_scales(live: Layout, wire: dict[str, str]) -> dict[tuple[int, str], _Scale]:
    dtypes = {tensor.name: tensor.dtype for tensor in live.tensors}
    factors: dict[tuple[int, str], tuple[int, int, str]] = {}
    for fragment in live.fragments:
        where = fragment.rank, fragment.buffer
        size = itemsize(dtypes[fragment.tensor])
        wire_size = itemsize(wire[fragment.tensor])
        known_size, known_wire, first = factors.setdefault(
            where, (size, wire_size, fragment.tensor)
        )
        if size * known_wire != known_size * wire_size:
            raise LayoutError(
                f"buffer '{fragment.buffer}' of rank {fragment.rank} holds '{first}' "
                f"({dtypes[first]}, published as {wire[first]}) and '{fragment.tensor}' "
                f"({dtypes[fragment.tensor]}, published as {wire[fragment.tensor]}): they do not "
                "shrink alike; give them separate buffers, or publish with wire dtype None"
            )
        if size == wire_size:
            factors[where] = (1, 1, first)
    scales: dict[tuple[int, str], _Scale] = {}
    for buffer in live.buffers:
        size, wire_size, _ = factors.get((buffer.rank, buffer.name), (1, 1, ""))
        text = f"buffer '{buffer.name}' of rank {buffer.rank}"
        scales[buffer.rank, buffer.name] = _Scale(size, wire_size, text)
    return scales


def _moved(
    fragment: Fragment,
    starts: dict[tuple[int, str], int],
    scales: dict[tuple[int, str], _Scale],
) -> Fragment:
    where = fragment.rank, fragment.buffer
    scale = scales[where]
    return Fragment(
        fragment.tensor,
        fragment.region,
        fragment.rank,
        SNAPSHOT_BUFFER,
        starts[where] + scale.apply(fragment.byte_offset),
        [scale.apply(stride) for stride in fragment.byte_strides],
    )
