"""Publishers of a small model whose weights change, for the tests of pulling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from worlds import Values, random_values, scatter, split, whole

from kimisys.broadcast import Peers, Publisher, connect, snapshot_layout
from kimisys.reshard import Layout

LIVE = Layout.merge(
    [
        split("rows", "bfloat16", (64, 96), 0, 2),
        split("columns", "bfloat16", (32, 2048), 1, 2),
        whole("norm", "bfloat16", (500,), 2),
    ]
)


def engine(ranks: int) -> Layout:
    return Layout.merge(
        [
            split("rows", "bfloat16", (64, 96), 1, ranks),
            split("columns", "bfloat16", (32, 2048), 0, ranks),
            whole("norm", "bfloat16", (500,), ranks),
        ]
    )


class Trainer:
    """Publishers of all ranks of a layout, and the values that they have published last."""

    def __init__(self, publishers: list[Publisher], live: Layout, seed: int = 0) -> None:
        self.publishers, self.live = publishers, live
        self.random = np.random.default_rng(seed)
        self.values = random_values(live, seed)
        self.version = 0

    def change(self, density: float, names: tuple[str, ...] | None = None) -> Values:
        for name, array in self.values.items():
            if names is None or name in names:
                where = self.random.random(array.shape) < density
                new = self.random.integers(0, 2**16, array.shape, np.uint64).astype(array.dtype)
                self.values[name] = np.where(where, new, array)
        return {name: array.copy() for name, array in self.values.items()}

    def publish(self, version: int | None = None, full: bool = False) -> Values:
        self.version = self.version + 1 if version is None else version
        buffers = scatter(self.live, self.values)
        for publisher in self.publishers:
            here = {w: b for w, b in buffers.items() if w[0] == publisher.rank}
            publisher.publish(self.version, here, 1, full)
        return {name: array.copy() for name, array in self.values.items()}

    def next(self, density: float = 0.01, names: tuple[str, ...] | None = None) -> Values:
        self.change(density, names)
        return self.publish()


@contextlib.contextmanager
def training(
    folder: Path, live: Layout = LIVE, log_nbytes: int | None = None
) -> Iterator[tuple[Trainer, Peers]]:
    snapshot = snapshot_layout(live)
    with contextlib.ExitStack() as stack:
        publishers = [
            stack.enter_context(
                Publisher(live, snapshot, rank, folder / f"{rank}.sock", log_nbytes=log_nbytes)
            )
            for rank in live.ranks
        ]
        peers = stack.enter_context(connect([each.address for each in publishers], 10))
        yield Trainer(publishers, live), peers
