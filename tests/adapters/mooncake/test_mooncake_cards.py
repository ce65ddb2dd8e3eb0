"""Cards are read as if a stranger had written them; batches cover the ranges exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import split

from kimisys.adapters.mooncake.card import Card
from kimisys.adapters.mooncake.engine import _batches
from kimisys.broadcast import snapshot_layout
from kimisys.broadcast.wire import Manifest, fingerprint
from kimisys.errors import SnapshotError

LAYOUT = snapshot_layout(split("w", "bfloat16", (4, 4), 0, 2))
MANIFEST = Manifest(0, LAYOUT.of_rank(0), (0, 1), fingerprint(LAYOUT))
CARD = Card("10.0.0.1:15000", 4096, 8192, MANIFEST)


def test_a_card_is_read_as_it_was_written_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "card"
    for _ in range(2):  # the second one replaces the first
        CARD.write(path)
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert Card.read(path) == CARD
    assert os.listdir(tmp_path) == ["card"]
    with pytest.raises(SnapshotError, match=r"cannot write the card .*No such file"):
        CARD.write(tmp_path / "missing" / "card")


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(protocol=2),
        lambda fields: fields.update(session=7),
        lambda fields: fields.update(address="0"),
        lambda fields: fields.update(address=-1),
        lambda fields: fields.update(nbytes=1 << 63),
        lambda fields: fields.update(nbytes=True),
        lambda fields: fields.pop("manifest"),
        lambda fields: fields["manifest"].update(rank="0"),
    ],
)
def test_malformed_cards_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "card"
    CARD.write(path)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(SnapshotError, match=f"the card {path}"):
        Card.read(path)


@pytest.mark.parametrize("text", [b"", b"7", b"\xff", b"[" * 100_000, b"{}"])
def test_what_is_no_card_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "card"
    path.write_bytes(text)
    os.chmod(path, 0o600)
    with pytest.raises(SnapshotError, match="malformed"):
        Card.read(path)


def test_a_card_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "card"
    with pytest.raises(SnapshotError, match=r"cannot read the card .*No such file"):
        Card.read(path)
    CARD.write(path)
    os.chmod(path, 0o620)
    with pytest.raises(SnapshotError, match="others may have written it"):
        Card.read(path)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=12), st.integers(1, 40))
def test_batches_bring_every_byte_once(pieces: list[tuple[int, int]], limit: int) -> None:
    ranges, end = [], 0
    for offset, nbytes in pieces:
        ranges.append((offset, end, nbytes))
        end += nbytes
    source = np.arange(200, dtype=np.uint8)
    into, written = np.zeros(end, np.uint8), np.zeros(end, int)
    for batch in _batches(np.array(ranges, np.int64).reshape(-1, 3), limit):
        assert 0 < batch[:, 2].sum() <= limit and (batch[:, 2] > 0).all()
        for remote, local, nbytes in batch.tolist():
            into[local : local + nbytes] = source[remote : remote + nbytes]
            written[local : local + nbytes] += 1
    assert (written == 1).all()
    expected = [source[offset : offset + nbytes] for offset, nbytes in pieces]
    np.testing.assert_array_equal(into, np.concatenate([np.zeros(0, np.uint8), *expected]))
