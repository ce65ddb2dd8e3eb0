"""Mooncake's engine in one process: what it keeps, and that waits for it end."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from worlds import split

from kimisys.adapters.mooncake import Engine, Export
from kimisys.adapters.mooncake.card import Card
from kimisys.broadcast import Publisher, snapshot_layout
from kimisys.broadcast.wire import Deadline
from kimisys.errors import SnapshotError

ONE = np.array([[0, 0, 8]], np.int64)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("127.0.0.1", staging_nbytes=4096)


def test_memory_that_peers_may_read_stays(engine: Engine) -> None:
    memory = np.arange(8, dtype=np.uint8)
    address, gone = memory.ctypes.data, weakref.ref(memory)
    engine.register(memory)
    del memory
    gc.collect()
    into = bytearray(8)
    engine.read(engine.session, address, ONE, memoryview(into), Deadline(10))
    assert into == bytes(range(8))
    kept = gone()
    assert kept is not None
    engine.unregister(kept)
    del kept
    gc.collect()
    assert gone() is None
    with pytest.raises(SnapshotError, match="does not know the memory"):
        engine.unregister(np.zeros(8, np.uint8))


def test_a_read_waits_for_another_no_longer_than_its_deadline(engine: Engine) -> None:
    memory, into = np.arange(8, dtype=np.uint8), bytearray(8)
    engine.register(memory)
    caught: list[SnapshotError] = []

    def read() -> None:
        try:
            engine.read(engine.session, memory.ctypes.data, ONE, memoryview(into), Deadline(0.05))
        except SnapshotError as error:
            caught.append(error)

    with engine._turn("held by the test", Deadline(10)):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert "another thread's read took it" in str(caught[0]) and engine.session in str(caught[0])
    with pytest.raises(SnapshotError, match="time had passed before"):
        engine.read(engine.session, memory.ctypes.data, ONE, memoryview(into), Deadline(0))
    engine.read(engine.session, memory.ctypes.data, ONE, memoryview(into), Deadline(10))
    assert into == memory.tobytes()  # it goes on
    engine.unregister(memory)


def test_a_card_that_another_export_replaced_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    live, card = split("w", "bfloat16", (4, 4), 0, 1), tmp_path / "card"
    snapshot = snapshot_layout(live)
    with (
        Publisher(live, snapshot, 0, tmp_path / "old") as old,
        Publisher(live, snapshot, 0, tmp_path / "new") as new,
    ):
        first = Export(old, engine, card)
        second = Export(new, engine, card)
        first.close()
        assert Card.read(card).address == new.mapped().ctypes.data
        second.close()
        assert not card.exists()
