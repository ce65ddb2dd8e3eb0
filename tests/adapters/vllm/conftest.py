"""What the tests of this folder share: above all one started engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen3_tiny import write_config
from vllm_engine_process import EngineProcess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the "tied" and of the "untied" model, with a config.json alone."""
    base = tmp_path_factory.mktemp("qwen3")
    return {name: write_config(base / name, name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="session")
def engine(folders: dict[str, Path]) -> Iterator[EngineProcess]:
    """One engine of the tied model in float32, started once."""
    process = EngineProcess(folders["tied"], max_length=128)
    try:
        yield process
    finally:
        assert process.end() == 0, "the engine's process ended badly"
