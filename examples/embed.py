"""Two trainer ranks hold a matrix by rows; an engine rank takes it whole, verified by digest."""

import tempfile
from pathlib import Path

import numpy as np

from kimisys.broadcast import Publisher, Subscriber, connect, snapshot_layout
from kimisys.reshard import Buffer, Fragment, Layout, Region, Tensor


def rows(rank: int, first: int, count: int) -> Layout:
    """Rows of a float32 [4, 6] tensor "w", in a buffer "w" of `rank`, strides in bytes."""
    held = Fragment("w", Region([first, 0], [count, 6]), rank, "w", 0, [24, 4])
    return Layout([Tensor("w", "float32", [4, 6])], [Buffer(rank, "w", 24 * count)], [held])


matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
trainer, engine = Layout.merge([rows(0, 0, 2), rows(1, 2, 2)]), rows(0, 0, 4)
live = {(0, "w"): matrix[:2], (1, "w"): matrix[2:]}
landed = np.zeros_like(matrix)

with tempfile.TemporaryDirectory() as folder:  # on each trainer rank:
    sockets = [Path(folder) / "rank0", Path(folder) / "rank1"]
    snapshots = snapshot_layout(trainer, "float32")
    publishers = [Publisher(trainer, snapshots, rank, sockets[rank]) for rank in (0, 1)]
    for publisher in publishers:
        publisher.publish(1, live)
    with connect(sockets) as peers:  # on the engine's side:
        print(Subscriber(peers, engine, rank=0).pull(1, {(0, "w"): landed}))
    for publisher in publishers:
        publisher.close()

assert (landed == matrix).all()
