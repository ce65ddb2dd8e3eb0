"""A rank's changes as they travel: encoded by the core, block by block (csrc/broadcast/code.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kimisys._core.broadcast import Blocks, decode_block, encode_block
from kimisys.kernels import elements
from kimisys.kernels.changes import Block, Changes
from kimisys.reshard import Layout, itemsize

_KIND, _WHOLE, _NBYTES = 3, 3, 7  # of a descriptor: mask, value, shift


@dataclass(frozen=True)
class Delta:
    """What changed in a rank's snapshot.

    Attributes:
        descriptors: uint32[blocks] (kind, Rice parameter, bytes).
        payloads: the bytes of each block; a whole block's bits are among them.
        increments: uint64[tensors of the snapshot's layout], as in ``Changes``.
        changed: how many elements.
    """

    descriptors: npt.NDArray[np.uint32]
    payloads: Sequence[bytes]
    increments: npt.NDArray[np.uint64]
    changed: int


def blocks_of(snapshot: Layout) -> list[Block]:
    """The blocks of one rank's snapshot, in their order."""
    blocks = Blocks(snapshot)
    return list(zip(blocks.fragments.tolist(), blocks.regions, strict=True))


def encode(
    changes: Changes, snapshot: Layout, blocks: Sequence[Block], memory: torch.Tensor
) -> Delta:
    """The smallest encoding of each block. memory: the snapshot's, after the changes, uint8, on
    any device: whole blocks are read from it."""
    dtypes = {tensor.name: tensor.dtype for tensor in snapshot.tensors}
    descriptors = np.zeros(len(blocks), np.uint32)
    payloads = [b""] * len(blocks)
    for number, (index, region) in enumerate(blocks):
        positions = changes.positions[number]
        if len(positions) == 0:
            continue
        fragment = snapshot.fragments[index]
        size = itemsize(dtypes[fragment.tensor])
        descriptor, payload = encode_block(positions, changes.bits[number], region.elements, size)
        if descriptor & _KIND == _WHOLE:
            begin = elements.first_byte(fragment, region)
            payload = _whole(memory, begin, region.extent, fragment.byte_strides, size)
            descriptor |= len(payload) << _NBYTES
        descriptors[number], payloads[number] = descriptor, payload
    return Delta(descriptors, payloads, changes.increments, sum(map(len, changes.positions)))


def decode(delta: Delta, snapshot: Layout, blocks: Sequence[Block]) -> Changes:
    """The inverse of ``encode``, but that all elements of a whole block count as changed.

    Raises:
        SnapshotError: a payload is malformed.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in snapshot.tensors}
    positions, bits = [], []
    for (index, region), word, payload in zip(
        blocks, delta.descriptors.tolist(), delta.payloads, strict=True
    ):
        size = itemsize(dtypes[snapshot.fragments[index].tensor])
        if word & _KIND == _WHOLE:
            places, values = np.arange(region.elements, dtype=np.uint32), payload
        elif word:
            places, values = decode_block(word, payload, region.elements, size)
        else:
            places, values = np.empty(0, np.uint32), b""
        positions.append(places)
        bits.append(np.frombuffer(values, f"u{size}"))
    return Changes(positions, bits, delta.increments)


def _whole(
    memory: torch.Tensor, begin: int, extent: Sequence[int], strides: Sequence[int], size: int
) -> bytes:
    """A block's bits, row-major: bytes are the innermost dimension."""
    at = memory.storage_offset() + begin
    bytes_ = torch.as_strided(memory, [*extent, size], [*strides, 1], at)
    return bytes_.contiguous().cpu().numpy().tobytes()
