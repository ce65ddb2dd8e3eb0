"""A publisher's memory made readable through Mooncake."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from kimisys.adapters.mooncake.card import Card
from kimisys.adapters.mooncake.engine import Engine
from kimisys.broadcast import Publisher


class Export:
    """Registers the memory of a publisher of this process with an engine, and writes its card.

    The publisher goes on as before: both its socket and the card lead to the same memory. Close
    this before the publisher, and keep the engine as long as this.

    Args:
        publisher: of this process.
        engine: of this process; one serves any number of publishers.
        card: the path of the card; a file that is there is replaced.

    Raises:
        SnapshotError: the engine refuses the memory, or the card cannot be written.
    """

    def __init__(self, publisher: Publisher, engine: Engine, card: Path | str) -> None:
        self.card = Path(card)
        self._engine = engine
        self._memory = publisher.mapped()
        engine.register(self._memory)
        self._open = True
        self._inode: int | None = None  # of the card, once it is written
        try:
            address, nbytes = self._memory.ctypes.data, self._memory.nbytes
            Card(engine.session, address, nbytes, publisher.manifest).write(self.card)
            self._inode = self.card.lstat().st_ino
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the card, unless another has replaced it, and takes the memory back. Idempotent.
        Raises SnapshotError when the engine refuses."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                if self.card.lstat().st_ino == self._inode:
                    self.card.unlink()
            self._engine.unregister(self._memory)

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
