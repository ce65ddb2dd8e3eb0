"""A publisher's memory read through Mooncake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kimisys.adapters.mooncake.card import Card
from kimisys.adapters.mooncake.engine import Engine
from kimisys.broadcast import Peers
from kimisys.broadcast.peers import Found
from kimisys.broadcast.transport import Ranges
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError


class MooncakeMemory:
    """What a card points to: a ``kimisys.broadcast.transport.Memory``."""

    def __init__(self, card: Card, engine: Engine) -> None:
        self._card = card
        self._engine: Engine | None = engine

    @property
    def nbytes(self) -> int:
        return self._card.nbytes

    def read(self, ranges: Ranges, into: memoryview, deadline: Deadline) -> None:
        if self._engine is None:
            raise SnapshotError("this memory was closed; connect again")
        ends = ranges[:, 0] + ranges[:, 2]
        if ranges.size and (int(ranges.min()) < 0 or int(ends.max()) > self.nbytes):
            raise SnapshotError(f"a range is outside the {self.nbytes} bytes of the memory")
        self._engine.read(self._card.session, self._card.address, ranges, into, deadline)

    def mapped(self) -> None:
        return None

    def close(self) -> None:
        self._engine = None


def connect(cards: Sequence[Path | str], engine: Engine, timeout_seconds: float = 30.0) -> Peers:
    """The publishers behind these cards, as ``kimisys.broadcast.connect`` gives those near by.

    Args:
        cards: the card of every publisher: of all ranks, in any order.
        engine: through which their memory is read.
        timeout_seconds: for all of them together.

    Raises:
        SnapshotError: a card is missing or malformed, or its publisher cannot be read; it is named.
        LayoutError: the publishers are not the ranks of one snapshot layout.
    """
    found: list[Found] = []
    for path in map(Path, cards):
        card = Card.read(path)
        found.append(Found(path, card.manifest, MooncakeMemory(card, engine)))
    return Peers(found, Deadline(timeout_seconds))
