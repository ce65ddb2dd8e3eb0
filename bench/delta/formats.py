"""What others would send instead of a record: each made from the old and the new bits, and undone.

The sparse format is that of vLLM 0.32's `sparse_nccl` (vllm/distributed/weight_transfer): per
parameter, int32 flat indices and the values at them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import zstandard

from bench.delta.versions import Bits

LEVEL = 3  # zstd's default


class Sparse:
    """Flat indices and values of what changed."""

    def __init__(self, old: Bits, new: Bits) -> None:
        before, after = torch.from_numpy(old.view(np.int16)), torch.from_numpy(new.view(np.int16))
        self.indices = torch.ne(before, after).nonzero().view(-1).to(torch.int32)
        self.values = after[self.indices]

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes

    def applied(self, old: Bits) -> Bits:
        new = old.copy()
        new[self.indices.numpy()] = self.values.numpy().view(np.uint16)
        return new


class Compressed:
    """zstd, on all cores, of the XOR of old and new bits."""

    def __init__(self, old: Bits, new: Bits) -> None:
        changes = np.bitwise_xor(old, new)
        compressor = zstandard.ZstdCompressor(level=LEVEL, threads=-1)
        self._compressed = compressor.compress(changes.data.cast("B"))

    @property
    def nbytes(self) -> int:
        return len(self._compressed)

    def applied(self, old: Bits) -> Bits:
        changes = zstandard.ZstdDecompressor().decompress(self._compressed, old.nbytes)
        return np.bitwise_xor(old, np.frombuffer(changes, np.uint16))


def bound(density: float) -> float:
    """Bytes per changed bfloat16 element that a record may take at a random density p: 1.15 times
    the entropy of the positions, H(p)/(8 p), and two bytes of value."""
    p, q = density, 1 - density
    entropy = -p * math.log2(p) - q * math.log2(q)
    return 1.15 * (entropy / (8 * p) + 2)
