"""Two trainer ranks hold a matrix by rows; an engine rank takes it by columns, and verifies it."""

import tempfile
from pathlib import Path

import numpy as np

from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor


def shard(rank: int, offset: list[int], extent: list[int]) -> Layout:
    """A float32 [4, 6] matrix "w", of which `rank` holds one box, row-major, in a buffer "w"."""
    nbytes, strides = 4 * extent[0] * extent[1], [4 * extent[1], 4]
    box = Fragment("w", Region(offset, extent), rank, "w", 0, strides)
    return Layout([Tensor("w", "float32", [4, 6])], [Buffer(rank, "w", nbytes)], [box])


trainer = Layout.merge([shard(0, [0, 0], [2, 6]), shard(1, [2, 0], [2, 6])])
engine = shard(0, [0, 0], [4, 6])
matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
live = {(0, "w"): matrix[:2].copy(), (1, "w"): matrix[2:].copy()}
landed = np.zeros((4, 6), np.float32)

with tempfile.TemporaryDirectory() as folder:
    snapshots = snapshot_layout(trainer, None)
    addresses = [Path(folder) / f"rank{rank}" for rank in trainer.ranks]
    publishers = [Publisher(trainer, snapshots, r, a) for r, a in enumerate(addresses)]
    for publisher in publishers:
        publisher.publish(version=1, buffers=live)
    with connect(addresses) as peers:
        pulled = Subscriber(peers, engine, rank=0).pull(1, {(0, "w"): landed})
    for publisher in publishers:
        publisher.close()

assert (landed == matrix).all()
print(pulled)
