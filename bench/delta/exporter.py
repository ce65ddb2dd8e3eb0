"""A publisher that exports its memory through Mooncake, in a process of its own."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from bench.delta.versions import Versions
from bench.sync.child import serve
from kimisys.adapters.mooncake import Engine, Export
from kimisys.broadcast import Publisher, snapshot_layout

HOST = "127.0.0.1"


class Exporter:
    """Publishes the two versions of a matrix by turns. folder: for its socket and its card."""

    def __init__(self, folder: str, total: int, density: float) -> None:
        self._versions = Versions(total, density, "random")
        layout = snapshot_layout(self._versions.layout, "bfloat16")
        address = Path(folder) / "rank0"
        self._publisher = Publisher(self._versions.layout, layout, 0, address)
        self._engine = Engine(HOST)
        self._numbers = count()
        self.publish()
        self._export = Export(self._publisher, self._engine, Path(folder) / "rank0.card")

    def turn(self) -> None:
        """Makes the other version the live one, and publishes it."""
        self._versions.turn()
        self.publish()

    def publish(self) -> None:
        self._publisher.publish(next(self._numbers), self._versions.buffers)

    def close(self) -> None:
        self._export.close()
        self._publisher.close()


if __name__ == "__main__":
    serve(Exporter)
