from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of mode 0700 with a short path: a unix socket's may not exceed 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="k") as path:
        yield Path(path)
