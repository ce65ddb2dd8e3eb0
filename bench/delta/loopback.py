"""Pulls through Mooncake over loopback TCP, against Mooncake's own transfer of as many bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.delta.exporter import HOST
from bench.delta.versions import Versions
from bench.harness import Case
from bench.reshard import MIB
from bench.sync.child import Child
from kimisys.adapters.mooncake import Engine, connect
from kimisys.adapters.mooncake.card import Card
from kimisys.broadcast import Pulled, Subscriber
from kimisys.errors import SnapshotError

_PEER = "mooncake's transfer_sync_read"


class Transfer:
    """Mooncake's engine alone: reads from the very memory that the pulls read from."""

    def __init__(self, card: Card) -> None:
        from mooncake.engine import TransferEngine

        self._card = card
        self._engine = TransferEngine()
        self.landed = np.zeros(card.nbytes, np.uint8)
        if self._engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("Mooncake's transfer engine does not start")
        self._engine.register_memory(self.landed.ctypes.data, self.landed.nbytes)

    def read(self, nbytes: int) -> None:
        """The last `nbytes` of the memory, at once."""
        begin = self._card.nbytes - nbytes
        place = self.landed.ctypes.data + begin
        remote = self._card.address + begin
        if self._engine.transfer_sync_read(self._card.session, place, remote, nbytes) != 0:
            raise RuntimeError("Mooncake could not read")


def cases(total: int, density: float) -> Iterator[Case]:
    """A full pull, then that of a delta. Where Mooncake cannot be loaded, none, which is said."""
    try:
        engine = Engine(HOST)
    except SnapshotError as error:
        Console(stderr=True).print(f"pulls through Mooncake: not measured: {error}", markup=False)
        return
    versions = Versions(total, density, "random")
    landed = np.zeros_like(versions.live)
    pulls: list[Pulled] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"folder": folder, "total": total, "density": density}
        with closing(Child("bench.delta.exporter", arguments, {})) as exporter:
            exporter.receive(60.0)
            card = Path(folder) / "rank0.card"
            transfer = Transfer(Card.read(card))
            with connect([card], engine) as peers:
                subscriber = Subscriber(peers, versions.layout, rank=0)

                def pull(full: bool) -> Callable[[], None]:
                    def run() -> None:
                        pulls[:] = [subscriber.pull(None, {(0, "w"): landed}, full=full)]

                    return run

                def right(full: bool) -> Callable[[], bool]:
                    def look() -> bool:
                        return (pulls[0].base is None) == full and bool(
                            (landed == versions.live).all()
                        )

                    return look

                def turn() -> None:
                    exporter.call("turn")
                    versions.turn()

                def agree() -> bool:
                    """What was landed by the peer is the data, which lies last in the memory."""
                    transfer.read(total)
                    return bool((transfer.landed[-total:] == versions.live.view(np.uint8)).all())

                yield Case(
                    f"full pull through Mooncake, loopback, {total // MIB} MiB",
                    pull(True),
                    {_PEER: lambda: transfer.read(total)},
                    right(True),
                    total,
                    agree=agree,
                    figures=lambda: {"wire bytes (MB)": pulls[0].wire_nbytes / 1e6},
                )
                yield Case(
                    f"pull of a {100 * density:g} % delta through Mooncake, loopback",
                    pull(False),
                    {_PEER: lambda: transfer.read(pulls[0].wire_nbytes)},
                    right(False),
                    agree=lambda: right(False)() and agree(),
                    figures=lambda: {"wire bytes (MB)": pulls[0].wire_nbytes / 1e6},
                    before=turn,
                )
